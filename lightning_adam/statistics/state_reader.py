"""`StateReader`: reads the parameters, gradients and state of an optimizer right after a step."""

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
from lightning_adam.statistics.sharding import (
    ReplicaSelector,
    dtensor_types,
    to_local_shard,
    unwrap_optimizer,
)

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
    # A subclass that overrides `step` may do anything in it. torch wraps `step` at the first
    # construction, which keeps its name.
    step = type(stepping).step
    is_adams = (step.__module__, step.__qualname__) == (Adam.__module__, "Adam.step")
    return isinstance(stepping, Adam) and is_adams


def capabilities_of(optimizer: Optimizer, states: ParamStates) -> Capabilities:
    """Returns the capabilities of an optimizer, common to all of its tensors.

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


class _LastRead(NamedTuple):
    """The layout of the last measurement, to reuse it while it is unchanged."""

    groups: list[tuple[Any, ...]]
    """By group: name, number of parameters, and names of the moments."""
    parameters: list[Callable[[], Tensor | None]]
    """References to all parameters of the optimizer."""
    moments: list[list[Callable[[], Tensor | None]]]
    """By moment: references to those of the measured parameters."""
    moment_names: list[list[str]]
    addresses: list[list[int]]
    """Addresses of parameters, moments and steps."""
    grad_dtypes: list[torch.dtype]
    grad_strides: list[tuple[int, ...]] | None
    """None if all gradients are contiguous."""
    states: ParamStates
    """Without tensors, so that a replaced state is not kept alive."""


class StateReader:
    """Reads the parameters of an optimizer that took part in its last step.

    Checkpoints, callbacks and `zero_grad` replace groups, state and gradients, so each measurement
    reads all of them. Names, shapes and dtypes are cached while the tensors and their addresses are
    unchanged.

    Args:
        module: The module that the optimizer trains, for the names (default: None, the names in the
            optimizer, or positions in its groups).
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
        self._last_read: _LastRead | None = None
        self._all: tuple[list[tuple[Any, ...]], list[ref[Tensor]], Scopes] | None = None
        self.skipped: list[str] = []
        """Names of the parameters with a gradient that were not read at the last step: without an
        `exp_avg` of their shape, quantized, or with a sparse gradient."""
        self.are_quantized = False
        """Whether moments of the last step are quantized."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "StateReader":
        # A copy uses the same module.
        return StateReader(self._module, self._layer_depth)

    def __reduce__(self) -> tuple[Any, ...]:
        # A module is not pickled.
        return StateReader, (None, self._layer_depth)

    def all_scopes(self, optimizer: Optimizer) -> Scopes:
        """Returns the scopes of all parameters, which are the same on all ranks."""
        groups = groups_of(optimizer)
        parameters = _parameters(groups)
        signature = _signature(groups)
        if (
            self._all is None
            or self._all[0] != signature
            or not _refer_to(self._all[1], parameters)
        ):
            scopes = Scopes(self._place_all(groups), _group_indexes(groups))
            self._all = (signature, list(map(ref, parameters)), scopes)
        return self._all[2]

    def after_step(self, optimizer: Optimizer) -> ParamStates:
        """Returns the parameters that are counted on this rank, in the order of `param_groups`.

        Args:
            optimizer: The optimizer right after `step()`, with its gradients.
        """
        groups = groups_of(optimizer)
        states = self._unchanged(optimizer, groups)
        return self._read(optimizer, groups) if states is None else states

    def settings(self, optimizer: Optimizer) -> list[Settings]:
        """Returns the hyperparameters of each group."""
        return list(map(_settings, groups_of(optimizer)))

    def gradients(self, optimizer: Optimizer) -> list[Tensor | None]:
        """Returns the gradients of all parameters, or this rank's shards of them."""
        return [to_local_shard(each.grad, each) for each in _parameters(groups_of(optimizer))]

    def _unchanged(self, optimizer: Optimizer, groups: Sequence[Group]) -> ParamStates | None:
        """Returns the states of this step if only gradients have moved since the last one."""
        last = self._last_read
        if last is None or last.groups != _signature(groups):
            return None
        parameters = _parameters(groups)
        if not _refer_to(last.parameters, parameters):
            return None
        grads: list[Any] = list(map(_grad, parameters))
        positions = [position for position, grad in enumerate(grads) if grad is not None]
        if positions != last.states.positions:
            return None
        if len(positions) < len(grads):
            grads = [grads[position] for position in positions]
            parameters = [parameters[position] for position in positions]
        read = reader_of(optimizer)
        state: list[Any] = list(map(read, parameters, itertools.repeat({})))
        try:
            moments: list[Any] = [list(map(dict.get, state, names)) for names in last.moment_names]
            steps = [each.get("step") for each in state]
            if not all(map(_refer_to, last.moments, moments)) or not _have_layout_of(grads, last):
                return None
            addresses = [addresses_of(each) for each in (parameters, *moments, steps)]
        except (RuntimeError, AttributeError, TypeError):
            # For example a sparse gradient without strides, or a step that is a number.
            return None
        if addresses != last.addresses:
            return None
        exp_avg, exp_avg_sq, max_exp_avg_sq = moments
        return replace(
            last.states,
            settings=list(map(_settings, groups)),
            parameter=parameters,
            grad=grads,
            exp_avg=exp_avg,
            exp_avg_sq=exp_avg_sq,
            max_exp_avg_sq=max_exp_avg_sq,
            step=steps,
        )

    def _read(self, optimizer: Optimizer, groups: Sequence[Group]) -> ParamStates:
        self.skipped, self.are_quantized, self._last_read = [], False, None
        read, replicas = reader_of(optimizer), ReplicaSelector(optimizer, self._module)
        names, indexes = self._place_all(groups), _group_indexes(groups)
        found: list[tuple[int, tuple[Any, ...]]] = []
        is_cacheable = True
        for position, (parameter, index) in enumerate(
            zip(_parameters(groups), indexes, strict=True)
        ):
            grad, group = parameter.grad, groups[index]
            if grad is None:
                continue
            # `state[parameter]` would create an empty state.
            state = read(parameter, {})
            moments: list[Any] = [state.get(name) for name in _moment_names(group)]
            is_readable = _is_in_memory(parameter)
            fits = [
                each is None or (is_readable and _matches_shape(each, parameter))
                for each in moments
            ]
            tensor = parameter
            if isinstance(parameter, dtensor_types()):
                is_cacheable = False
                tensor, grad, *moments = (
                    to_local_shard(each, parameter) for each in (parameter, grad, *moments)
                )
            if not replicas.is_counted(parameter):
                is_cacheable = False
                continue
            if moments[0] is None or not fits[0] or grad.layout is not torch.strided:
                self.skipped.append(names[position].tensor)
                is_cacheable = False
                continue
            step = state["step"] if "step" in state else group.get("step")
            if not isinstance(step, Tensor):
                step = _number(step)
            if not all(fits) or parameter.is_complex() or any(map(is_quantized, moments)):
                is_cacheable = False
                tensor, grad, *moments = _select_real((tensor, grad, *moments), (True, True, *fits))
                self.are_quantized |= any(map(is_quantized, moments))
            found.append((position, (tensor, grad, *moments, step)))
        positions = [position for position, _ in found]
        scopes = Scopes(
            [names[position] for position in positions],
            [indexes[position] for position in positions],
        )
        rows = [(position, *tensors) for position, tensors in found]
        states = ParamStates.of_columns(scopes, list(map(_settings, groups)), rows)
        if is_cacheable and found:
            self._remember(groups, states)
        return states

    def _remember(self, groups: Sequence[Group], states: ParamStates) -> None:
        if not all(isinstance(each, Tensor) for each in states.step):
            return
        contiguous = all(map(Tensor.is_contiguous, states.grad))
        moments = (states.exp_avg, states.exp_avg_sq, states.max_exp_avg_sq)
        self._last_read = _LastRead(
            groups=_signature(groups),
            parameters=list(map(ref, _parameters(groups))),
            moments=[list(map(_weak_reference, each)) for each in moments],
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
        """Returns the names of all parameters."""
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
        # The id of a freed parameter may be reused.
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
    """Returns the index of the group of each parameter."""
    return [index for index, group in enumerate(groups) for _ in group["params"]]


def _signature(groups: Sequence[Group]) -> list[tuple[Any, ...]]:
    names = group_names(groups)
    return [
        (name, len(group["params"]), *_moment_names(group))
        for name, group in zip(names, groups, strict=True)
    ]


def _moment_names(group: Group) -> tuple[str, str, str]:
    """Returns the names of the moments in the state; empty for moments that are not read."""
    second = "exp_avg_sq" if _has_two_betas(group) else ""
    return "exp_avg", second, "max_exp_avg_sq" if group.get("amsgrad") else ""


def _have_layout_of(grads: Sequence[Tensor], last: _LastRead) -> bool:
    """Returns whether gradients have the same dtypes and strides as the last ones."""
    if [grad.dtype for grad in grads] != last.grad_dtypes:
        return False
    if last.grad_strides is None:
        return all(map(Tensor.is_contiguous, grads))
    return list(map(Tensor.stride, grads)) == last.grad_strides


def _refer_to(references: Sequence[Callable[[], Any]], objects: Sequence[Any]) -> bool:
    """Returns whether the references refer to these objects."""
    return len(references) == len(objects) and all(
        map(is_, [reference() for reference in references], objects)
    )


def _weak_reference(tensor: Tensor | None) -> Callable[[], Tensor | None]:
    return _no_tensor if tensor is None else ref(tensor)


def _no_tensor() -> None:
    """Replaces a weak reference to None."""


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
    """Returns a hyperparameter; NaN if it is not a number, such as a pair of eps."""
    return value if isinstance(value, int | float | Tensor) else math.nan


def _has_two_betas(group: Group) -> bool:
    betas = group.get("betas")
    return isinstance(betas, Sequence) and len(betas) == 2


def _select_real(
    tensors: Iterable[Any], supported: Iterable[bool]
) -> tuple[Any, Any, Any, Any, Any]:
    """Returns real views of the supported tensors, and None for the others."""
    real = (
        torch.view_as_real(tensor) if isinstance(tensor, Tensor) and tensor.is_complex() else tensor
        for tensor in tensors
    )
    p, g, m, v, v_max = (each if fits else None for each, fits in zip(real, supported, strict=True))
    return p, g, m, v, v_max


def _matches_shape(state: Any, parameter: Tensor) -> bool:
    """Returns whether a state tensor has one number for each element of the parameter."""
    is_numbers = is_quantized(state) or (
        isinstance(state, Tensor)
        and (state.is_floating_point() or state.is_complex())
        and _is_in_memory(state)
    )
    return is_numbers and state.shape == parameter.shape


def _is_in_memory(tensor: Tensor) -> bool:
    """Returns whether a tensor is stored in memory; a subclass may compute its elements."""
    part = tensor.to_local() if isinstance(tensor, dtensor_types()) else tensor
    return part.numel() == 0 or part.data_ptr() != 0
