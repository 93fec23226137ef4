"""Optimizers of other libraries under the names of torch's Adam: one declaration a library.

A library is imported only when one of its optimizers is measured; the optimizer's class tells which
library it is. The names were seen in torch-optimi 0.3.3, schedulefree 1.4.1, bitsandbytes 0.50.2
and heavyball 3.2.1; torchao 0.18.0 uses torch's own.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from lightning_adam.statistics.columns import Capabilities
from lightning_adam.statistics.sharding import distributed_tensor, unwrap_optimizer

Group = Mapping[str, Any]
State = Mapping[str, Any]
BOTH_MOMENTS = Capabilities.FIRST_MOMENT | Capabilities.SECOND_MOMENT


class Library(NamedTuple):
    """How the names of a library's optimizers differ from torch's Adam, and what can be read."""

    group: Callable[[Group], Group] = lambda group: group
    state: Callable[[Optimizer, State], State] = lambda _, state: state
    provides: Callable[[Optimizer], Capabilities] = lambda _: Capabilities.ALL & ~Capabilities.STEP
    """At most: whether a moment is there, and quantized, is seen in the state."""


def _optimi_group(group: Group) -> Group:
    betas = [group[name] for name in ("beta1", "beta2", "beta3") if name in group]
    return {**group, "betas": betas} if betas else group


def _optimi_provides(optimizer: Optimizer) -> Capabilities:
    """Its moments are corrected for their bias: no one beta is what they decay by."""
    is_overwritten = any(
        _optimi_overwrites(group, optimizer.state.get(parameter, {}))
        for group in optimizer.param_groups
        for parameter in group["params"]
    )
    return BOTH_MOMENTS if is_overwritten else BOTH_MOMENTS | Capabilities.GRADIENT


def _optimi_overwrites(group: Group, state: State) -> bool:
    """Without Triton the gradients are what foreach and Kahan summation put their numbers in."""
    is_decoupled = group.get("decouple_wd", True) or group["decouple_lr"]
    is_decay_added = group["weight_decay"] > 0 and not is_decoupled
    is_compensated = isinstance(state.get("kahan_comp"), Tensor)
    return not group["triton"] and bool(group["foreach"] or is_decay_added or is_compensated)


def _schedulefree_group(group: Group) -> Group:
    lr = group.get("scheduled_lr", group.get("lr"))
    return {**group, "lr": lr, "step": group.get("k")}


def _schedulefree_state(optimizer: Optimizer, state: State) -> State:
    """It has no first moment; in its place stands what is not measured."""
    return {**state, "exp_avg": state.get("z")}


def _schedulefree_provides(optimizer: Optimizer) -> Capabilities:
    """Its step divides the gradients in place."""
    return Capabilities.SECOND_MOMENT | Capabilities.STORAGE


def _bitsandbytes_state(optimizer: Optimizer, state: State) -> State:
    """What is called the same in its other optimizers is something else."""
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
    """A moment of bitsandbytes in 8 bits, scaled by blocks."""

    codes: Tensor
    absmax: Tensor
    qmap: Tensor

    @property
    def shape(self) -> Sequence[int]:
        """That of the parameter."""
        return self.codes.shape

    def dequantize(self) -> Tensor:
        """Its numbers, in float32."""
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
"""The libraries by the name that they are imported by."""


def library_of(optimizer: Optimizer) -> Library | None:
    """The library whose optimizer it is, or is derived from; None if that has torch's names.

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
    """The parameter groups, with the settings' names of torch's Adam.

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
    """What reads a parameter's state, with the names of torch's Adam, and leaves none behind.

    Args:
        optimizer: The optimizer.

    Returns:
        A function of the parameter and of what stands for no state.

    Example:
        >>> import torch
        >>> weight = torch.zeros(2)
        >>> reader_of(torch.optim.Adam([weight]))(weight, {})
        {}
    """
    library, holding = library_of(optimizer), unwrap_optimizer(optimizer)
    if library is None:
        return holding.state.get
    read = library.state
    return lambda parameter, nothing: read(holding, holding.state.get(parameter, nothing))


def provides(optimizer: Optimizer, second_moments: Sequence[Any]) -> Capabilities:
    """What can be told of an optimizer whose step is its own.

    Args:
        optimizer: The optimizer, right after its step.
        second_moments: Those of its tensors; None where there is none.

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
    """Whether a moment has to be dequantized to be read.

    Args:
        moment: A moment, or None.

    Example:
        >>> import torch
        >>> is_quantized(torch.zeros(2)), is_quantized(Blockwise(*torch.zeros(3, 2)))
        (False, True)
    """
    part = moment.to_local() if isinstance(moment, distributed_tensor()) else moment
    return getattr(type(part), "dequantize", Tensor.dequantize) is not Tensor.dequantize


def dequantize(moment: Any) -> Any:
    """A moment's numbers, in float32 if it is quantized.

    Args:
        moment: A moment, or None.

    Example:
        >>> dequantize(None) is None
        True
    """
    return moment.dequantize() if is_quantized(moment) else moment


def takes_gradients(optimizer: Optimizer) -> bool:
    """Whether the step leaves no gradient behind, as heavyball's do.

    Args:
        optimizer: The optimizer.

    Example:
        >>> import torch
        >>> takes_gradients(torch.optim.Adam([torch.zeros(2)]))
        False
    """
    return bool(getattr(optimizer, "consume_grad", False))
