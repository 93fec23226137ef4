"""`Scopes`: the tensors of the model, and of each parameter group and layer."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_adam.config.monitor import Scope

Indexes = npt.NDArray[np.int64]
Array = npt.NDArray[np.float64]


class ParamName(NamedTuple):
    """The scopes of a parameter."""

    tensor: str
    """The name of the parameter."""
    layer: str
    """The path of the module that owns it."""
    group: str
    """The parameter group."""


class Cells(NamedTuple):
    """The tensors of a kind of scope, in cells of one scope and one parameter group each."""

    members: list[str]
    """The names of the scopes."""
    order: Indexes
    """The indexes of the tensors, sorted by cell."""
    starts: Indexes
    """The position in `order` of each cell's first tensor."""
    groups: Indexes
    """The index of each cell's parameter group."""
    member_starts: Indexes
    """The index of the first cell of each scope."""

    def reduce(self, column: Array, operation: Any) -> Array:
        """Reduces a column of all tensors to the cells.

        Args:
            column: One value per tensor.
            operation: A numpy ufunc, such as `np.add`.
        """
        if len(self.starts) == len(self.order):
            return column[self.order]
        reduced: Array = operation.reduceat(column[self.order], self.starts)
        return reduced


class Scopes:
    """The scopes of some tensors, with cached cells.

    Args:
        names: The names of the tensors.
        groups: The index of the parameter group of each tensor.

    Example:
        >>> names = [ParamName("a.w", "a", "decay"), ParamName("b.w", "b", "decay")]
        >>> Scopes(names, [0, 0]).cells(Scope.layer).members
        ['a', 'b']
    """

    def __init__(self, names: Sequence[ParamName], groups: Sequence[int]) -> None:
        self.names = list(names)
        self.groups = np.array(groups, dtype=np.int64)
        self._cells: dict[Scope, Cells] = {}

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def group_names(self) -> list[str]:
        """The names of the parameter groups in order."""
        return list(dict.fromkeys(each.group for each in self.names))

    def members(self, scope: Scope) -> list[str]:
        """Returns the names of the scopes of a kind."""
        return self.cells(scope).members

    def cells(self, scope: Scope) -> Cells:
        """Returns the tensors of a kind of scope, by scope and parameter group."""
        if scope not in self._cells:
            self._cells[scope] = self._cells_of(scope)
        return self._cells[scope]

    def inside(self, scope: str) -> set[str]:
        """Returns the names of the tensors in a scope, such as `model` or `group/<name>`."""
        kind, _, name = scope.partition("/")
        return {each.tensor for each in self.names if not name or getattr(each, kind) == name}

    def select(self, indexes: Indexes) -> "Scopes":
        """Returns the scopes of some of the tensors."""
        return Scopes([self.names[index] for index in indexes], self.groups[indexes].tolist())

    def _cells_of(self, scope: Scope) -> Cells:
        if scope is Scope.model:
            own = [scope.value] * len(self.names)
        else:
            own = [getattr(each, scope.value) for each in self.names]
        positions = {name: position for position, name in enumerate(dict.fromkeys(own))}
        members = np.array([positions[name] for name in own], dtype=np.int64)
        order = np.lexsort((self.groups, members))
        members, groups = members[order], self.groups[order]
        is_first = np.ones(len(order), dtype=bool)
        is_first[1:] = (np.diff(members) != 0) | (np.diff(groups) != 0)
        starts = np.flatnonzero(is_first)
        member_starts = np.searchsorted(members[starts], np.arange(len(positions)))
        return Cells(list(positions), order, starts, groups[starts], member_starts)
