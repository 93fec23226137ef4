"""Rebuilds an optimizer from its saved state and the weights."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Adam, Optimizer

from lightning_adam.config.errors import ConfigError
from lightning_adam.optim.param_groups import peak_lr
from lightning_adam.reports.inspection.checkpoint import MODULES, Checkpoint, State
from lightning_adam.reports.inspection.unpickling import Unknown
from lightning_adam.statistics.names import clean_name

ADAM_MODULE = "torch.optim.adam"
"""The module of torch's Adam and AdamW."""
ADAM_STATE = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
SETTINGS = {"lr", "initial_lr", "betas", "eps", "weight_decay", "params", "param_names"}
"""The fields of a group that are used."""
EMPTY = torch.zeros(0)
BUFFERS = ("running_mean", "running_var")
"""Buffers of batch norms, which have the same shape as the parameters."""


class UnknownAdam(Adam):
    """An optimizer with the moments of Adam but an unknown step."""

    def step(self, closure: Any = None) -> Any:
        """Raises NotImplementedError."""
        raise NotImplementedError


@dataclass(frozen=True)
class SavedOptimizer:
    """An optimizer of a checkpoint."""

    name: str
    """Empty if it is the only one."""
    class_name: str
    """The class, or a description if it is unknown."""
    optimizer: Optimizer
    """The optimizer with its parameters and state. Gradients are 0, as they are not saved.

    If the schedule has ended at a learning rate of 0, the learning rate is the peak.
    """
    groups: Sequence[Mapping[str, Any]]
    """The saved parameter groups."""
    weights: str
    """Name of the module state with the parameters; empty if unknown."""
    is_adam: bool
    """Whether the step is that of torch's Adam or AdamW."""
    is_recorded: bool
    """Whether AdamMixin has recorded the class."""
    notes: tuple[str, ...]
    """Sentences about missing information."""


def saved_optimizers(checkpoint: Checkpoint) -> tuple[list[SavedOptimizer], list[str]]:
    """Returns the Adam-like optimizers of a checkpoint, and why others are not inspected.

    Args:
        checkpoint: The checkpoint.

    Raises:
        ConfigError: If there is no Adam-like optimizer.

    Example:
        >>> from pathlib import Path
        >>> weight = Parameter(torch.ones(3))
        >>> adam = Adam([weight], eps=1e-6)
        >>> weight.grad = torch.ones(3)
        >>> adam.step()
        >>> weights, states = {"model": {"weight": weight}}, {"": adam.state_dict()}
        >>> (saved,), _ = saved_optimizers(Checkpoint(Path(), "a file", None, states, weights))
        >>> saved.class_name, saved.weights, saved.optimizer.param_groups[0]["eps"]
        ('Adam', 'model', 1e-06)
    """
    saved, not_inspected = [], []
    for name, state in checkpoint.optimizers.items():
        reason = _unsupported_reason(state)
        if reason is None:
            saved.append(_saved_optimizer(name, state, checkpoint))
        else:
            not_inspected.append(f"optimizer {name}: {reason}" if name else reason)
    if not saved:
        raise ConfigError(f"{checkpoint.path}: {'; '.join(not_inspected)}")
    return saved, not_inspected


def _unsupported_reason(state: State) -> str | None:
    """Returns why a state cannot be inspected; None if it can."""
    entries = [each for each in state["state"].values() if isinstance(each, Mapping)]
    if not entries:
        return "the optimizer state is empty, before the first step. Use a later checkpoint"
    for values, names in [(entries, ADAM_STATE), (state["param_groups"], SETTINGS)]:
        for name, value in ((name, each.get(name)) for each in values for name in names):
            if isinstance(value, Unknown):
                return f"{name} is of class {value.__name__}, which cannot be read without its code"
    if not any(isinstance(each.get("exp_avg"), Tensor) for each in entries):
        keys = sorted({str(key) for each in entries for key in each})
        return f"not the state of an Adam-like optimizer: it has {', '.join(keys) or 'no tensors'}"
    if not all("betas" in group for group in state["param_groups"]):
        return "not the state of an Adam-like optimizer: its parameter groups have no betas"
    return None


def _saved_optimizer(name: str, state: State, checkpoint: Checkpoint) -> SavedOptimizer:
    entries, groups = state["state"], state["param_groups"]
    state_keys = {str(key) for entry in entries.values() for key in entry}
    # Among torch's optimizers with these moments, only Adam and AdamW have amsgrad.
    is_adam = state_keys <= ADAM_STATE and all("amsgrad" in group for group in groups)
    if checkpoint.optimizer_class:
        is_adam &= checkpoint.optimizer_class.startswith(ADAM_MODULE)
    is_decoupled = [group.get("decoupled_weight_decay") for group in groups]
    class_name = {True: "AdamW", False: "Adam"}.get(is_decoupled[0], "Adam or AdamW")
    if not is_adam:
        class_name = checkpoint.optimizer_class or "unknown, with Adam's moments"
    keys = [list(group["params"]) for group in groups]
    names = _names(groups)
    source, found, notes = _parameters(checkpoint.weights, keys, names, entries)
    if names is None and found:
        names = [[found[key].name if key in found else f"{key}" for key in own] for own in keys]
    tensors = {key: weight.tensor for key, weight in found.items()}
    without_state = sum(key not in entries for own in keys for key in own)
    if without_state:
        notes.append(f"Parameters without state, as they never had a gradient: {without_state}.")
    if is_adam and None in is_decoupled and any(group["weight_decay"] for group in groups):
        notes.append(
            "This version of torch did not save whether weight decay is decoupled. Statistics of"
            " weight decay are missing."
        )
    if any(float(group["lr"]) == 0 and float(peak_lr(group)) > 0 for group in groups):
        notes.append("The schedule has ended at lr 0. Updates and decay are shown at the peak lr.")
    elif checkpoint.has_schedule:
        notes.append(
            "Updates and decay are shown at the lr that the schedule has set for the next step."
        )
    return SavedOptimizer(
        name=name,
        class_name=class_name,
        optimizer=_optimizer(groups, keys, names, entries, tensors, is_adam),
        groups=groups,
        weights=source,
        is_adam=is_adam,
        is_recorded=bool(checkpoint.optimizer_class),
        notes=tuple(notes),
    )


def _names(groups: Sequence[State]) -> list[list[str]] | None:
    """Returns the names of the parameters, if the groups store them or use them as keys."""
    if all("param_names" in group for group in groups):
        return [[clean_name(name) for name in group["param_names"]] for group in groups]
    if all(isinstance(key, str) for group in groups for key in group["params"]):
        return [[clean_name(key) for key in group["params"]] for group in groups]
    return None


class Weight(NamedTuple):
    """A parameter in the state of a module."""

    name: str
    tensor: Tensor


def _parameters(
    weights: Mapping[str, Mapping[str, Tensor]],
    keys: Sequence[Sequence[Any]],
    names: Sequence[Sequence[str]] | None,
    entries: State,
) -> tuple[str, dict[Any, Weight], list[str]]:
    """Returns the name of the module state, the parameters by key in the optimizer, and notes.

    The name is empty if no state matches, or if several do.
    """
    found: dict[str, dict[Any, Weight]] = {}
    for source, tensors in weights.items():
        by_name = {clean_name(name): tensor for name, tensor in tensors.items()}
        if names is None:
            matched = _by_order(by_name, keys, entries)
        else:
            matched = _by_name(by_name, keys, names, entries)
        if matched is not None:
            found[source] = matched
    candidates = [source for source in MODULES if source in found] or [*found]
    if len(candidates) == 1:
        (source,) = candidates
        others = [each for each in found if each != source]
        notes = [f"The weights are those of {source}. {_join(others)} would also fit."]
        return source, found[source], notes if others else []
    reason = f": {_join(candidates)} fit equally well" if candidates else ""
    missing = "Statistics that depend on them are missing."
    return "", {}, [f"The weights are unknown{reason}. {missing}"]


def _join(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _by_name(
    tensors: Mapping[str, Tensor],
    keys: Sequence[Sequence[Any]],
    names: Sequence[Sequence[str]],
    entries: State,
) -> dict[Any, Weight] | None:
    found = {
        key: Weight(name, tensors[name])
        for own_keys, own_names in zip(keys, names, strict=True)
        for key, name in zip(own_keys, own_names, strict=True)
        if name in tensors
    }
    needed = {key for own in keys for key in own if key in entries}
    is_complete = needed <= {*found}
    fits = is_complete and all(found[key].tensor.shape == _shape(entries, key) for key in needed)
    return found if fits else None


def _by_order(
    tensors: Mapping[str, Tensor], keys: Sequence[Sequence[Any]], entries: State
) -> dict[Any, Weight] | None:
    """Matches tensors to the state by shape and order, if there is exactly one way.

    The parameters of a group are in the order of the module, but the groups may be in any order.
    """
    if len(keys) > 1 and any(key not in entries for own in keys for key in own):
        return None
    candidates = _distinct(tensors)
    found: dict[Any, Weight] = {}
    for own in keys:
        shapes = [_shape(entries, key) for key in own]
        possible = [each for each in candidates if None in shapes or each.tensor.shape in shapes]
        first = _first_indexes(shapes, [each.tensor.shape for each in possible])
        last = _first_indexes(shapes[::-1], [each.tensor.shape for each in possible[::-1]])
        if first is None or last is None:
            return None
        # If the earliest choice is the latest one, there is no other.
        if first != [len(possible) - 1 - index for index in last[::-1]]:
            return None
        found |= {key: possible[index] for key, index in zip(own, first, strict=True)}
    is_one_each = len({each.name for each in found.values()}) == len(found)
    return found if is_one_each else None


def _distinct(tensors: Mapping[str, Tensor]) -> list[Weight]:
    """Returns the tensors that may be parameters, with tied weights once."""
    found: dict[Any, Weight] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
            if not name.endswith(BUFFERS):
                found.setdefault(place, Weight(name, tensor))
    return list(found.values())


def _first_indexes(
    shapes: Sequence[torch.Size | None], candidates: Sequence[torch.Size]
) -> list[int] | None:
    """Returns the first indexes of candidates with the shapes in order."""
    indexes, start = [], 0
    for shape in shapes:
        while start < len(candidates) and shape is not None and candidates[start] != shape:
            start += 1
        if start == len(candidates):
            return None
        indexes.append(start)
        start += 1
    return indexes


def _shape(entries: State, key: Any) -> torch.Size | None:
    moment = entries.get(key, {}).get("exp_avg")
    return moment.shape if isinstance(moment, Tensor) else None


def _optimizer(
    groups: Sequence[State],
    keys: Sequence[Sequence[Any]],
    names: Sequence[Sequence[str]] | None,
    entries: State,
    tensors: Mapping[Any, Tensor],
    is_adam: bool,
) -> Optimizer:
    like = {
        key: tensors.get(key, entries.get(key, {}).get("exp_avg", EMPTY))
        for own in keys
        for key in own
    }
    zeros = _zeros(like.values())
    parameters = {
        key: Parameter(each if key in tensors else _zeros_like(each, zeros))
        for key, each in like.items()
    }
    for key, parameter in parameters.items():
        if key in entries:
            parameter.grad = _zeros_like(parameter, zeros)
    optimizer_class = Adam if is_adam else UnknownAdam
    optimizer = optimizer_class([{"params": [parameters[key] for key in own]} for own in keys])
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        group.update({name: each for name, each in saved.items() if name != "params"})
        group["lr"] = group["lr"] if float(group["lr"]) else peak_lr(saved)
        if is_adam and "decoupled_weight_decay" not in saved:
            # Statistics of decay are NaN, because the kind of decay is unknown.
            group["weight_decay"] = group["weight_decay"] and math.nan
        if names is not None:
            group["param_names"] = list(names[index])
    for key, parameter in parameters.items():
        if key in entries:
            optimizer.state[parameter] = dict(entries[key])
    return optimizer


def _zeros(tensors: Iterable[Tensor]) -> dict[torch.dtype, Tensor]:
    """Returns for each dtype as many zeros as the largest tensor has, to be shared."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = max(sizes.get(tensor.dtype, 0), tensor.numel())
    return {dtype: torch.zeros(size, dtype=dtype) for dtype, size in sizes.items()}


def _zeros_like(tensor: Tensor, zeros: Mapping[torch.dtype, Tensor]) -> Tensor:
    """Returns zeros with the shape of a tensor, and its strides if it has no gaps."""
    shape, strides = tensor.shape, tensor.stride()
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if tensor.numel() and last < tensor.numel():
        return zeros[tensor.dtype].as_strided(shape, strides)
    return zeros[tensor.dtype][: tensor.numel()].view(shape)
