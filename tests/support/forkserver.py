"""Processes that need not import torch and Lightning anew: they are forked.

What a module sees is what it would see alone (its arguments, folder, environment, output and exit
code), except that other people's libraries are there already, which otherwise take longer than most
of what is tested.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from unittest.mock import patch

PRELOADED = ["lightning", "numba"]
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
    module: str,
    arguments: Sequence[str],
    folder: Path,
    variables: Mapping[str, str],
    output: Path,
) -> ForkServerProcess:
    """Starts `python -m module ...`.

    Args:
        module: The module.
        arguments: What follows it.
        folder: The folder it is started in.
        variables: All of its environment.
        output: The file that takes its stdout and stderr, as they come.
    """
    given = (module, list(arguments), str(folder), dict(variables), str(output))
    process = context().Process(target=_become, args=given)
    process.start()
    return process


def _become(
    module: str, arguments: list[str], folder: str, variables: dict[str, str], output: str
) -> None:
    """Runs the module in this process."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    _know_the_rank()
    sys.argv, sys.path[0] = [module, *arguments], folder
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        # A process of multiprocessing ends without what a program does at its end.
        atexit._run_exitfuncs()


def _know_the_rank() -> None:
    """Lightning reads it from the environment when it is imported."""
    from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

    rank_zero_only.rank = _get_rank() or 0  # type: ignore[attr-defined]
