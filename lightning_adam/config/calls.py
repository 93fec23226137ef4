"""Errors of `_target_` calls: names the argument at fault and suggests a value."""

import functools
import inspect
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from lightning_adam.config.errors import UNSET, ConfigError, ConfigPath, Placeholder
from lightning_adam.config.parsing import parameters_of, target_name
from lightning_adam.config.schedule import TOTAL_STEPS

TERMS = {
    "lr": "learning rate",
    "eps": r"epsilon\d?",
    "betas": "beta parameter",
    "etas": "eta values",
    "start_factor": "starting multiplicative factor",
    "end_factor": "ending multiplicative factor",
    "min_lr": "min_lrs",
}
"""What torch's messages call an argument, where they do not use its name."""

STEP_COUNTS = ("total_steps", "T_max")
"""Scheduler arguments that mean the number of steps in the run."""


def call_error(
    target: functools.partial[Any], path: ConfigPath, arguments: Sequence[Any], error: Exception
) -> ConfigError:
    """Converts an exception of a call to a `ConfigError` that names the argument at fault.

    It names the target if neither the message nor further calls show which argument it is.

    Args:
        target: The callable, with the arguments from the config.
        path: Path of the config.
        arguments: The other arguments of the call.
        error: The exception.

    Example:
        >>> path = ConfigPath("scheduler", keys=frozenset(["_target_"]))
        >>> target = functools.partial(lambda optimizer, T_max: None)
        >>> print(call_error(target, path, [0], TypeError("missing")).suggestion)
        Set +scheduler.T_max=total_steps
    """
    name = target_name(target)
    cause = textwrap.shorten(str(error.args[0] if error.args else error), 200, placeholder=" …")
    parameters = {
        name: each
        for name, each in parameters_of(target).items()
        if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    }
    bound = _bound(target, arguments)
    missing = [
        each.name
        for each in parameters.values()
        if each.default is each.empty and each.name not in bound
    ]
    named = [each for each in parameters if _is_named(each, cause)]
    if isinstance(error, TypeError) and missing:
        return _required(path, missing, f"is required by {name}")
    if "total_steps" in named and "total_steps" not in bound:
        return _required(path, ["total_steps"], f"is required by {name}: {cause}")
    given = [each for each in named if each in target.keywords]
    # A list of schedulers that are already built cannot be shown.
    given = [each for each in given if each != "schedulers"] or given
    if not given:
        given = [each for each in parameters if _works_without(target, each, arguments)]
    if not given:
        described = f"{type(error).__name__}: {cause}" if cause else type(error).__name__
        names = [(path / each).name for each in target.keywords]
        return (path / "_target_").error(
            f"cannot be called with these arguments: {described}",
            f"Change {' or '.join(names)}" if names else "",
            value=name,
        )
    argument = max(given, key=len)
    setting, value = path / argument, target.keywords[argument]
    problem = f"is not accepted by {name}: {cause}"
    default = parameters[argument].default
    if default is inspect.Parameter.empty or default == value:
        return setting.error(problem, setting.suggest(Placeholder("VALUE"), "Set"), value)
    return setting.invalid(value, problem, default)


def _bound(target: functools.partial[Any], arguments: Sequence[Any]) -> set[str]:
    """Returns the names of the parameters that a call sets."""
    try:
        signature = inspect.signature(target.func)
        bound = signature.bind_partial(*target.args, *arguments, **target.keywords)
    except (TypeError, ValueError):
        return set(target.keywords)
    return set(bound.arguments)


def _is_named(argument: str, message: str) -> bool:
    """Returns whether a message mentions an argument."""
    words = [re.escape(argument), re.escape(argument).replace("_", " ")]
    if argument in TERMS:
        words.append(TERMS[argument])
    return re.search(rf"(?i)\b({'|'.join(words)})\b", message) is not None


def _works_without(target: functools.partial[Any], name: str, arguments: Sequence[Any]) -> bool:
    """Returns whether the call succeeds with the default of an argument that the config sets."""
    keywords = {key: value for key, value in target.keywords.items() if key != name}
    if len(keywords) == len(target.keywords):
        return False
    try:
        target.func(*target.args, *arguments, **keywords)
    except Exception:
        return False
    return True


def _required(path: ConfigPath, names: Sequence[str], problem: str) -> ConfigError:
    """Returns the error of missing arguments, which names the first one."""
    values = {name: TOTAL_STEPS if name in STEP_COUNTS else Placeholder("VALUE") for name in names}
    suggestion = (path / names[0]).suggest(values[names[0]], "Set")
    others = [(path / name).override(values[name]) for name in names[1:]]
    return (path / names[0]).error(problem, " ".join([suggestion, *others]), UNSET)
