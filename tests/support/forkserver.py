"""Starts Python programs without the seconds that imports of torch and Lightning take.

A server imports the libraries once and forks itself for each program. The program sees its own
arguments, folder, environment and output, as in a new process. What it must not find imported,
above all lightning_adam and wandb, is left to the program.
"""

import atexit
import multiprocessing
import os
import random
import runpy
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from unittest.mock import patch

PRELOADED = ["lightning", "torchmetrics.classification", "hydra", "numba"]
"""Not wandb: it makes its media folder when it is imported, and the first program that ends would
delete that of all others. Rows and tables of their runs were lost."""


def context() -> ForkServerContext:
    """Returns a multiprocessing context whose processes have the libraries imported."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    # torch takes the number of its threads from the environment that it is imported in.
    with patch.dict(os.environ, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return processes


def start(
    program: str,
    arguments: Sequence[str],
    folder: Path,
    variables: Mapping[str, str],
    output: Path,
) -> ForkServerProcess:
    """Starts a Python program.

    Args:
        program: A module, as after `python -m`, the path of a script, which ends in `.py`, or
            the name of a console script of this package.
        arguments: The arguments of the program.
        folder: The folder in which it starts.
        variables: Its whole environment.
        output: The file for stdout and stderr.
    """
    given = (program, list(arguments), str(folder), dict(variables), str(output))
    process = context().Process(target=_become, args=given)
    process.start()
    return process


def _become(
    program: str, arguments: list[str], folder: str, variables: dict[str, str], output: str
) -> None:
    assert not {"lightning_adam", "wandb"} & sys.modules.keys(), "imported by the server"
    nothing, descriptor = (
        os.open(os.devnull, os.O_RDONLY),
        os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    )
    os.dup2(nothing, 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    # A background process ignores Ctrl-C, and so do the children of one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    _set_rank()
    sys.path[1:1] = [each for each in variables.get("PYTHONPATH", "").split(os.pathsep) if each]
    try:
        _run(program, arguments, folder)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        # A multiprocessing process skips these steps, which a program runs at exit in this order.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()


def _run(program: str, arguments: list[str], folder: str) -> None:
    if program.endswith(".py"):
        path = Path(folder, program)
        sys.argv, sys.path[0] = [program, *arguments], str(path.parent)
        runpy.run_path(str(path), run_name="__main__")
    elif scripts := entry_points(group="console_scripts", name=program):
        sys.argv = [program, *arguments]
        (script,) = scripts
        sys.exit(script.load()())
    else:
        sys.argv, sys.path[0] = [program, *arguments], folder
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def _set_rank() -> None:
    """Lightning reads the rank from the environment when it is imported."""
    from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

    rank_zero_only.rank = _get_rank() or 0  # type: ignore[attr-defined]
