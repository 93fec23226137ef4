"""Adapters for optimizers of other libraries, which name their settings and state differently.

A library is only imported when one of its optimizers is measured. The names are those of
torch-optimi 0.3.3, schedulefree 1.4.1, bitsandbytes 0.50.2 and heavyball 3.2.1. torchao 0.18.0 has
the names of torch.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from lightning_adam.statistics.columns import Capabilities
from lightning_adam.statistics.sharding import dtensor_types, unwrap_optimizer

Group = Mapping[str, Any]
State = Mapping[str, Any]
BOTH_MOMENTS = Capabilities.FIRST_MOMENT | Capabilities.SECOND_MOMENT


class Library(NamedTuple):
    """Converts the groups and states of a library's optimizers to the names of torch's Adam."""

    group: Callable[[Group], Group] = lambda group: group
    state: Callable[[Optimizer, State], State] = lambda _, state: state
    provides: Callable[[Optimizer], Capabilities] = lambda _: Capabilities.ALL & ~Capabilities.STEP
    """The capabilities at most; the state shows whether moments are missing or quantized."""


def _optimi_group(group: Group) -> Group:
    betas = [group[name] for name in ("beta1", "beta2", "beta3") if name in group]
    return {**group, "betas": betas} if betas else group


def _optimi_provides(optimizer: Optimizer) -> Capabilities:
    """Without STORAGE: moments are bias-corrected, so that they do not decay by a fixed beta."""
    is_overwritten = any(
        _optimi_overwrites(group, optimizer.state.get(parameter, {}))
        for group in optimizer.param_groups
        for parameter in group["params"]
    )
    return BOTH_MOMENTS if is_overwritten else BOTH_MOMENTS | Capabilities.GRADIENT


def _optimi_overwrites(group: Group, state: State) -> bool:
    """Whether the step overwrites gradients, as foreach and Kahan summation do without Triton."""
    is_decoupled = group.get("decouple_wd", True) or group["decouple_lr"]
    is_decay_added = group["weight_decay"] > 0 and not is_decoupled
    is_compensated = isinstance(state.get("kahan_comp"), Tensor)
    return not group["triton"] and bool(group["foreach"] or is_decay_added or is_compensated)


def _schedulefree_group(group: Group) -> Group:
    lr = group.get("scheduled_lr", group.get("lr"))
    return {**group, "lr": lr, "step": group.get("k")}


def _schedulefree_state(optimizer: Optimizer, state: State) -> State:
    """Returns `z` as the first moment, which is not measured: there is none."""
    return {**state, "exp_avg": state.get("z")}


def _schedulefree_provides(optimizer: Optimizer) -> Capabilities:
    """Without GRADIENT: the step divides the gradients in place."""
    return Capabilities.SECOND_MOMENT | Capabilities.STORAGE


def _bitsandbytes_state(optimizer: Optimizer, state: State) -> State:
    """Renames the moments, which depend on the optimizer."""
    name = getattr(optimizer, "optimizer_name", "")
    moments = {"adam": "12", "lamb": "12", "lion": "1"}.get(name, "")
    named = {"step": state.get("step")}
    for number, moment in zip(moments, ("exp_avg", "exp_avg_sq"), strict=False):
        named[moment] = state.get(f"state{number}")
        if f"qmap{number}" in state:
            codes, absmax, qmap = (state[f"{each}{number}"] for each in ("state", "absmax", "qmap"))
            named[moment] = Blockwise(codes, absmax, qmap)
    return named


class Blockwise(NamedTuple):
    """A blockwise quantized moment of bitsandbytes, in 8 bits."""

    codes: Tensor
    absmax: Tensor
    qmap: Tensor

    @property
    def shape(self) -> Sequence[int]:
        """The shape of the parameter."""
        return self.codes.shape

    def dequantize(self) -> Tensor:
        """Returns the moment in float32."""
        functional = import_module("bitsandbytes.functional")
        numbers: Tensor = functional.dequantize_blockwise(
            self.codes, absmax=self.absmax, code=self.qmap, blocksize=256
        )
        return numbers


LIBRARIES = {
    "bitsandbytes": Library(state=_bitsandbytes_state),
    "optimi": Library(group=_optimi_group, provides=_optimi_provides),
    "schedulefree": Library(_schedulefree_group, _schedulefree_state, _schedulefree_provides),
}
"""The libraries by import name."""


def library_of(optimizer: Optimizer) -> Library | None:
    """Returns the library of an optimizer or of its base classes; None if torch's names apply.

    Args:
        optimizer: The optimizer.

    Example:
        >>> import torch
        >>> library_of(torch.optim.Adam([torch.zeros(2)])) is None
        True
    """
    kinds = type(unwrap_optimizer(optimizer)).__mro__
    packages = (kind.__module__.partition(".")[0] for kind in kinds)
    return next((LIBRARIES[each] for each in packages if each in LIBRARIES), None)


def groups_of(optimizer: Optimizer) -> Sequence[Group]:
    """Returns the parameter groups with the names of torch's Adam.

    Args:
        optimizer: The optimizer.

    Example:
        >>> import torch
        >>> groups_of(torch.optim.Adam([torch.zeros(2)]))[0]["betas"]
        (0.9, 0.999)
    """
    library = library_of(optimizer)
    if library is None:
        return optimizer.param_groups
    return [library.group(group) for group in optimizer.param_groups]


def reader_of(optimizer: Optimizer) -> Callable[[Tensor, State], State]:
    """Returns a function that reads the state of a parameter with the names of torch's Adam.

    Args:
        optimizer: The optimizer.

    Returns:
        A function of the parameter and a default. It adds no state for a parameter without one.

    Example:
        >>> import torch
        >>> weight = torch.zeros(2)
        >>> reader_of(torch.optim.Adam([weight]))(weight, {})
        {}
    """
    library, unwrapped = library_of(optimizer), unwrap_optimizer(optimizer)
    if library is None:
        return unwrapped.state.get
    read = library.state
    return lambda parameter, nothing: read(unwrapped, unwrapped.state.get(parameter, nothing))


def provides(optimizer: Optimizer, second_moments: Sequence[Any]) -> Capabilities:
    """Returns the capabilities of an optimizer with a step other than Adam's.

    Args:
        optimizer: The optimizer, right after its step.
        second_moments: The second moment of each tensor; None for a tensor without one.

    Example:
        >>> import torch
        >>> nadam = torch.optim.NAdam([torch.zeros(2)])
        >>> Capabilities.SECOND_MOMENT in provides(nadam, [None])
        False
    """
    known = (library_of(optimizer) or Library()).provides(unwrap_optimizer(optimizer))
    if any(each is None for each in second_moments):
        known &= ~(Capabilities.SECOND_MOMENT | Capabilities.STORAGE)
    if any(map(is_quantized, second_moments)):
        known &= ~Capabilities.STORAGE
    return known


def is_quantized(moment: Any) -> bool:
    """Returns whether a moment has to be dequantized to be read.

    Args:
        moment: A moment, or None.

    Example:
        >>> import torch
        >>> is_quantized(torch.zeros(2)), is_quantized(Blockwise(*torch.zeros(3, 2)))
        (False, True)
    """
    part = moment.to_local() if isinstance(moment, dtensor_types()) else moment
    return getattr(type(part), "dequantize", Tensor.dequantize) is not Tensor.dequantize


def dequantize(moment: Any) -> Any:
    """Returns a moment, in float32 if it is quantized.

    Args:
        moment: A moment, or None.

    Example:
        >>> dequantize(None) is None
        True
    """
    return moment.dequantize() if is_quantized(moment) else moment


def takes_gradients(optimizer: Optimizer) -> bool:
    """Returns whether the step removes the gradients, as in heavyball.

    Args:
        optimizer: The optimizer.

    Example:
        >>> import torch
        >>> takes_gradients(torch.optim.Adam([torch.zeros(2)]))
        False
    """
    return bool(getattr(optimizer, "consume_grad", False))
