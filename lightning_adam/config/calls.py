"""The error of a `_target_` that cannot be called: which argument is at fault, and what to set."""

import functools
import inspect
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from lightning_adam.config.errors import UNSET, ConfigError, ConfigPath, Placeholder
from lightning_adam.config.parsing import target_name
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
"""What messages of torch call an argument, where it is not the argument's name."""

STEPS = ("total_steps", "T_max")
"""Arguments of schedulers that are the number of steps in the run."""


def call_error(
    target: functools.partial[Any], path: ConfigPath, arguments: Sequence[Any], error: Exception
) -> ConfigError:
    """Turns the error of a call into that of the argument at fault, as far as its text tells.

    Args:
        target: What was called, with the arguments from the config.
        path: Place of the config.
        arguments: The other arguments of the call.
        error: What it raised.

    Example:
        >>> path = ConfigPath("scheduler", keys=frozenset(["_target_"]))
        >>> target = functools.partial(lambda optimizer, T_max: None)
        >>> print(call_error(target, path, [0], TypeError("missing")).suggestion)
        Set +scheduler.T_max=total_steps
    """
    name = target_name(target)
    cause = textwrap.shorten(str(error.args[0] if error.args else error), 200, placeholder=" …")
    parameters = _parameters(target)
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
    # Built children cannot be shown.
    given = [each for each in given if each != "schedulers"] or given
    if not given:
        given = [each for each in parameters if _works_without(target, each, arguments)]
    if not given:
        described = f"{type(error).__name__}: {cause}" if cause else type(error).__name__
        places = [(path / each).name for each in target.keywords]
        return (path / "_target_").error(
            f"cannot be called with these arguments: {described}",
            f"Change {' or '.join(places)}" if places else "",
            value=name,
        )
    argument = max(given, key=len)
    place, value = path / argument, target.keywords[argument]
    problem = f"is not accepted by {name}: {cause}"
    default = parameters[argument].default
    if default is inspect.Parameter.empty or default == value:
        return place.error(problem, place.suggest(Placeholder("VALUE"), "Set"), value)
    return place.invalid(value, problem, default)


def _parameters(target: functools.partial[Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a target that have a name of their own; none if it does not tell."""
    try:
        parameters = inspect.signature(target.func).parameters
    except (TypeError, ValueError):
        return {}
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: each for name, each in parameters.items() if each.kind not in variable}


def _bound(target: functools.partial[Any], arguments: Sequence[Any]) -> set[str]:
    """The parameters that a call gives a value."""
    try:
        signature = inspect.signature(target.func)
        bound = signature.bind_partial(*target.args, *arguments, **target.keywords)
    except (TypeError, ValueError):
        return set(target.keywords)
    return set(bound.arguments)


def _is_named(argument: str, message: str) -> bool:
    """Whether a message speaks of an argument."""
    words = [re.escape(argument), re.escape(argument).replace("_", " ")]
    if argument in TERMS:
        words.append(TERMS[argument])
    return re.search(rf"(?i)\b({'|'.join(words)})\b", message) is not None


def _works_without(target: functools.partial[Any], name: str, arguments: Sequence[Any]) -> bool:
    """Whether the call succeeds with the default in the place of a given argument."""
    keywords = {key: value for key, value in target.keywords.items() if key != name}
    if len(keywords) == len(target.keywords):
        return False
    try:
        target.func(*target.args, *arguments, **keywords)
    except Exception:
        return False
    return True


def _required(path: ConfigPath, names: Sequence[str], problem: str) -> ConfigError:
    """The error of arguments without a value, the first of which is named."""
    values = {name: TOTAL_STEPS if name in STEPS else Placeholder("VALUE") for name in names}
    suggestion = (path / names[0]).suggest(values[names[0]], "Set")
    others = [(path / name).override(values[name]) for name in names[1:]]
    return (path / names[0]).error(problem, " ".join([suggestion, *others]), UNSET)
