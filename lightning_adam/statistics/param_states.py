"""`ParamStates`: the tensors and hyperparameters of a step."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lightning_adam.statistics.columns import ParamSubset
from lightning_adam.statistics.foreign import dequantize
from lightning_adam.statistics.scopes import ParamName, Scopes

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
MAX_DEQUANTIZED = 1 << 24
"""Number of elements to dequantize at a time: 128 MB."""


class Settings(NamedTuple):
    """The hyperparameters of a group in the step; NaN if the group has none."""

    lr: Tensor | float
    beta1: Tensor | float
    beta2: Tensor | float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool
    amsgrad: bool

    @property
    def is_coupled(self) -> bool:
        """Whether weight decay is added to the gradient."""
        return self.weight_decay > 0 and not self.decoupled

    @property
    def subsets(self) -> frozenset[ParamSubset]:
        """The subsets of the group's tensors."""
        subsets = {ParamSubset.ALL}
        if self.weight_decay > 0:
            subsets.add(ParamSubset.DECOUPLED if self.decoupled else ParamSubset.COUPLED)
        if self.amsgrad:
            subsets.add(ParamSubset.AMSGRAD)
        return frozenset(subsets)


class ParamState(NamedTuple):
    """The tensors and hyperparameters of a parameter in a step.

    The tensors are those of the optimizer, not copies. All are strided and real, and have the shape
    of the parameter, or of this rank's shard.
    """

    name: ParamName
    settings: Settings
    position: int
    """Index among all parameters of the optimizer."""
    parameter: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor | None
    """None if the optimizer has none of this shape, or none that decays by a single beta."""
    max_exp_avg_sq: Tensor | None
    """None without amsgrad."""
    step: Tensor | float
    """NaN if unknown."""


def same_layout(state: ParamState) -> bool:
    """Returns whether a parameter's tensors store their elements in the same order without gaps.

    A kernel can then read them as flat arrays.

    Example:
        >>> import torch
        >>> image = torch.zeros(1, 2, 4, 4).to(memory_format=torch.channels_last)
        >>> state = ParamState(None, None, 0, image, image, image, image, None, 1)
        >>> same_layout(state), same_layout(state._replace(grad=image.contiguous()))
        (True, False)
    """
    tensors = (state.grad, state.exp_avg, state.exp_avg_sq, state.max_exp_avg_sq)
    others = [each for each in tensors if each is not None]
    if state.parameter.is_contiguous() and all(each.is_contiguous() for each in others):
        return True
    strides = state.parameter.stride()
    return _is_dense(state.parameter) and all(each.stride() == strides for each in others)


def _is_dense(tensor: Tensor) -> bool:
    """Returns whether the elements fill a range of memory without gaps or overlaps."""
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != filled:
            return False
        filled *= size
    return True


class Layout:
    """Identifies the memory layout of a measurement.

    While the layout is the same object, addresses, shapes, dtypes and groups are unchanged, except
    for the addresses of gradients.
    """

    def __init__(self) -> None:
        self.prepared: dict[Any, Any] = {}
        """Data of kernels to reuse in the next measurement."""


@dataclass(frozen=True)
class ParamStates:
    """The parameters of a step, in one list per kind of tensor."""

    scopes: Scopes
    """Their names and groups."""
    settings: list[Settings]
    """The hyperparameters of each group, see `scopes.groups`."""
    positions: list[int]
    parameter: list[Tensor]
    grad: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor | None]
    max_exp_avg_sq: list[Tensor | None]
    step: list[Tensor | float]
    layout: Layout = field(default_factory=Layout)

    @classmethod
    def of(cls, states: Sequence[ParamState]) -> "ParamStates":
        """Creates it from single parameters.

        Example:
            >>> len(ParamStates.of([]))
            0
        """
        groups = {id(each.settings): each.settings for each in states}
        indexes = {key: index for index, key in enumerate(groups)}
        names = [each.name for each in states]
        scopes = Scopes(names, [indexes[id(each.settings)] for each in states])
        return cls.of_columns(scopes, list(groups.values()), [list(state[2:]) for state in states])

    @classmethod
    def of_columns(
        cls, scopes: Scopes, settings: list[Settings], rows: Sequence[Sequence[Any]]
    ) -> "ParamStates":
        """Creates it from the position, tensors and step of each parameter.

        Example:
            >>> len(ParamStates.of_columns(Scopes([], []), [], []))
            0
        """
        columns = list(map(list, zip(*rows, strict=True))) if rows else [[] for _ in range(7)]
        positions, parameter, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step = columns
        return cls(
            *(scopes, settings, positions),
            *(parameter, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step),
        )

    def __len__(self) -> int:
        return len(self.parameter)

    def __getitem__(self, index: int) -> ParamState:
        return ParamState(
            self.scopes.names[index],
            self.settings[self.scopes.groups[index]],
            *(each[index] for each in self._columns()),
        )

    def __iter__(self) -> Iterator[ParamState]:
        return map(self.__getitem__, range(len(self)))

    def select(self, indexes: Sequence[int]) -> "ParamStates":
        """Returns some of the parameters, with a new layout.

        Args:
            indexes: The indexes in ascending order. Returns the same object for all indexes.
        """
        if len(indexes) == len(self):
            return self
        columns = self._columns()
        rows = [[each[index] for each in columns] for index in indexes]
        scopes = self.scopes.select(np.array(indexes, dtype=np.int64))
        return ParamStates.of_columns(scopes, self.settings, rows)

    def _columns(self) -> tuple[list[Any], ...]:
        return (
            self.positions,
            *(self.parameter, self.grad, self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq),
            self.step,
        )


def addresses_of(tensors: Sequence[Any]) -> list[int]:
    """Returns the addresses of tensors; 0 for None.

    Example:
        >>> addresses_of([None])
        [0]
    """
    if tensors and tensors[0] is not None:
        with suppress(TypeError):
            return list(map(Tensor.data_ptr, tensors))
    return [0 if each is None else each.data_ptr() for each in tensors]


def dequantized(states: ParamStates) -> Iterator[ParamStates]:
    """Yields parameters with dequantized moments, in parts of at most `MAX_DEQUANTIZED` elements.

    Args:
        states: Parameters, some of which have quantized moments.
    """
    for part in in_parts(list(states), MAX_DEQUANTIZED):
        yield ParamStates.of(
            [
                state._replace(**{name: dequantize(getattr(state, name)) for name in MOMENTS})
                for state in part
            ]
        )


def in_parts(states: Iterable[ParamState], most: int) -> Iterator[list[ParamState]]:
    """Yields the parameters in parts; one empty part if there are none.

    Args:
        states: The parameters.
        most: Largest number of elements of a part, unless a single tensor has more.

    Example:
        >>> import torch
        >>> states = [ParamState(None, None, 0, torch.zeros(size), *[None] * 5) for size in (12, 4)]
        >>> [len(part) for part in in_parts(states, most=12)]
        [1, 1]
    """
    part, elements = list[ParamState](), 0
    for state in states:
        if part and elements + state.parameter.numel() > most:
            yield part
            part, elements = [], 0
        part.append(state)
        elements += state.parameter.numel()
    yield part
