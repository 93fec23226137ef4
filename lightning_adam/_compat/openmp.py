"""The OpenMP runtime that torch runs its operations on, seen in torch 2.13.0's wheels for Linux.

Its threads wait for the next operation in a loop, for some milliseconds: other threads would have
to share the processors with them.
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
    # The threads are not there, and the runtime does not know.
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run_in_team(work: Callable[[], None], threads: int) -> bool:
    """Has each of torch's threads do the work, this one among them.

    Args:
        work: What each does; it must not raise.
        threads: How many.

    Returns:
        False if nothing was done: torch has another runtime here, or this process is a fork.
    """
    parallel = None if _forked else _parallel()
    if parallel is None:
        return False
    parallel(_CALLBACK(lambda _: work()), None, threads, 0)
    return True


@cache
def _parallel() -> Callable[..., None] | None:
    """The `parallel` of torch's libgomp, if no other kind of OpenMP is loaded."""
    runtime = _runtime_of_torch(MAPS.read_text() if MAPS.exists() else "")
    if runtime is None:
        return None
    parallel = ctypes.CDLL(runtime).GOMP_parallel
    parallel.argtypes = [_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


def _runtime_of_torch(maps: str) -> str | None:
    """The file of torch's libgomp among what is loaded; scikit-learn's wheels bring their own."""
    runtimes = set(re.findall(r"/.*/lib[gi]?omp[^/\n]*\.so\S*", maps))
    if not all("libgomp" in each for each in runtimes):
        return None
    candidates = {each for each in runtimes if each.startswith(TORCH)} or runtimes
    return candidates.pop() if len(candidates) == 1 else None
