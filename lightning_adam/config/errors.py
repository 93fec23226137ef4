"""`ConfigError`: what was given, why it cannot work, and what to use instead."""

import difflib
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from enum import Enum
from typing import Any, Final

from hydra.errors import CompactHydraException

from lightning_adam.config.variables import MONITOR_VARIABLE


class _Unset(Enum):
    """Type of `UNSET`. A member of an enum keeps its identity when an error is pickled."""

    UNSET = "unset"


UNSET: Final = _Unset.UNSET
"""Stands for no value where None is a valid value."""


class Placeholder(str):
    """A value for the user to fill in, such as `VALUE`. It is written without quotes."""

    def __repr__(self) -> str:
        return str(self)


class Source(Enum):
    """The origin of a config, which determines how its settings are written."""

    HYDRA = "hydra"
    """A composed config: `optimizer.lr=0.001`."""
    LIGHTNING_CLI = "lightning_cli"
    """Arguments of LightningCLI: `--model.optimizer.lr=0.001`."""
    OMEGACONF = "omegaconf"
    """A config built in code: `cfg.optimizer.lr=0.001`."""
    PYTHON = "python"
    """Arguments of a function: `lr=0.001`."""
    ENVIRONMENT = "environment"
    """The variable LIGHTNING_ADAM_MONITOR: `LIGHTNING_ADAM_MONITOR=every_n_steps=10`."""


@dataclass(frozen=True)
class ConfigPath:
    """The path of a setting, and the syntax to set it there.

    Args:
        config: Path of the config that holds the setting, such as `model.optimizer`.
        field: Path of the setting in its config, such as `groups.0.lr_scale` (default: empty, the
            config itself).
        source: Where the config comes from (default: Source.HYDRA).
        keys: The settings that the config has, which Hydra overrides without a `+` (default: None,
            every setting).
        added: The settings that the command line adds with a `+` (default: none).

    Example:
        >>> lr = ConfigPath("model.optimizer") / "lr"
        >>> str(lr), lr.override(0.001)
        ('model.optimizer.lr', 'model.optimizer.lr=0.001')
        >>> (ConfigPath("optimizer", source=Source.PYTHON) / "betas").override([0.9, 0.95])
        'betas=[0.9, 0.95]'
        >>> (ConfigPath("model.optimizer", source=Source.LIGHTNING_CLI) / "fused").override(None)
        '--model.optimizer.fused=null'
        >>> (ConfigPath("optimizer", keys=frozenset(["lr"])) / "eps").override(1e-6)
        '+optimizer.eps=1e-06'
    """

    config: str
    field: str = ""
    source: Source = Source.HYDRA
    keys: frozenset[str] | None = None
    added: frozenset[str] = frozenset()

    def __truediv__(self, name: object) -> "ConfigPath":
        return replace(self, field=f"{self.field}.{name}".lstrip("."))

    def __str__(self) -> str:
        return f"{self.config}.{self.field}".rstrip(".")

    @property
    def name(self) -> str:
        """The name of the setting, as the user writes it."""
        if self.source is Source.LIGHTNING_CLI:
            return f"--{self}"
        if self.source is Source.OMEGACONF:
            return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", f"cfg.{self}")
        return (str(self) if self.source is Source.HYDRA else self.field) or self.config

    def format(self, value: object) -> str:
        """Returns a value as the user writes it, without a shell's quotes."""
        if self.source in (Source.OMEGACONF, Source.PYTHON):
            return repr(_to_plain(value))
        if self.source is Source.LIGHTNING_CLI:
            value = _to_plain(value)
            return value if isinstance(value, str) else json.dumps(value, default=str)
        return format_value(value)

    def assignment(self, value: object) -> str:
        """Returns `name=value` as the user writes it, without a shell's quotes."""
        return f"{self.name}={self.format(value)}"

    def override(self, value: object) -> str:
        """Returns the assignment, quoted if needed, ready to paste."""
        assignment = self.assignment(value)
        if self.source in (Source.OMEGACONF, Source.PYTHON):
            return assignment
        if self.source is Source.ENVIRONMENT:
            # The shell removes one pair of quotes, and the parser of the variable another.
            is_one_word = shlex.split(assignment) == [assignment]
            word = assignment if is_one_word else shlex.quote(assignment)
            return f"{MONITOR_VARIABLE}={shlex.quote(word)}"
        return shlex.quote(self.unquoted_override(value))

    def unquoted_override(self, value: object) -> str:
        """Returns the override without a shell's quotes, for an argument list.

        Example:
            >>> (ConfigPath("optimizer") / "betas").unquoted_override([0.9, 0.95])
            'optimizer.betas=[0.9,0.95]'
        """
        return f"{self._prefix}{self.assignment(value)}"

    @property
    def _prefix(self) -> str:
        """`+` or `++` where Hydra needs it before the setting; empty otherwise."""
        if self.source is not Source.HYDRA or not self.field:
            return ""
        if self.field in self.added:
            # `++` works both in place of the given override and after it.
            return "++"
        return "" if self.keys is None or self.field in self.keys else "+"

    def suggest(self, value: object, verb: str = "Use for example") -> str:
        """Returns a sentence that suggests a value.

        Example:
            >>> (ConfigPath("optimizer") / "lr").suggest(0.001)
            'Use for example optimizer.lr=0.001'
        """
        item = re.fullmatch(r"(.+)\.(\d+)\.([^.]+)", self.field)
        if item is not None and self.source is Source.LIGHTNING_CLI:
            # LightningCLI has no option that sets a field of a list's item.
            given = replace(self, field=item[1]).name
            setting = f"{item[3]}: {self.format(value)}"
            return f"In item {item[2]} of {given}, {verb[0].lower()}{verb[1:]} {setting}"
        return f"{verb} {self.override(value)}"

    def error(self, problem: str, suggestion: str = "", value: object = UNSET) -> "ConfigError":
        """Returns the error of the setting; see `ConfigError`."""
        return ConfigError(problem, suggestion, path=self, value=value)

    def invalid(self, value: object, problem: str, *examples: object) -> "ConfigError":
        """Returns the error of an invalid value; it suggests the first example.

        Example:
            >>> print((ConfigPath("optimizer") / "lr").invalid(-1.0, "must be above 0", 0.001))
            optimizer.lr=-1.0 must be above 0. Use for example optimizer.lr=0.001
        """
        return self.error(problem, self.suggest(examples[0]) if examples else "", value)

    def required(self) -> "ConfigError":
        """Returns the error of a setting that has no value.

        Example:
            >>> print((ConfigPath("optimizer") / "lr").required())
            optimizer.lr is required. Set optimizer.lr=VALUE
        """
        return self.error("is required", self.suggest(Placeholder("VALUE"), "Set"))

    def unknown(
        self, value: object, names: Iterable[str], kind: str = "a setting"
    ) -> "ConfigError":
        """Returns the error of an unknown name; it suggests the most similar known one.

        Example:
            >>> print((ConfigPath("optimizer") / "lrr").unknown(0.01, ["lr", "betas"]))
            optimizer.lrr=0.01 is not a setting. Use for example optimizer.lr=0.01
        """
        names = list(names)
        close = nearest(self.field.rpartition(".")[2], names, 1)
        if not close:
            return self.error(f"is not {kind}", f"Use one of {', '.join(names)}", value)
        parent = replace(self, field=self.field.rpartition(".")[0])
        return self.error(f"is not {kind}", (parent / close[0]).suggest(value), value)


class ConfigError(ValueError, CompactHydraException):
    """An invalid setting.

    Hydra 1.3 prints a `CompactHydraException` as its message, without a traceback.

    Args:
        problem: Why it cannot work: a predicate of `path`, or a whole sentence without one.
        suggestion: What to do (default: empty).
        path: The setting (default: None, the problem does not belong to one setting).
        value: The given value (default: none).

    Example:
        >>> path = ConfigPath("optimizer") / "lr"
        >>> print(ConfigError("must be above 0", "Use optimizer.lr=0.001", path=path, value=-1))
        optimizer.lr=-1 must be above 0. Use optimizer.lr=0.001
    """

    def __init__(
        self,
        problem: str,
        suggestion: str = "",
        *,
        path: ConfigPath | None = None,
        value: object = UNSET,
    ) -> None:
        super().__init__(problem, suggestion)
        self.problem = problem
        self.suggestion = suggestion
        self.path = path
        self.value = value

    def __str__(self) -> str:
        sentence = self.problem
        if self.path is not None:
            is_given = self.value is not UNSET
            given = self.path.assignment(self.value) if is_given else self.path.name
            sentence = f"{given} {sentence}"
        if not self.suggestion:
            return sentence
        return f"{sentence}{'' if sentence.endswith(('?', '.')) else '.'} {self.suggestion}"

    def __repr__(self) -> str:
        """Returns the message: Hydra's `instantiate` quotes an error by its repr."""
        return str(self)


def nearest(name: str, names: Iterable[str], count: int, cutoff: float = 0.6) -> list[str]:
    """Returns the names most similar to `name`, the most similar first.

    Example:
        >>> nearest("beta", ["lr", "betas"], 1)
        ['betas']
    """
    return difflib.get_close_matches(name, list(names), count, cutoff)


def format_override(key: str, value: object) -> str:
    """Returns a Hydra override, quoted for a shell.

    Example:
        >>> print(format_override("optimizer.betas", [0.9, 0.95]))
        'optimizer.betas=[0.9,0.95]'
    """
    return ConfigPath(key).override(value)


def format_value(value: object) -> str:
    """Returns a value in the syntax of Hydra's command line.

    Example:
        >>> print(format_value({"match": "*.head.*", "betas": [0.9, None], "fused": True}))
        {match:*.head.*,betas:[0.9,null],fused:true}
        >>> print(format_value("a (b)"))
        "a (b)"
    """
    value = _to_plain(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{format_value(each)}' for key, each in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(format_value, value))}]"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z0-9_/\-.+*?%$@|]+", value):
        # Within quotes, Hydra reads a backslash literally, except before a quote.
        escaped = re.sub(r'(\\*)("|$)', lambda run: 2 * run[1] + run[2].replace('"', r"\""), value)
        # An override is one line.
        return '"' + escaped.replace("\n", "\\n") + '"'
    return str(value)


def _to_plain(value: object) -> Any:
    """Converts enums, dataclasses and tuples in a value to plain types."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _to_plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(each) for each in value]
    return value
