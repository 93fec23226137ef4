"""Reads the optimizer states and weights of a checkpoint."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lightning_adam.config.errors import ConfigError
from lightning_adam.optim.resume import optimizer_class
from lightning_adam.reports.inspection.unpickling import Unknown, load

State = Mapping[str, Any]
MODULES = ("current_model_state", "state_dict", "model", "model_state_dict", "net", "network")
"""Common names of a module's state. With weight averaging, Lightning stores the trained weights
under the first name and their average under the second."""


class Checkpoint(NamedTuple):
    """The optimizer states and weights of a file."""

    path: Path
    title: str
    """The kind of the file and the progress of its run."""
    step: int | None
    """Lightning's global step; None if it is not stored."""
    optimizers: dict[str, State]
    """The state_dict of each optimizer by name, which is empty for a single one."""
    weights: dict[str, dict[str, Tensor]]
    """The states of modules by their names in the file."""
    optimizer_class: str = ""
    """The class of the optimizer if AdamMixin has recorded it, otherwise empty."""
    has_schedule: bool = False


def read(path: Path) -> Checkpoint:
    """Reads a file of Lightning or `torch.save` without executing code in it.

    Args:
        path: The file.

    Raises:
        ConfigError: If the file does not exist, cannot be read, or has no optimizer state.
    """
    content = _load(path)
    if not isinstance(content, Mapping):
        name = content.__name__ if isinstance(content, Unknown) else type(content).__name__
        raise ConfigError(
            f"{path} contains an object of class {name}, not a checkpoint or a state_dict",
            "Save the state with torch.save(optimizer.state_dict(), path)",
        )
    optimizers = _optimizers(content)
    if not optimizers:
        raise ConfigError(
            f"{path} has no optimizer state, only {', '.join(map(str, content))}",
            "Save it with ModelCheckpoint(save_weights_only=False), or with torch.save({'model':"
            " model.state_dict(), 'optimizer': optimizer.state_dict()}, path)",
        )
    step = content.get("global_step")
    return Checkpoint(
        path=path,
        title=_title(content),
        step=step if isinstance(step, int) else None,
        optimizers=optimizers,
        weights=_weights(content),
        optimizer_class=optimizer_class(
            [group for each in optimizers.values() for group in each["param_groups"]]
        ),
        has_schedule=bool(content.get("lr_schedulers")),
    )


def _load(path: Path) -> Any:
    if path.is_dir():
        raise ConfigError(
            f"{path} is a folder, the checkpoint of a sharded strategy",
            f"Run python -m lightning.pytorch.utilities.consolidate_checkpoint {path}, then"
            f" lightning-adam inspect {path}.consolidated",
        )
    try:
        return load(path)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} does not exist",
            "Pass a checkpoint, such as checkpoints/last.ckpt of ModelCheckpoint(save_last=True)",
        ) from error
    except Exception as error:
        # torch and pickle raise many types of errors for a damaged file.
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{path} cannot be read: it is damaged, or not a file of torch.save ({cause[:80]})",
            "Use another checkpoint of the run",
        ) from error


def _optimizers(content: State) -> dict[str, State]:
    if _is_optimizer_state(content):
        return {"": content}
    stored = content.get("optimizer_states")
    found = enumerate(stored) if isinstance(stored, list) else _entries(content)
    states = {str(name): each for name, each in found if _is_optimizer_state(each)}
    return states if len(states) > 1 else dict(zip([""], states.values(), strict=False))


def _entries(content: State) -> Iterator[tuple[str, Any]]:
    """Yields the entries of a file, and the items of its lists."""
    for name, each in content.items():
        yield str(name), each
        for index, item in enumerate(each if isinstance(each, list | tuple) else ()):
            yield f"{name}.{index}", item


def _is_optimizer_state(state: Any) -> bool:
    if not isinstance(state, Mapping):
        return False
    return isinstance(state.get("state"), Mapping) and isinstance(state.get("param_groups"), list)


def _weights(content: State) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name, state in content.items():
        if isinstance(state, Mapping) and not _is_optimizer_state(state):
            tensors = {str(key): each for key, each in state.items() if isinstance(each, Tensor)}
            if tensors:
                found[str(name)] = tensors
    # With weight averaging, only the first state has the weights that the optimizer has updated.
    return {MODULES[0]: found[MODULES[0]]} if MODULES[0] in found else found


def _title(content: State) -> str:
    version = content.get("pytorch-lightning_version")
    kind = f"a checkpoint of Lightning {version}" if version else "a file of torch.save"
    counts = [
        f"{key} {content[key]}"
        for key in ("epoch", "global_step")
        if isinstance(content.get(key), int)
    ]
    return ", ".join([kind, *counts])
