"""Reads from an optimizer what belongs to each parameter right after a step."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from operator import attrgetter, is_
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_adam.statistics.columns import Capabilities
from lightning_adam.statistics.foreign import (
    Group,
    groups_of,
    is_quantized,
    provides,
    reader_of,
)
from lightning_adam.statistics.names import clean_name, group_names
from lightning_adam.statistics.param_states import ParamStates, Settings, addresses_of
from lightning_adam.statistics.scopes import ParamName, Scopes
from lightning_adam.statistics.sharding import Counted, distributed_tensor, local, unwrap_optimizer

ROOT = "root"
"""The layer of parameters that the module itself owns."""


def is_measurable(optimizer: Optimizer) -> bool:
    """Returns whether the optimizer is of Adam's family: its groups have betas.

    Example:
        >>> weights = [torch.zeros(2, requires_grad=True)]
        >>> is_measurable(torch.optim.NAdam(weights)), is_measurable(torch.optim.SGD(weights))
        (True, False)
    """
    is_torchs = isinstance(unwrap_optimizer(optimizer), Optimizer)
    return is_torchs and any("betas" in group for group in groups_of(optimizer))


def steps_as_adam(optimizer: Optimizer) -> bool:
    """Returns whether the optimizer's step is known to be Adam's or AdamW's.

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


def capabilities_of(optimizer: Optimizer, states: ParamStates) -> Capabilities:
    """Returns what can be read of an optimizer, of all of its tensors alike.

    Args:
        optimizer: The optimizer.
        states: Its parameters.

    Example:
        >>> adam = torch.optim.Adam([torch.zeros(2, requires_grad=True)])
        >>> capabilities_of(adam, ParamStates.of([])).name
        'ALL'
    """
    if steps_as_adam(optimizer):
        return Capabilities.ALL
    return provides(optimizer, states.exp_avg_sq)


class _Seen(NamedTuple):
    """The last measurement, as far as the next one may find it unchanged."""

    groups: list[tuple[Any, ...]]
    """Of each group its name, number of parameters, and which moments are read."""
    parameters: list[Callable[[], Tensor | None]]
    """All parameters of the optimizer."""
    moments: list[list[Callable[[], Tensor | None]]]
    """Of the parameters that are measured, one list a moment."""
    moment_names: list[list[str]]
    addresses: list[list[int]]
    """Of parameters, moments and steps."""
    grad_dtypes: list[torch.dtype]
    grad_strides: list[tuple[int, ...]] | None
    """None if all gradients are contiguous."""
    states: ParamStates
    """Without gradients, moments and steps: a replaced state must not be kept alive."""


class StateReader:
    """Reads the parameters of an optimizer that took part in its last step.

    Groups, state and gradients are replaced by checkpoints, callbacks and `zero_grad`, so each
    measurement looks at all of them. Only names, shapes and dtypes are kept while the tensors are
    the same, at the same addresses.

    Args:
        module: The module that the optimizer trains, for the names (default: None, the names that
            the optimizer was given, or positions in its groups).
        layer_depth: Number of parts of a module's path that form a layer's name (default: None,
            all).

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4))
        >>> adam = torch.optim.Adam(net.parameters())
        >>> net(torch.ones(3)).sum().backward()
        >>> adam.step()
        >>> [each.name.tensor for each in StateReader(net).after_step(adam)]
        ['0.weight', '0.bias']
    """

    def __init__(self, module: nn.Module | None = None, layer_depth: int | None = None) -> None:
        self._module = module
        self._layer_depth = layer_depth
        self._names: dict[int, tuple[ref[Tensor], str | None]] = {}
        self._places: dict[tuple[str, str], ParamName] = {}
        self._seen: _Seen | None = None
        self._all: tuple[list[tuple[Any, ...]], list[ref[Tensor]], Scopes] | None = None
        self.skipped: list[str] = []
        """Names of the parameters that had a gradient at the last step, but no `exp_avg` of their
        shape, were quantized themselves, or whose gradient was sparse."""
        self.are_quantized = False
        """Whether moments of the last step have to be dequantized to be read."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "StateReader":
        # A copy of a metric names the same module.
        return StateReader(self._module, self._layer_depth)

    def __reduce__(self) -> tuple[Any, ...]:
        # Names that were read before stay with the metric; a module is not a part of it.
        return StateReader, (None, self._layer_depth)

    def all_scopes(self, optimizer: Optimizer) -> Scopes:
        """Returns the scopes of all parameters, the same on all ranks."""
        groups = groups_of(optimizer)
        parameters = _parameters(groups)
        signature = _signature(groups)
        if self._all is None or self._all[0] != signature or not _are(self._all[1], parameters):
            scopes = Scopes(self._place_all(groups), _group_indexes(groups))
            self._all = (signature, list(map(ref, parameters)), scopes)
        return self._all[2]

    def after_step(self, optimizer: Optimizer) -> ParamStates:
        """Returns the parameters that count on this rank, in the order of `param_groups`.

        Args:
            optimizer: The optimizer, right after `step()`, with its gradients still in place.
        """
        groups = groups_of(optimizer)
        states = self._unchanged(optimizer, groups)
        return self._read(optimizer, groups) if states is None else states

    def settings(self, optimizer: Optimizer) -> list[Settings]:
        """Returns the hyperparameters of each group."""
        return list(map(_settings, groups_of(optimizer)))

    def gradients(self, optimizer: Optimizer) -> list[Tensor | None]:
        """Returns the gradients of all parameters, of sharded ones this rank's shard."""
        return [local(each.grad, each) for each in _parameters(groups_of(optimizer))]

    def _unchanged(self, optimizer: Optimizer, groups: Sequence[Group]) -> ParamStates | None:
        """The states of this step, if all but the gradients stand where they stood."""
        seen = self._seen
        if seen is None or seen.groups != _signature(groups):
            return None
        parameters = _parameters(groups)
        if not _are(seen.parameters, parameters):
            return None
        grads: list[Any] = list(map(_grad, parameters))
        positions = [position for position, grad in enumerate(grads) if grad is not None]
        if positions != seen.states.positions:
            return None
        if len(positions) < len(grads):
            grads = [grads[position] for position in positions]
            parameters = [parameters[position] for position in positions]
        read = reader_of(optimizer)
        state: list[Any] = list(map(read, parameters, itertools.repeat({})))
        try:
            moments: list[Any] = [list(map(dict.get, state, names)) for names in seen.moment_names]
            steps = [each.get("step") for each in state]
            if not all(map(_are, seen.moments, moments)) or not _are_alike(grads, seen):
                return None
            addresses = [addresses_of(each) for each in (parameters, *moments, steps)]
        except (RuntimeError, AttributeError, TypeError):
            # A sparse gradient has no strides, a step may be a number, a state no dict.
            return None
        if addresses != seen.addresses:
            return None
        exp_avg, exp_avg_sq, max_exp_avg_sq = moments
        return replace(
            seen.states,
            settings=list(map(_settings, groups)),
            parameter=parameters,
            grad=grads,
            exp_avg=exp_avg,
            exp_avg_sq=exp_avg_sq,
            max_exp_avg_sq=max_exp_avg_sq,
            step=steps,
        )

    def _read(self, optimizer: Optimizer, groups: Sequence[Group]) -> ParamStates:
        self.skipped, self.are_quantized, self._seen = [], False, None
        read, counted = reader_of(optimizer), Counted(optimizer, self._module)
        names, indexes = self._place_all(groups), _group_indexes(groups)
        found: list[tuple[int, tuple[Any, ...]]] = []
        is_plain = True
        for position, (parameter, index) in enumerate(
            zip(_parameters(groups), indexes, strict=True)
        ):
            grad, group = parameter.grad, groups[index]
            if grad is None:
                continue
            # `state[parameter]` would leave an empty state behind.
            state = read(parameter, {})
            moments: list[Any] = [state.get(name) for name in _moment_names(group)]
            is_readable = _is_in_memory(parameter)
            fits = [
                each is None or (is_readable and _is_elementwise(each, parameter))
                for each in moments
            ]
            tensor = parameter
            if isinstance(parameter, distributed_tensor()):
                is_plain = False
                tensor, grad, *moments = (
                    local(each, parameter) for each in (parameter, grad, *moments)
                )
            if not counted.counts(parameter):
                is_plain = False
                continue
            if moments[0] is None or not fits[0] or grad.layout is not torch.strided:
                self.skipped.append(names[position].tensor)
                is_plain = False
                continue
            step = state["step"] if "step" in state else group.get("step")
            if not isinstance(step, Tensor):
                step = _number(step)
            if not all(fits) or parameter.is_complex() or any(map(is_quantized, moments)):
                is_plain = False
                tensor, grad, *moments = _fitting((tensor, grad, *moments), (True, True, *fits))
                self.are_quantized |= any(map(is_quantized, moments))
            found.append((position, (tensor, grad, *moments, step)))
        positions = [position for position, _ in found]
        scopes = Scopes(
            [names[position] for position in positions],
            [indexes[position] for position in positions],
        )
        rows = [(position, *tensors) for position, tensors in found]
        states = ParamStates.of_columns(scopes, list(map(_settings, groups)), rows)
        if is_plain and found:
            self._remember(groups, states)
        return states

    def _remember(self, groups: Sequence[Group], states: ParamStates) -> None:
        if not all(isinstance(each, Tensor) for each in states.step):
            return
        contiguous = all(map(Tensor.is_contiguous, states.grad))
        moments = (states.exp_avg, states.exp_avg_sq, states.max_exp_avg_sq)
        self._seen = _Seen(
            groups=_signature(groups),
            parameters=list(map(ref, _parameters(groups))),
            moments=[list(map(_reference, each)) for each in moments],
            moment_names=[
                [names[index] for index in states.scopes.groups]
                for names in zip(*map(_moment_names, groups), strict=True)
            ],
            addresses=[addresses_of(each) for each in (states.parameter, *moments, states.step)],
            grad_dtypes=[grad.dtype for grad in states.grad],
            grad_strides=None if contiguous else list(map(Tensor.stride, states.grad)),
            states=replace(
                states, parameter=[], grad=[], exp_avg=[], exp_avg_sq=[], max_exp_avg_sq=[], step=[]
            ),
        )

    def _place_all(self, groups: Sequence[Group]) -> list[ParamName]:
        """The names of all parameters."""
        parameters = _parameters(groups)
        in_module = self._names_in_module(parameters)
        places = []
        flat = iter(zip(parameters, in_module, strict=True))
        for group, group_name in zip(groups, group_names(groups), strict=True):
            given = group.get("param_names", ())
            for position, (_, name) in enumerate(itertools.islice(flat, len(group["params"]))):
                if name is None and position < len(given):
                    name = clean_name(given[position])
                name = f"{group_name}.{position}" if name is None else name
                places.append(self._place(name, group_name))
        return places

    def _place(self, name: str, group: str) -> ParamName:
        if (name, group) not in self._places:
            layer = ".".join(name.split(".")[:-1][: self._layer_depth])
            self._places[name, group] = ParamName(name, layer or ROOT, group)
        return self._places[name, group]

    def _names_in_module(self, parameters: Sequence[Tensor]) -> list[str | None]:
        if self._module is None:
            return [None] * len(parameters)
        known = self._names
        # Once a parameter is freed, another may have its id.
        if any(id(each) not in known or known[id(each)][0]() is not each for each in parameters):
            known = {id(each): (ref(each), None) for each in parameters}
            known |= {
                id(each): (ref(each), clean_name(name))
                for name, each in self._module.named_parameters()
            }
            self._names = known
        return [known[id(each)][1] for each in parameters]


_grad = attrgetter("grad")


def _parameters(groups: Sequence[Group]) -> list[Tensor]:
    return list(itertools.chain.from_iterable(group["params"] for group in groups))


def _group_indexes(groups: Sequence[Group]) -> list[int]:
    """The index of each parameter's group."""
    return [index for index, group in enumerate(groups) for _ in group["params"]]


def _signature(groups: Sequence[Group]) -> list[tuple[Any, ...]]:
    names = group_names(groups)
    return [
        (name, len(group["params"]), *_moment_names(group))
        for name, group in zip(names, groups, strict=True)
    ]


def _moment_names(group: Group) -> tuple[str, str, str]:
    """The names of the moments in the state; empty, which no state has, for what is not read."""
    second = "exp_avg_sq" if _has_two_betas(group) else ""
    return "exp_avg", second, "max_exp_avg_sq" if group.get("amsgrad") else ""


def _are_alike(grads: Sequence[Tensor], seen: _Seen) -> bool:
    """Whether gradients have the dtypes and strides of the last ones."""
    if [grad.dtype for grad in grads] != seen.grad_dtypes:
        return False
    if seen.grad_strides is None:
        return all(map(Tensor.is_contiguous, grads))
    return list(map(Tensor.stride, grads)) == seen.grad_strides


def _are(references: Sequence[Callable[[], Any]], objects: Sequence[Any]) -> bool:
    """Whether the references are to these objects."""
    return len(references) == len(objects) and all(
        map(is_, [reference() for reference in references], objects)
    )


def _reference(tensor: Tensor | None) -> Callable[[], Tensor | None]:
    return _nothing if tensor is None else ref(tensor)


def _nothing() -> None:
    """In place of a weak reference to None."""


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
        amsgrad=bool(group.get("amsgrad", False)),
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
    is_numbers = is_quantized(state) or (
        isinstance(state, Tensor)
        and (state.is_floating_point() or state.is_complex())
        and _is_in_memory(state)
    )
    return is_numbers and state.shape == parameter.shape


def _is_in_memory(tensor: Tensor) -> bool:
    """Whether there are elements to read: a tensor may be a subclass that computes them."""
    part = tensor.to_local() if isinstance(tensor, distributed_tensor()) else tensor
    return part.numel() == 0 or part.data_ptr() != 0
