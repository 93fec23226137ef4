"""Commands of Python that need not import torch and Lightning anew: they are forked.

What a command sees is what it would see alone (its arguments, folder, environment, output and exit
code), except that other people's libraries are there already, which otherwise take longer than most
of what is tested.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from unittest.mock import patch

PRELOADED = ["lightning", "torchmetrics.classification", "hydra", "wandb", "numba", "mlxtend.data"]
"""Libraries of others alone: what is ours is imported by each command itself."""


def context() -> ForkServerContext:
    """Processes that begin with the libraries of others."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    # torch takes the number of its threads from the environment that it is imported in.
    with patch.dict(os.environ, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return processes


def start(
    words: Sequence[str], folder: Path, variables: Mapping[str, str], output: Path
) -> ForkServerProcess:
    """Starts `python` with these words behind it: a script or `-m` and a module, and arguments.

    Args:
        words: What follows `python`.
        folder: The folder it is started in.
        variables: All of its environment.
        output: The file that takes its stdout and stderr, as they come.
    """
    arguments = (list(words), str(folder), dict(variables), str(output))
    process = context().Process(target=_become, args=arguments)
    process.start()
    return process


def can_fork(command: Sequence[str | Path], variables: Mapping[str, str]) -> bool:
    """Whether it is `lightning-adam`, in the environment that runs the tests.

    Of trainings that were forked, rows of the W&B run were missing at times; why is not known.
    """
    program = Path(command[0])
    is_here = program.parent == Path(sys.executable).parent and "PYTHONPATH" not in variables
    return is_here and program.name == "lightning-adam"


def run_forked(
    command: Sequence[str | Path], folder: Path, variables: Mapping[str, str]
) -> tuple[int, str]:
    """The exit code of a command for which `can_fork` holds, and its stdout and stderr."""
    words = [str(word) for word in command]
    with tempfile.NamedTemporaryFile() as output:
        process = start(words, folder, variables, Path(output.name))
        process.join()
        assert process.exitcode is not None
        return process.exitcode, output.read().decode("utf-8")


def _become(words: list[str], folder: str, variables: dict[str, str], output: str) -> None:
    """Runs the command in this process."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    _know_the_rank()
    script, *arguments = words
    try:
        if script == "-m":
            module, *arguments = arguments
            sys.argv, sys.path[0] = [module, *arguments], folder
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = [script, *arguments], str(Path(folder, script).parent)
            runpy.run_path(script, run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        # A process of multiprocessing ends without what a program does at its end.
        atexit._run_exitfuncs()


def _know_the_rank() -> None:
    """Lightning reads it from the environment when it is imported."""
    from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

    rank_zero_only.rank = _get_rank() or 0  # type: ignore[attr-defined]
