"""The OpenMP runtime of torch, as of the Linux wheels of 2.13.0.

Its threads busy-wait for some milliseconds after each operation. Threads of another pool would
compete with them for the processors.
"""

import ctypes
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

MAPS = Path("/proc/self/maps")
TORCH = f"{Path(torch.__file__).resolve().parent}{os.sep}"
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_forked = False


def _after_fork() -> None:
    # The runtime does not notice that its threads do not exist in the child.
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run_in_team(work: Callable[[], None], threads: int) -> bool:
    """Calls a function in each of torch's threads, including the calling one.

    Args:
        work: The function, which must not raise.
        threads: The number of threads.

    Returns:
        False if nothing was called: torch uses another runtime, or this process is a fork.
    """
    parallel = None if _forked else _parallel()
    if parallel is None:
        return False
    parallel(_CALLBACK(lambda _: work()), None, threads, 0)
    return True


@cache
def _parallel() -> Callable[..., None] | None:
    """Returns `GOMP_parallel` of torch's libgomp; None if another kind of OpenMP is loaded."""
    runtime = _runtime_of_torch(MAPS.read_text() if MAPS.exists() else "")
    if runtime is None:
        return None
    parallel = ctypes.CDLL(runtime).GOMP_parallel
    parallel.argtypes = [_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


def _runtime_of_torch(maps: str) -> str | None:
    """Returns the path of torch's libgomp; wheels such as scikit-learn's load a second one."""
    runtimes = set(re.findall(r"/.*/lib[gi]?omp[^/\n]*\.so\S*", maps))
    if not all("libgomp" in each for each in runtimes):
        return None
    candidates = {each for each in runtimes if each.startswith(TORCH)} or runtimes
    return candidates.pop() if len(candidates) == 1 else None
