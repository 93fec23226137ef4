"""A file → what it holds: read without running anything that is in it, unless it is trusted."""

import dataclasses
import pickle
from collections.abc import Iterator, Mapping
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_adam.config.errors import ConfigError
from lightning_adam.optim.resume import optimizer_class

State = Mapping[str, Any]
ZIPPED = b"PK"
"""How a file of torch.save begins, unless it is older than torch 1.6."""
PLAIN = ("builtins.", "typing.", "collections.")
CONFIGS = ("omegaconf.base", "omegaconf.nodes", "omegaconf.dictconfig", "omegaconf.listconfig")
"""The modules of what a Hydra config among the hyperparameters is made of."""
SCHEMAS = tuple(
    f"lightning_adam.config.{name}" for name in ("monitor", "optimizer", "schedule", "tune")
)
"""The modules of the classes that a typed node of a preset names."""
BUILTINS = ("dict", "list", "tuple", "set", "int", "float", "bool", "str", "bytes")
WEIGHTS = ("current_model_state", "state_dict", "model", "model_state_dict", "net", "network")
"""What weights are called; the first is where Lightning's averaging keeps those it trains on."""


class Content(NamedTuple):
    """What a file holds."""

    title: str
    """What kind of file it is, and how far its training had come."""
    optimizers: dict[str, State]
    """The optimizers' states, by name; the name of the only one is empty."""
    weights: dict[str, dict[str, Tensor]]
    """The states of modules, by the name that each has in the file."""
    record: str = ""
    """The optimizer's class, where AdamMixin has written it."""
    has_schedule: bool = False
    path: Path = Path()


def read(path: Path, trust: bool = False) -> Content:
    """What a file of Lightning's or of `torch.save` holds.

    Args:
        path: The file.
        trust: Whether what is in it may run, as it does when a class of its own is unpickled
            (default: False).

    Raises:
        ConfigError: If there is no such file, it cannot be read, or has no state of an optimizer.
    """
    content = _load(path, trust)
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"{path} is neither a checkpoint nor an optimizer's state_dict, but of the class"
            f" {type(content).__name__}",
            "Save it with torch.save(optimizer.state_dict(), path)",
        )
    optimizers = _optimizers(content)
    if not optimizers:
        raise ConfigError(
            f"{path} has no optimizer state, only {', '.join(map(str, content))}",
            "Save it with ModelCheckpoint(save_weights_only=False), or with torch.save({'model':"
            " model.state_dict(), 'optimizer': optimizer.state_dict()}, path)",
        )
    return Content(
        title=_title(content),
        optimizers=optimizers,
        weights=_weights(content),
        record=optimizer_class([g for each in optimizers.values() for g in each["param_groups"]]),
        has_schedule=bool(content.get("lr_schedulers")),
        path=path,
    )


def _load(path: Path, trust: bool) -> Any:
    if path.is_dir():
        raise ConfigError(
            f"{path} is a folder, the checkpoint of a sharded strategy",
            f"Run python -m lightning.pytorch.utilities.consolidate_checkpoint {path}, then"
            f" lightning-adam inspect {path}.consolidated",
        )
    try:
        with path.open("rb") as file:
            is_zipped = file.read(len(ZIPPED)) == ZIPPED
        return _unpickled(path, trust, is_zipped)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} does not exist",
            "Pass a checkpoint, such as checkpoints/last.ckpt of ModelCheckpoint(save_last=True)",
        ) from error
    except ConfigError:
        raise
    except Exception as error:
        # Whatever a damaged file brings about: there is no end of what torch and pickle raise.
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{path} cannot be read: it is damaged, or not a file of torch.save ({cause[:80]})",
            "Use another checkpoint of the run",
        ) from error


def _unpickled(path: Path, trust: bool, is_zipped: bool) -> Any:
    # Mapped, a large file is read as far as it is looked at.
    options: dict[str, Any] = {"map_location": "cpu", "mmap": is_zipped}
    try:
        with torch.serialization.safe_globals(_configs(path) if is_zipped else []):
            return torch.load(path, weights_only=not trust, **options)
    except pickle.UnpicklingError as error:
        if trust or "global" not in str(error).lower():
            raise
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zipped else []
        named = [name for name in others if not name.startswith((*PLAIN, *CONFIGS, *SCHEMAS))]
        what = ", ".join(named[:3]) or "objects of its own"
        raise ConfigError(
            f"{path} holds {what}, and unpickling them may run any code",
            f"If you trust the file, run lightning-adam inspect --trust {path}",
        ) from error
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{path} holds objects of classes that cannot be imported here ({error})",
            "Run the command in the folder and the environment of the run",
        ) from error


def _configs(path: Path) -> list[Any]:
    """What a Hydra config is made of, as far as the file needs it: nothing in it runs."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        # What is wrong with the file, its loading says.
        return []
    found = []
    for name in names:
        module, _, kind = name.rpartition(".")
        is_plain = module == "builtins" and kind in BUILTINS
        is_plain |= name in ("typing.Any", "typing.List", "typing.Dict", "collections.defaultdict")
        if is_plain or module in (*CONFIGS, *SCHEMAS):
            each = getattr(import_module(module), kind, None)
            is_data = module in SCHEMAS and (dataclasses.is_dataclass(each) or _is_enum(each))
            if is_plain or is_data or (module in CONFIGS and isinstance(each, type)):
                found.append((each, name))
    return found


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _optimizers(content: State) -> dict[str, State]:
    if _is_of_optimizer(content):
        return {"": content}
    if "optimizer_states" in content:
        states = {str(index): each for index, each in enumerate(content["optimizer_states"])}
    else:
        states = {name: each for name, each in _flat(content) if _is_of_optimizer(each)}
    return states if len(states) > 1 else dict(zip([""], states.values(), strict=False))


def _flat(content: State) -> Iterator[tuple[str, Any]]:
    """What is in a file, and what is in its lists."""
    for name, each in content.items():
        yield str(name), each
        for index, one in enumerate(each if isinstance(each, list | tuple) else ()):
            yield f"{name}.{index}", one


def _is_of_optimizer(state: Any) -> bool:
    return isinstance(state, Mapping) and {"state", "param_groups"} <= {*state}


def _weights(content: State) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name in sorted(map(str, content), key=lambda each: each not in WEIGHTS):
        state = content.get(name)
        if isinstance(state, Mapping) and not _is_of_optimizer(state):
            tensors = {str(key): each for key, each in state.items() if isinstance(each, Tensor)}
            if tensors:
                found[name] = tensors
    if WEIGHTS[0] in found:
        # Beside what is trained on, the average is something else.
        return {WEIGHTS[0]: found[WEIGHTS[0]]}
    return found


def _title(content: State) -> str:
    version = content.get("pytorch-lightning_version")
    kind = f"a checkpoint of Lightning {version}" if version else "a file of torch.save"
    counts = [
        f"{name} {content[key]}"
        for key, name in (("epoch", "epoch"), ("global_step", "global_step"))
        if isinstance(content.get(key), int)
    ]
    return ", ".join([kind, *counts])
