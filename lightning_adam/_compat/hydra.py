"""Private names of Hydra, and its calls on the stack, as of 1.3.8 and 1.4.0rc3."""

import functools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

INSTANTIATE = "hydra._internal.instantiate._instantiate2"
JOB = "hydra.core.utils"


@dataclass(frozen=True)
class Call:
    """A running call of a `_target_` by `instantiate`."""

    path: str
    """Path of the node that is instantiated, in its config."""
    arguments: Mapping[str, Any]
    """The keyword arguments of the target."""
    config: Any
    """The config that was passed to `instantiate`."""
    given: Mapping[str, Any]
    """The keyword arguments that were passed to `instantiate` with the config."""


def running_call() -> Call | None:
    """Returns the innermost running call by `instantiate`; None without one."""
    called: Mapping[str, Any] | None = None
    for name, variables in _frames(INSTANTIATE):
        if name == "_call_target" and {"full_key", "kwargs"} <= set(variables):
            called = variables
        elif name == "instantiate" and called is not None:
            return Call(
                path=str(called["full_key"] or ""),
                arguments=called["kwargs"],
                config=variables.get("config"),
                given=variables.get("kwargs", {}),
            )
    return None


def app_config() -> DictConfig | None:
    """Returns the config of the app that is running in this thread; None without one."""
    configs = (variables["task_cfg"] for _, variables in _frames(JOB) if "task_cfg" in variables)
    config = next(configs, None)
    return config if isinstance(config, DictConfig) else None


def partial_key(node: Any) -> str:
    """Returns the path of the node from which Hydra built a partial; empty if it is unknown."""
    key = getattr(node, "_hydra_full_key", "") if isinstance(node, functools.partial) else ""
    return str(key or "")


def is_composed(config: Any) -> bool:
    """Returns whether Hydra composed a config, so that an override adds a key only with a `+`."""
    return OmegaConf.is_config(config) and bool(OmegaConf.is_struct(config))


def _frames(module: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the names and variables of a module's running functions, the innermost first."""
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        if frame.f_globals.get("__name__") == module:
            yield frame.f_code.co_name, frame.f_locals
