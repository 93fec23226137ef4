"""Optimizer → tensors to measure: what belongs to each parameter right after a step."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_adam.statistics.accumulators import Knowledge
from lightning_adam.statistics.foreign import (
    Group,
    groups_of,
    is_quantised,
    lets_know,
    numbers_of,
    reader_of,
)
from lightning_adam.statistics.names import clean_name, group_name
from lightning_adam.statistics.sharding import Counted, distributed_tensor, local, unwrap_optimizer


class Settings(NamedTuple):
    """The hyperparameters of a group, as the step used them; NaN where the group has none."""

    lr: Tensor | float
    beta1: Tensor | float
    beta2: Tensor | float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool


class Place(NamedTuple):
    """Where a parameter stands."""

    tensor: str
    """Its name."""
    layer: str
    """The module that owns it."""
    group: str


class Row(NamedTuple):
    """A parameter of the optimizer, whether or not it took part in its step."""

    place: Place
    settings: Settings
    has_amsgrad: bool


class TensorView(NamedTuple):
    """One parameter with all that its step depended on. The tensors are the optimizer's own.

    All are strided and real, and of the parameter's shape; of sharded ones, this rank's part.
    """

    place: Place
    settings: Settings
    position: int
    """Among all of the optimizer's parameters."""
    parameter: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor | None
    """None where the optimizer keeps none of the parameter's shape, or it decays by no one beta."""
    max_exp_avg_sq: Tensor | None
    """None without amsgrad."""
    step: Tensor | float
    """NaN where the optimizer counts its steps elsewhere."""


def lie_alike(view: TensorView) -> bool:
    """Whether a view's tensors have their elements in memory without gaps, in the same order.

    Then a kernel can read them side by side, whatever their shape.

    Example:
        >>> image = torch.zeros(1, 2, 4, 4).to(memory_format=torch.channels_last)
        >>> view = TensorView(None, None, 0, image, image, image, image, None, 1)
        >>> lie_alike(view), lie_alike(view._replace(grad=image.contiguous()))
        (True, False)
    """
    tensors = (view.grad, view.exp_avg, view.exp_avg_sq, view.max_exp_avg_sq)
    others = [each for each in tensors if each is not None]
    if view.parameter.is_contiguous() and all(each.is_contiguous() for each in others):
        return True
    strides = view.parameter.stride()
    return _is_dense(view.parameter) and all(each.stride() == strides for each in others)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each in a place of its own."""
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != filled:
            return False
        filled *= size
    return True


def is_measurable(optimizer: Optimizer) -> bool:
    """Whether the optimizer is of Adam's family, of which betas are the mark.

    Example:
        >>> weights = [torch.zeros(2, requires_grad=True)]
        >>> is_measurable(torch.optim.NAdam(weights)), is_measurable(torch.optim.SGD(weights))
        (True, False)
    """
    is_torchs = isinstance(optimizer, Optimizer)
    return is_torchs and any("betas" in group for group in groups_of(optimizer))


def steps_as_adam(optimizer: Optimizer) -> bool:
    """Whether the optimizer's step is known to be Adam's or AdamW's.

    Example:
        >>> weights = [torch.zeros(2, requires_grad=True)]
        >>> steps_as_adam(torch.optim.AdamW(weights)), steps_as_adam(torch.optim.NAdam(weights))
        (True, False)
    """
    stepping = unwrap_optimizer(optimizer)
    # A subclass with a step of its own may do anything in it. torch wraps `step` at the first
    # construction, which keeps its name.
    step = type(stepping).step
    is_adams = (step.__module__, step.__qualname__) == (Adam.__module__, "Adam.step")
    return isinstance(stepping, Adam) and is_adams


def knowledge_of(optimizer: Optimizer, views: Iterable[TensorView]) -> Knowledge:
    """What the optimizer's state allows to tell, of all of its tensors alike.

    Args:
        optimizer: The optimizer.
        views: Its tensors.

    Example:
        >>> adam = torch.optim.Adam([torch.zeros(2, requires_grad=True)])
        >>> knowledge_of(adam, []).name
        'ALL'
    """
    if steps_as_adam(optimizer):
        return Knowledge.ALL
    return lets_know(optimizer, [view.exp_avg_sq for view in views])


class _Known(NamedTuple):
    """What was found out about a parameter: it holds as long as its state is the same tensors."""

    parameter: Callable[[], Tensor | None]
    exp_avg: Callable[[], Tensor | None]
    exp_avg_sq: Callable[[], Tensor | None]
    max_exp_avg_sq: Callable[[], Tensor | None]
    group: str
    position: int
    place: Place
    fitting: list[bool]
    """Which of the moments have a number for each of its elements, or are none."""
    is_plain: bool
    """Whether all of them have, in numbers that can be read, and it is real."""
    is_distributed: bool
    """Whether it is a DTensor."""
    counts: bool
    """Whether it counts on this rank."""


class Views:
    """The tensors of an optimizer that took part in its last step, at every measurement anew.

    Only names are kept from one measurement to the next, and which tensors were looked at: groups,
    state and gradients are replaced by checkpoints, callbacks and `zero_grad`.

    Args:
        module: What the optimizer trains, where the names come from (default: None, the names that
            the optimizer was given, or positions in its groups).
        layer_depth: Parts of a module's path that make a layer (default: None, all).

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4))
        >>> adam = torch.optim.Adam(net.parameters())
        >>> net(torch.ones(3)).sum().backward()
        >>> adam.step()
        >>> [view.place.tensor for view in Views(net).after_step(adam)]
        ['0.weight', '0.bias']
    """

    def __init__(self, module: nn.Module | None = None, layer_depth: int | None = None) -> None:
        self._module = module
        self._layer_depth = layer_depth
        self._names: dict[int, tuple[ref[Tensor], str | None]] = {}
        self._places: dict[tuple[str, str], Place] = {}
        self._known: dict[int, _Known] = {}
        self.passed_over: list[str] = []
        """Names of the parameters that had a gradient at the last step, but no `exp_avg` of their
        shape, were quantised themselves, or whose gradient was sparse."""
        self.are_quantised = False
        """Whether moments of the last step's views have to be dequantised to be read."""

    def rows(self, optimizer: Optimizer) -> list[Row]:
        """All parameters, on all ranks alike, in the order of `param_groups`."""
        rows = []
        for index, group in enumerate(groups_of(optimizer)):
            settings, name = _settings(group), group_name(group, index)
            has_amsgrad = bool(group.get("amsgrad"))
            for position, parameter in enumerate(group["params"]):
                place = self._place(parameter, name, position, group.get("param_names", ()))
                rows.append(Row(place, settings, has_amsgrad))
        return rows

    def after_step(self, optimizer: Optimizer) -> list[TensorView]:
        """The views that count on this rank, in the order of `param_groups`.

        Args:
            optimizer: The optimizer, right after `step()`, its gradients still in place.
        """
        views = []
        self.passed_over, self.are_quantised = [], False
        state_of, counted = reader_of(optimizer), Counted(optimizer, self._module)
        first = 0
        for index, group in enumerate(groups_of(optimizer)):
            settings, name = _settings(group), group_name(group, index)
            # In place of what is not measured stands a name that no state has.
            second = "exp_avg_sq" if _has_two_betas(group) else ""
            third = "max_exp_avg_sq" if group.get("amsgrad") else ""
            for position, parameter in enumerate(group["params"]):
                grad = parameter.grad
                if grad is None:
                    continue
                # `state[parameter]` would leave an empty state behind.
                state = state_of(parameter, {})
                moments: Sequence[Any] = (
                    state.get("exp_avg"),
                    state.get(second),
                    state.get(third),
                )
                known = self._known.get(id(parameter))
                if (
                    known is None
                    or known.parameter() is not parameter
                    or known.exp_avg() is not moments[0]
                    or known.exp_avg_sq() is not moments[1]
                    or known.max_exp_avg_sq() is not moments[2]
                    or known.position != position
                    or known.group != name
                ):
                    counts = counted.counts(parameter)
                    known = self._look_at(parameter, group, name, position, moments, counts)
                tensor = parameter
                if known.is_distributed:
                    tensor, grad, *moments = (
                        local(each, parameter) for each in (parameter, grad, *moments)
                    )
                if not known.counts:
                    continue
                if moments[0] is None or not known.fitting[0] or grad.layout is not torch.strided:
                    self.passed_over.append(known.place.tensor)
                    continue
                step = state["step"] if "step" in state else group.get("step")
                if not isinstance(step, Tensor):
                    step = _number(step)
                tensors: tuple[Any, Any, Any, Any, Any] = (tensor, grad, *moments)
                if not known.is_plain:
                    tensors = _fitting(tensors, (True, True, *known.fitting))
                    self.are_quantised |= any(map(is_quantised, tensors))
                views.append(TensorView(known.place, settings, first + position, *tensors, step))
            first += len(group["params"])
        return views

    def _look_at(
        self,
        parameter: Tensor,
        group: Group,
        name: str,
        position: int,
        moments: Sequence[Any],
        counts: bool,
    ) -> _Known:
        is_readable = _is_in_memory(parameter)
        fitting = [
            each is None or (is_readable and _is_elementwise(each, parameter)) for each in moments
        ]
        references = [ref(each) if isinstance(each, Tensor) else _nothing for each in moments]
        known = self._known[id(parameter)] = _Known(
            parameter=ref(parameter),
            exp_avg=references[0],
            exp_avg_sq=references[1],
            max_exp_avg_sq=references[2],
            group=name,
            position=position,
            place=self._place(parameter, name, position, group.get("param_names", ())),
            fitting=fitting,
            is_plain=all(fitting)
            and not parameter.is_complex()
            and not any(map(is_quantised, moments)),
            is_distributed=isinstance(parameter, distributed_tensor()),
            counts=counts,
        )
        return known

    def _place(
        self, parameter: Tensor, group: str, position: int, param_names: Sequence[str]
    ) -> Place:
        name = self._name_in_module(parameter)
        if name is None and position < len(param_names):
            name = clean_name(param_names[position])
        if name is None:
            name = f"{group}.{position}"
        if (name, group) not in self._places:
            layer = ".".join(name.split(".")[:-1][: self._layer_depth])
            self._places[name, group] = Place(name, layer or ROOT, group)
        return self._places[name, group]

    def _name_in_module(self, parameter: Tensor) -> str | None:
        if self._module is None:
            return None
        known = self._names.get(id(parameter))
        # Once a parameter is gone, another may have its id.
        if known is None or known[0]() is not parameter:
            self._names = {
                id(each): (ref(each), clean_name(name))
                for name, each in self._module.named_parameters()
            }
            known = self._names.setdefault(id(parameter), (ref(parameter), None))
        return known[1]


MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
DEQUANTISED = 1 << 24
"""Elements whose moments are dequantised at a time: 128 MB."""


def dequantised(views: Iterable[TensorView]) -> Iterator[list[TensorView]]:
    """The views with moments in float32, a few at a time: all would cost what quantising spares.

    Args:
        views: Views, of which some have quantised moments.

    Returns:
        Views of no more than `DEQUANTISED` elements together, or one that has more.
    """
    for part in in_parts(views, DEQUANTISED):
        few = [
            view._replace(**{name: numbers_of(getattr(view, name)) for name in MOMENTS})
            for view in part
        ]
        yield few
        # Whoever has measured them still holds the list.
        few.clear()


def in_parts(views: Iterable[TensorView], most: int) -> Iterator[list[TensorView]]:
    """The views, a few at a time; of none, one empty part.

    Args:
        views: The views.
        most: The elements of a part, unless a single tensor has more.

    Example:
        >>> adam = torch.optim.Adam(torch.nn.Linear(3, 4).parameters())
        >>> for each in adam.param_groups[0]["params"]:
        ...     each.grad = torch.ones_like(each)
        >>> adam.step()
        >>> [len(part) for part in in_parts(Views().after_step(adam), most=12)]
        [1, 1]
    """
    part, elements = list[TensorView](), 0
    for view in views:
        if part and elements + view.parameter.numel() > most:
            yield part
            part, elements = [], 0
        part.append(view)
        elements += view.parameter.numel()
    yield part


ROOT = "root"
"""The layer of parameters that the module itself owns."""


def _settings(group: Group) -> Settings:
    beta1, beta2 = group["betas"] if _has_two_betas(group) else (None, None)
    return Settings(
        lr=_number(group.get("lr")),
        beta1=_number(beta1),
        beta2=_number(beta2),
        eps=_number(group.get("eps")),
        weight_decay=_number(group.get("weight_decay")),
        decoupled=group.get("decoupled_weight_decay", False),
        maximize=group.get("maximize", False),
    )


def _number(value: Any) -> Any:
    """A hyperparameter that is one number; some optimizers have two eps."""
    return value if isinstance(value, int | float | Tensor) else math.nan


def _has_two_betas(group: Group) -> bool:
    betas = group.get("betas")
    return isinstance(betas, Sequence) and len(betas) == 2


def _fitting(tensors: Iterable[Any], fitting: Iterable[bool]) -> tuple[Any, Any, Any, Any, Any]:
    """None for what does not fit; Adam treats a complex number as two real ones."""
    real = (
        torch.view_as_real(tensor) if isinstance(tensor, Tensor) and tensor.is_complex() else tensor
        for tensor in tensors
    )
    p, g, m, v, v_max = (each if fits else None for each, fits in zip(real, fitting, strict=True))
    return p, g, m, v, v_max


def _is_elementwise(state: Any, parameter: Tensor) -> bool:
    """Whether a state tensor has a number for each element of the parameter."""
    is_numbers = is_quantised(state) or (
        isinstance(state, Tensor)
        and (state.is_floating_point() or state.is_complex())
        and _is_in_memory(state)
    )
    return is_numbers and state.shape == parameter.shape


def _is_in_memory(tensor: Tensor) -> bool:
    """Whether there are elements to read: a tensor may be a subclass that computes them."""
    part = tensor.to_local() if isinstance(tensor, distributed_tensor()) else tensor
    return part.numel() == 0 or part.data_ptr() != 0


def _nothing() -> None:
    """In the place of a weak reference to what there is not."""
