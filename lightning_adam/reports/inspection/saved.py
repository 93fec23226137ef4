"""A saved state → an optimizer with its parameters, which has taken its last step already."""

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
from lightning_adam.reports.inspection.files import WEIGHTS, Content, State
from lightning_adam.statistics.names import clean_name

ADAMS = "torch.optim.adam"
"""Where torch has Adam and AdamW."""
ADAMS_STATE = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
NOTHING = torch.zeros(0)
BUFFERS = ("running_mean", "running_var")
"""What a batch norm has beside its parameters, of the same shape."""


class OtherStep(Adam):
    """Stands for an optimizer with Adam's moments, of whose step nothing is known."""

    def step(self, closure: Any = None) -> Any:
        """There is none to take."""
        raise NotImplementedError


@dataclass(frozen=True)
class Saved:
    """One optimizer of a file."""

    name: str
    """What tells it from others; empty if it is the only one."""
    kind: str
    """Its class, or what can be told of it."""
    optimizer: Optimizer
    """With its parameters and their state, and gradients of zero, which are not those that it had.

    The learning rate is the peak's where the schedule has come to 0.
    """
    groups: Sequence[Mapping[str, Any]]
    """As they were saved."""
    weights: str
    """Where the file has its parameters; empty if they are not known."""
    is_adams: bool
    """Whether its step is Adam's or AdamW's."""
    is_recorded: bool
    """Whether AdamMixin has built it."""
    notes: tuple[str, ...]
    """What was not found."""


def optimizers_of(content: Content) -> tuple[list[Saved], list[str]]:
    """The optimizers of Adam's family, and what is said of the others.

    Args:
        content: What a file holds.

    Raises:
        ConfigError: If there is none.

    Example:
        >>> weight = Parameter(torch.ones(3))
        >>> adam = Adam([weight], eps=1e-6)
        >>> weight.grad = torch.ones(3)
        >>> adam.step()
        >>> content = Content("a file", {"": adam.state_dict()}, {"model": {"weight": weight}})
        >>> (saved,), others = optimizers_of(content)
        >>> saved.kind, saved.weights, saved.optimizer.param_groups[0]["eps"]
        ('Adam', 'model', 1e-06)
    """
    saved, others = [], []
    for name, state in content.optimizers.items():
        reason = _unlike_adam(state)
        if reason is None:
            saved.append(_saved(name, state, content))
        else:
            others.append(f"optimizer {name}: {reason}" if name else reason)
    if not saved:
        raise ConfigError(f"{content.path}: {'; '.join(others)}")
    return saved, others


def _unlike_adam(state: State) -> str | None:
    """Why a state is not that of an Adam-like optimizer; None if it is."""
    entries = [each for each in state["state"].values() if isinstance(each, Mapping)]
    if not entries:
        return "the optimizer state is empty, before the first step. Use a later checkpoint"
    names = sorted({str(key) for each in entries for key in each})
    has_moments = any(isinstance(each.get("exp_avg"), Tensor) for each in entries)
    if not has_moments or not all("betas" in group for group in state["param_groups"]):
        keeps = ", ".join(names) or "no numbers"
        return f"not the state of an Adam-like optimizer: it has {keeps}"
    return None


def _saved(name: str, state: State, content: Content) -> Saved:
    entries, groups = state["state"], state["param_groups"]
    keys = {str(key) for entry in entries.values() for key in entry}
    # Of torch's optimizers with such moments, only Adam and AdamW can be asked for amsgrad.
    is_adams = keys <= ADAMS_STATE and all("amsgrad" in group for group in groups)
    if content.record:
        is_adams &= content.record.startswith(ADAMS)
    told = [group.get("decoupled_weight_decay") for group in groups]
    kind = {True: "AdamW", False: "Adam"}.get(told[0], "Adam or AdamW")
    if not is_adams:
        kind = content.record or "an optimizer with Adam's moments, whose step is not known"
    keys_of_groups = [list(group["params"]) for group in groups]
    names = _names(groups)
    source, found = _parameters(content.weights, keys_of_groups, names, entries)
    if names is None and found:
        names = [
            [found[key].name if key in found else f"{key}" for key in own] for own in keys_of_groups
        ]
    tensors = {key: weight.tensor for key, weight in found.items()}
    notes = []
    if not source:
        notes.append("The weights are not known: what depends on them is left out.")
    without = sum(key not in entries for group in keys_of_groups for key in group)
    if without:
        notes.append(f"{without} parameters have no state: they never had a gradient.")
    if is_adams and None in told and any(group["weight_decay"] for group in groups):
        notes.append("Its torch did not save whether decay is decoupled: decay is left out.")
    over = [group for group in groups if float(group["lr"]) == 0 and float(peak_lr(group)) > 0]
    if over:
        notes.append("The schedule has come to 0: updates and decay are told at the peak's lr.")
    elif content.has_schedule:
        notes.append("lr is the next step's, as the schedule has set it; so are updates and decay.")
    return Saved(
        name=name,
        kind=kind,
        optimizer=_optimizer(groups, keys_of_groups, names, entries, tensors, is_adams),
        groups=groups,
        weights=source,
        is_adams=is_adams,
        is_recorded=bool(content.record),
        notes=tuple(notes),
    )


def _names(groups: Sequence[State]) -> list[list[str]] | None:
    """The parameters' names, where the groups have them or go by them."""
    if all("param_names" in group for group in groups):
        return [[clean_name(name) for name in group["param_names"]] for group in groups]
    if all(isinstance(key, str) for group in groups for key in group["params"]):
        return [[clean_name(key) for key in group["params"]] for group in groups]
    return None


class Weight(NamedTuple):
    """A parameter, as a module's state has it."""

    name: str
    tensor: Tensor


def _parameters(
    weights: Mapping[str, Mapping[str, Tensor]],
    keys: Sequence[Sequence[Any]],
    names: Sequence[Sequence[str]] | None,
    entries: State,
) -> tuple[str, dict[Any, Weight]]:
    """Where the file has the parameters, and each by its key in the state, if they are certain."""
    found: dict[str, dict[Any, Weight]] = {}
    for source, tensors in weights.items():
        by_name = {clean_name(name): tensor for name, tensor in tensors.items()}
        if names is None:
            matched = _by_order(by_name, keys, entries)
        else:
            matched = _by_name(by_name, keys, names, entries)
        if matched is not None:
            found[source] = matched
    usual = [source for source in WEIGHTS if source in found]
    if names is None and len(found) > 1 and not usual:
        # Two networks of the same shapes, say: which of them it trains is not known.
        return "", {}
    source = (usual or [*found, ""])[0]
    return source, found.get(source, {})


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
    are_there = needed <= {*found}
    fit = are_there and all(found[key].tensor.shape == _shape(entries, key) for key in needed)
    return found if fit else None


def _by_order(
    tensors: Mapping[str, Tensor], keys: Sequence[Sequence[Any]], entries: State
) -> dict[Any, Weight] | None:
    """The tensors of the state's shapes in the state's order, if there is one way to choose them.

    A group has its parameters in the module's order, but groups need not be in that order.
    """
    if len(keys) > 1 and any(key not in entries for own in keys for key in own):
        return None
    candidates = _distinct(tensors)
    found: dict[Any, Weight] = {}
    for own in keys:
        shapes = [_shape(entries, key) for key in own]
        possible = [each for each in candidates if None in shapes or each.tensor.shape in shapes]
        first = _first_places(shapes, [each.tensor.shape for each in possible])
        last = _first_places(shapes[::-1], [each.tensor.shape for each in possible[::-1]])
        if first is None or last is None:
            return None
        # If the earliest choice is the latest one, there is no other.
        if first != [len(possible) - 1 - place for place in last[::-1]]:
            return None
        found |= {key: possible[place] for key, place in zip(own, first, strict=True)}
    is_one_each = len({each.name for each in found.values()}) == len(found)
    return found if is_one_each else None


def _distinct(tensors: Mapping[str, Tensor]) -> list[Weight]:
    """What may be a parameter; of weights that are tied, the first."""
    found: dict[Any, Weight] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
            if not name.endswith(BUFFERS):
                found.setdefault(place, Weight(name, tensor))
    return list(found.values())


def _first_places(
    shapes: Sequence[torch.Size | None], among: Sequence[torch.Size]
) -> list[int] | None:
    """Where each of the shapes, in their order, is first found among others."""
    places, start = [], 0
    for shape in shapes:
        while start < len(among) and shape is not None and among[start] != shape:
            start += 1
        if start == len(among):
            return None
        places.append(start)
        start += 1
    return places


def _shape(entries: State, key: Any) -> torch.Size | None:
    moment = entries.get(key, {}).get("exp_avg")
    return moment.shape if isinstance(moment, Tensor) else None


def _optimizer(
    groups: Sequence[State],
    keys: Sequence[Sequence[Any]],
    names: Sequence[Sequence[str]] | None,
    entries: State,
    tensors: Mapping[Any, Tensor],
    is_adams: bool,
) -> Optimizer:
    like = {
        key: tensors.get(key, entries.get(key, {}).get("exp_avg", NOTHING))
        for own in keys
        for key in own
    }
    zeros = _zeros(like.values())
    parameters = {
        key: Parameter(each if key in tensors else _like(each, zeros)) for key, each in like.items()
    }
    for key, parameter in parameters.items():
        if key in entries:
            parameter.grad = _like(parameter, zeros)
    chosen = Adam if is_adams else OtherStep
    optimizer = chosen([{"params": [parameters[key] for key in own]} for own in keys])
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        group.update({name: each for name, each in saved.items() if name != "params"})
        group["lr"] = group["lr"] if float(group["lr"]) else peak_lr(saved)
        if is_adams and "decoupled_weight_decay" not in saved:
            # Of which kind it is, is not known; NaN decays nothing.
            group["weight_decay"] = group["weight_decay"] and math.nan
        if names is not None:
            group["param_names"] = list(names[index])
    for key, parameter in parameters.items():
        if key in entries:
            optimizer.state[parameter] = dict(entries[key])
    return optimizer


def _zeros(tensors: Iterable[Tensor]) -> dict[torch.dtype, Tensor]:
    """Zeros for the largest of the tensors of each dtype, which all share."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = max(sizes.get(tensor.dtype, 0), tensor.numel())
    return {dtype: torch.zeros(size, dtype=dtype) for dtype, size in sizes.items()}


def _like(tensor: Tensor, zeros: Mapping[torch.dtype, Tensor]) -> Tensor:
    """Zeros of a tensor's shape, and its strides if it has no gaps: a kernel reads both alike."""
    shape, strides = tensor.shape, tensor.stride()
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if tensor.numel() and last < tensor.numel():
        return zeros[tensor.dtype].as_strided(shape, strides)
    return zeros[tensor.dtype][: tensor.numel()].view(shape)
