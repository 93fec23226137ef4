"""Private names of pickle, seen in Python 3.11."""

from collections.abc import Callable
from pickle import _Unpickler
from typing import Any, ClassVar


class PythonUnpickler(_Unpickler):
    """The unpickler in Python: unlike the one in C, each instruction can be replaced."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]]
    """The function of each instruction. It takes the unpickler."""
    stack: list[Any]
    metastack: list[list[Any]]
