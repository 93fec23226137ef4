"""Private names of pickle, as of Python 3.11."""

from collections.abc import Callable
from pickle import _Unpickler
from typing import Any, ClassVar


class PythonUnpickler(_Unpickler):
    """The unpickler in Python. Unlike in the one in C, each instruction can be replaced."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]]
    """The function of each instruction, which takes the unpickler."""
    stack: list[Any]
    metastack: list[list[Any]]
