"""The refusals: what was given, what was expected, what to type instead."""

import difflib
import logging
import re
import shlex
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum

from hydra.errors import CompactHydraException


class ConfigError(ValueError, CompactHydraException):
    """A setting that cannot work: what was given, what was expected, what to type instead.

    Hydra 1.3 prints a `CompactHydraException` as its message alone, without a traceback.
    """

    def __repr__(self) -> str:
        """The sentence alone: what Hydra quotes when `instantiate` meets the error."""
        return str(self)


def refusal(where: str, name: str, value: object, expected: str, instead: object) -> ConfigError:
    """The one form of a refusal: field and value given, what was expected, what to type.

    Args:
        where: The full name of the config's place (`model.optimizer`).
        name: The field.
        value: The value given.
        expected: A clause that begins with `expected`.
        instead: A value that works.

    Example:
        >>> print(refusal("optimizer", "lr", -1.0, "expected a number above 0", 0.001))
        optimizer.lr=-1.0: expected a number above 0; type for example optimizer.lr=0.001
    """
    instruction = type_instead(f"{where}.{name}", instead)
    return ConfigError(f"{where}.{name}={as_typed(value)}: {expected}; {instruction}")


def unknown_field(where: str, name: str, value: object, fields: Iterable[str]) -> ConfigError:
    """The refusal of a name that is none of the fields.

    Example:
        >>> print(unknown_field("optimizer", "lrr", 0.01, ["lr", "betas"]))
        optimizer.lrr=0.01: no such field; type for example optimizer.lr=0.01
    """
    fields = list(fields)
    close = nearest(name, fields, 1)
    if close:
        instruction = type_instead(f"{where}.{close[0]}", value)
    else:
        instruction = f"the fields are {', '.join(fields)}"
    return ConfigError(f"{where}.{name}={as_typed(value)}: no such field; {instruction}")


def type_instead(key: str, value: object) -> str:
    """An override that works, as one word of a shell.

    Example:
        >>> print(type_instead("optimizer.betas", [0.9, 0.95]))
        type for example 'optimizer.betas=[0.9,0.95]'
    """
    return f"type for example {typed_override(key, value)}"


def typed_override(key: str, value: object) -> str:
    """An override as one word of a shell.

    Example:
        >>> print(typed_override("optimizer.lr", 3e-4))
        optimizer.lr=0.0003
    """
    return shlex.quote(f"{key}={as_typed(value)}")


def nearest(name: str, names: Iterable[str], count: int, cutoff: float = 0.6) -> list[str]:
    """The names most like `name`, the most alike first.

    Example:
        >>> nearest("beta", ["lr", "betas"], 1)
        ['betas']
    """
    return difflib.get_close_matches(name, list(names), count, cutoff)


def as_typed(value: object) -> str:
    """A value as it is typed on Hydra's command line.

    Example:
        >>> print(as_typed({"match": "*.head.*", "betas": [0.9, None], "fused": True}))
        {match:*.head.*,betas:[0.9,null],fused:true}
        >>> print(as_typed("a (b)"))
        "a (b)"
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return str(value.value)
    if is_dataclass(value) and not isinstance(value, type):
        return as_typed(asdict(value))
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{as_typed(each)}' for key, each in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_typed, value))}]"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z0-9_/\-.+*?%$@|]+", value):
        # Within quotes a backslash stands for itself, except before a quote.
        escaped = re.sub(r'(\\*)("|$)', lambda run: 2 * run[1] + run[2].replace('"', r"\""), value)
        # A line break cannot be typed within a line.
        return '"' + escaped.replace("\n", "\\n") + '"'
    return str(value)


def warn_only(said: str) -> None:
    """A warning that is never an error, whatever the filters say: where it stands nothing may stop.

    Example:
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error")
        ...     warn_only("for the log alone")
    """
    try:
        warnings.warn(said, stacklevel=3)
    except Warning:
        # Where warnings are errors, this one would stop the training.
        logging.getLogger(__name__).warning(said)
