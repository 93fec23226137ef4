"""`Measurement`: derives the statistics of one step from its columns."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, reduce
from itertools import compress
from operator import or_
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_adam.config.monitor import Scope
from lightning_adam.statistics.catalogue import Statistic, key_part
from lightning_adam.statistics.columns import (
    ACCUMULATORS,
    ALL_COLUMNS,
    KINDS,
    Accumulator,
    Capabilities,
    ParamSubset,
    column_values,
    sources_of,
)
from lightning_adam.statistics.histograms import QUANTITIES
from lightning_adam.statistics.scopes import Cells, Scopes
from lightning_adam.statistics.sharding import LocalStats

Array = npt.NDArray[np.float64]


class MetricRequest:
    """The requested statistics and their keys.

    Args:
        statistics: The statistics of each scope.
        scopes: The kinds of scope.
        worst: By statistic: number of tensors with the largest values.
        optimizer: Name of the optimizer in the keys; empty if it is the only one.
        rule_statistics: Statistics that are only available from `Measurement.of`.
    """

    def __init__(
        self,
        statistics: Sequence[Statistic],
        scopes: Sequence[Scope] = (Scope.model,),
        worst: Mapping[Statistic, int] | None = None,
        optimizer: str = "",
        rule_statistics: Sequence[Statistic] = (),
    ) -> None:
        self.statistics = list(statistics)
        self.scopes = list(scopes)
        self.worst = dict(worst or {})
        self.rule_statistics = list(rule_statistics)
        self._prefix = f"optimizer/{key_part(optimizer)}/" if optimizer else ""
        self._columns: dict[Capabilities, Columns] = {}
        self._parts: dict[tuple[Scope, str], str] = {}
        self._used: set[str] = set()

    def columns(self, capabilities: Capabilities) -> "Columns":
        """Returns the columns to measure that the optimizer provides."""
        if capabilities not in self._columns:
            self._columns[capabilities] = self._columns_of(capabilities)
        return self._columns[capabilities]

    def _columns_of(self, capabilities: Capabilities) -> "Columns":
        names = {
            ACCUMULATORS[name].column
            for statistic in (*self.statistics, *self.worst, *self.rule_statistics)
            if statistic.needs in capabilities
            for name in statistic.accumulators
        }
        # The number of elements shows which parameters took part in the step.
        needed = sources_of({"elements", *names})
        return Columns(
            [name for name in needed if not ALL_COLUMNS[name].is_maximum],
            [name for name in needed if ALL_COLUMNS[name].is_maximum],
        )

    def unavailable(self, capabilities: Capabilities) -> list[Statistic]:
        """Returns the statistics that the optimizer's state does not provide."""
        requested = (*self.statistics, *self.worst)
        return [each for each in requested if each.needs not in capabilities]

    def key_scope(self, scope: Scope, name: str) -> str:
        """Returns the part of the keys for a scope, the same at each measurement."""
        if scope is Scope.model:
            return self._prefix
        if (scope, name) not in self._parts:
            part = f"{self._prefix}{scope.value}/{key_part(name)}"
            # Two names may only differ in characters that are replaced in keys.
            while part in self._used:
                part += "_"
            self._used.add(part)
            self._parts[scope, name] = part
        return f"{self._parts[scope, name]}/"

    def worst_scope(self, rank: int) -> str:
        """Returns the part of the keys for a rank among the largest values, from 1."""
        return f"{self._prefix}worst_{rank}/"


class Columns(NamedTuple):
    """The columns of the matrices of a measurement: sums and counts, and maxima."""

    sums: list[str]
    maxima: list[str]


def rank_status(capabilities: Capabilities, failed_rank: int | None = None) -> Tensor:
    """Returns the status of this rank, to be reduced by the maximum over ranks.

    Args:
        capabilities: The capabilities of this rank's part of the optimizer.
        failed_rank: This rank if its measurement has failed (default: None).

    Example:
        >>> rank_status(Capabilities.GRADIENT | Capabilities.STEP, failed_rank=1).tolist()
        [-1.0, 0.0, 0.0, 0.0, -1.0, -1.0]
    """
    known = [float(-(each in capabilities)) for each in KINDS]
    failed = -math.inf if failed_rank is None else -float(failed_rank)
    # Explicit device, independent of torch.set_default_device.
    return torch.tensor([*known, failed], dtype=torch.float64, device="cpu")


class Measurement:
    """The columns of one step, and the statistics derived from them.

    Args:
        request: The requested statistics.
        columns: The columns of the matrices.
        scopes: The names and groups of the tensors, which are the rows of the matrices.
        subsets: By group: the subsets of its tensors.
        stats: The matrices `[tensors, columns]`, and counts by exponent `[groups, quantities,
            bins]` with 0 groups if there are none.
    """

    def __init__(
        self,
        request: MetricRequest,
        columns: Columns,
        scopes: Scopes,
        subsets: Sequence[frozenset[ParamSubset]],
        stats: LocalStats,
    ) -> None:
        self.request = request
        self.columns = columns
        self.subsets = subsets
        self.stats = stats
        self._all_scopes = scopes
        self._columns: dict[str, Array] = {}
        self._cells: dict[tuple[Scope, str, bool], Array] = {}
        self._rows: dict[Scope, dict[str, Array]] = {}

    @cached_property
    def capabilities(self) -> Capabilities:
        """The capabilities of the optimizer on all ranks."""
        known = compress(KINDS, (each < 0 for each in self.stats.status.tolist()))
        return reduce(or_, known, Capabilities.SETTINGS)

    @property
    def failed_rank(self) -> int | None:
        """The first rank on which the measurement failed; None if there is none."""
        first = -float(self.stats.status[-1])
        return int(first) if math.isfinite(first) else None

    @property
    def is_empty(self) -> bool:
        """Whether no parameter took part in the step."""
        return not len(self.scopes)

    @property
    def has_nonfinite(self) -> bool:
        """Whether any measured element is NaN or infinite."""
        if self.is_empty or "nonfinite" not in self.columns.sums:
            return False
        return bool((self.stats.sums[:, self.columns.sums.index("nonfinite")] > 0).any())

    def copy(self) -> "Measurement":
        """Returns a copy without derived statistics and outside pinned memory."""
        stats = LocalStats(*(each.clone() if each.is_pinned() else each for each in self.stats))
        return self.with_stats(stats)

    def with_stats(self, stats: LocalStats) -> "Measurement":
        """Returns a measurement with other matrices, such as copies on the host."""
        return Measurement(self.request, self.columns, self._all_scopes, self.subsets, stats)

    def values(self) -> dict[str, float]:
        """Returns the statistics by key. Undefined ones are absent."""
        values: dict[str, float] = {}
        for scope in self._distinct_scopes():
            rows = self._derive(scope, self.request.statistics)
            for name, row in zip(self.scopes.members(scope), rows, strict=True):
                part = self.request.key_scope(scope, name)
                values |= {statistic.key_of(part): value for statistic, value in row}
        return values | {key: value for key, (value, _) in self.worst_tensors().items()}

    def worst_tensors(self) -> dict[str, tuple[float, str]]:
        """Returns by key the largest values of the statistics in `worst`, and their tensors."""
        worst: dict[str, tuple[float, str]] = {}
        for statistic, tensors in self.request.worst.items():
            values = self.of_tensors(statistic)
            for rank, tensor in enumerate(largest_first(values)[:tensors], 1):
                key = statistic.key_of(self.request.worst_scope(rank))
                worst[key] = (values[tensor], tensor)
        return worst

    def table(self, scope: Scope) -> list[dict[str, str | float]]:
        """Returns the statistics by name as rows, one for each scope of a kind."""
        found = self.of(scope, self.request.statistics)
        return [{scope.value: name} | row for name, row in found.items()]

    def of(self, scope: Scope, statistics: Iterable[Statistic]) -> dict[str, dict[str, float]]:
        """Returns statistics by name, for each scope of a kind.

        Args:
            scope: The kind of scope.
            statistics: The statistics. Those that are undefined or not measured are absent.
        """
        rows = self._derive(scope, statistics)
        return {
            name: {statistic.name: value for statistic, value in row}
            for name, row in zip(self.scopes.members(scope), rows, strict=True)
        }

    def of_tensors(self, statistic: Statistic) -> dict[str, float]:
        """Returns the values of a statistic by tensor. Undefined ones are absent."""
        rows = self._derive(Scope.tensor, [statistic])
        members = self.scopes.members(Scope.tensor)
        return {name: value for name, row in zip(members, rows, strict=True) for _, value in row}

    def largest(self, scope: Scope, settings: Iterable[str]) -> dict[str, dict[str, float]]:
        """Returns the largest values of hyperparameters for each scope of a kind.

        Args:
            scope: The kind of scope.
            settings: Names of hyperparameter columns.
        """
        found: dict[str, dict[str, float]] = {name: {} for name in self.scopes.members(scope)}
        for setting in settings:
            if self._is_measured([setting]):
                for row, value in zip(found.values(), self._reduced(scope, setting), strict=True):
                    if not math.isnan(value):
                        row[setting] = value
        return found

    def tensors_of(self, scope: str) -> set[str]:
        """Returns the names of the tensors in a scope, such as `model` or `group/<name>`."""
        return self.scopes.inside(scope)

    def exponent_counts(self) -> dict[str, list[int]]:
        """Returns the counts by binary exponent for the model and each group, by key."""
        by_group = self.stats.exponents.cpu()
        if not len(by_group):
            return {}
        of_group = dict(zip(self._all_scopes.group_names, by_group, strict=True))
        counts = {self.request.key_scope(Scope.model, ""): by_group.sum(0)}
        for name in self.scopes.members(Scope.group) if len(self.subsets) > 1 else ():
            counts[self.request.key_scope(Scope.group, name)] = of_group[name]
        return {
            f"adam_histogram/{part}{quantity}": row.tolist()
            for part, quantities in counts.items()
            for quantity, row in zip(QUANTITIES, quantities, strict=True)
        }

    def _distinct_scopes(self) -> list[Scope]:
        """Returns the kinds of scope, with a single parameter group replaced by the model."""
        scopes = self.request.scopes
        if len(self.subsets) == 1:
            scopes = [Scope.model if each is Scope.group else each for each in scopes]
        return list(dict.fromkeys(scopes))

    def _derive(
        self, scope: Scope, statistics: Iterable[Statistic]
    ) -> list[list[tuple[Statistic, float]]]:
        """Returns the defined statistics for each scope of a kind."""
        derived: list[list[tuple[Statistic, float]]] = [[] for _ in self.scopes.members(scope)]
        for statistic in statistics:
            if self._is_measured(statistic.accumulators):
                accumulators = [self._reduced(scope, name) for name in statistic.accumulators]
                for row, values in zip(derived, zip(*accumulators, strict=True), strict=True):
                    value = statistic.derive(*values)
                    if value is not None:
                        row.append((statistic, value))
        return derived

    @cached_property
    def scopes(self) -> Scopes:
        """The names and groups of the tensors that took part in the step."""
        if self._has_elements is None:
            return self._all_scopes
        return self._all_scopes.select(np.flatnonzero(self._has_elements))

    @cached_property
    def _has_elements(self) -> npt.NDArray[np.bool_] | None:
        """For each tensor: whether it took part in the step; None if all did."""
        if not len(self._all_scopes):
            return None
        # In numpy, as torch would start its threads.
        is_measured: Any = self.stats.sums[:, self.columns.sums.index("elements")].cpu().numpy() > 0
        return None if is_measured.all() else is_measured

    @cached_property
    def _known(self) -> dict[str, Array]:
        """The measured columns of the tensors that took part in the step."""
        known = {}
        for names, matrix in (
            (self.columns.sums, self.stats.sums),
            (self.columns.maxima, self.stats.maxima),
        ):
            for name, column in zip(names, matrix.cpu().numpy().T, strict=True):
                known[name] = column if self._has_elements is None else column[self._has_elements]
        return known

    @cached_property
    def _measured(self) -> frozenset[str]:
        """The measured columns that the optimizer provides."""
        capabilities = self.capabilities
        return frozenset(
            name
            for name in (*self.columns.sums, *self.columns.maxima)
            if ALL_COLUMNS[name].needs in capabilities
        )

    def _is_measured(self, accumulators: Iterable[str]) -> bool:
        capabilities = self.capabilities
        taken = [ACCUMULATORS[name] for name in accumulators]
        return (
            not self.is_empty
            and all(each.needs in capabilities for each in taken)
            and self._measured.issuperset(sources_of(each.column for each in taken))
        )

    def _reduced(self, scope: Scope, accumulator: str) -> list[float]:
        """Returns an accumulator for each scope of a kind."""
        rows = self._rows.setdefault(scope, {})
        if accumulator not in rows:
            with np.errstate(all="ignore"):
                rows[accumulator] = self._reduce(scope, ACCUMULATORS[accumulator])
        values: list[float] = rows[accumulator].tolist()
        return values

    def _reduce(self, scope: Scope, accumulator: Accumulator) -> Array:
        cells = self.scopes.cells(scope)
        column = ALL_COLUMNS[accumulator.column]
        values = self._cells_of(cells, scope, accumulator)
        if accumulator.subset is not ParamSubset.ALL:
            is_inside = np.array([accumulator.subset in each for each in self.subsets])
            values = np.where(is_inside[cells.groups], values, column.empty)
        if len(cells.members) == len(values):
            return values
        operation = np.maximum if column.is_maximum else np.add
        reduced: Array = operation.reduceat(values, cells.member_starts)
        return reduced

    def _cells_of(self, cells: Cells, scope: Scope, accumulator: Accumulator) -> Array:
        """Returns a column reduced to the cells of a kind of scope; one per group for the model."""
        name, _, is_negated = accumulator
        key = (Scope.group if scope is Scope.model else scope, name, is_negated)
        if key not in self._cells:
            values = self._column(name)
            if is_negated:
                self._cells[key] = -cells.reduce(values, np.minimum)
            else:
                is_maximum = ALL_COLUMNS[name].is_maximum
                self._cells[key] = cells.reduce(values, np.maximum if is_maximum else np.add)
        return self._cells[key]

    def _column(self, name: str) -> Array:
        """Returns a column of all tensors that took part in the step."""
        if name not in self._columns:
            self._columns[name] = np.asarray(column_values(name, self._known), dtype=np.float64)
        return self._columns[name]


def largest_first(values: Mapping[str, float]) -> list[str]:
    """Returns names sorted by value, largest first. NaN comes before all numbers.

    Example:
        >>> largest_first({"a": 1.0, "b": math.nan, "c": 2.0})
        ['b', 'c', 'a']
    """
    order = {name: math.inf if math.isnan(value) else value for name, value in values.items()}
    return sorted(values, key=order.__getitem__, reverse=True)
