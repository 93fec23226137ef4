"""Nothing is printed but tables and progress: what the libraries say is kept away."""

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def quieten() -> None:
    """No warnings, but that of a monitor that has failed: it is an error here."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("error", message="AdamMonitor failed")


@contextmanager
def silence() -> Iterator[None]:
    """Nothing of the block is printed."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def progress(items: Iterable[Item], what: str) -> Iterator[Item]:
    """A line on the real standard error, whatever is silenced."""
    yield from tqdm([*items], desc=what, file=sys.__stderr__, mininterval=1)
