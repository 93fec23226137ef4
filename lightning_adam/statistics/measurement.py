"""One measurement: from its matrix of columns to the statistics by key."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, reduce
from itertools import compress
from operator import or_
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_adam.config.monitor import Scope
from lightning_adam.statistics.accumulators import ACCUMULATORS, COLUMNS, KINDS, Knowledge, Over
from lightning_adam.statistics.catalogue import Statistic, key_part
from lightning_adam.statistics.histograms import QUANTITIES
from lightning_adam.statistics.views import Place, Row

Array = npt.NDArray[np.float64]


class Wanted:
    """What is derived from a measurement, and the keys that it goes under.

    Args:
        statistics: What is derived for each scope.
        scopes: The kinds of scope.
        worst: For each of these statistics, how many tensors with its largest values.
        suffix: What tells the optimizer from others in the keys.
        judged: What `Measurement.of` is asked for beside these statistics.
    """

    def __init__(
        self,
        statistics: list[Statistic],
        scopes: list[Scope],
        worst: dict[Statistic, int],
        suffix: str,
        judged: list[Statistic],
    ) -> None:
        self.statistics = statistics
        self.scopes = scopes
        self.worst = worst
        self.suffix = suffix
        self.judged = judged
        self._suffixes: dict[tuple[Scope, str], str] = {}
        self._taken: set[str] = set()

    def accumulators(self, knowledge: Knowledge) -> list[str]:
        """What has to be added up, as far as the optimizer's state tells it."""
        needed = {
            name
            for statistic in [*self.statistics, *self.worst, *self.judged]
            if statistic.needs in knowledge
            for name in statistic.accumulators
        }
        return [name for name in ACCUMULATORS if name in needed]

    def beyond(self, knowledge: Knowledge) -> list[Statistic]:
        """Those that the optimizer's state does not tell."""
        return [each for each in (*self.statistics, *self.worst) if each.needs not in knowledge]

    def suffix_of(self, scope: Scope, name: str) -> str:
        """What a group, a layer or a tensor appends to a key, the same at every measurement."""
        if (scope, name) not in self._suffixes:
            suffix = f"{self.suffix}/{scope.value}/{key_part(name)}"
            # Two names may differ only in what no key can hold.
            while suffix in self._taken:
                suffix += "_"
            self._taken.add(suffix)
            self._suffixes[scope, name] = suffix
        return self._suffixes[scope, name]


class Columns(NamedTuple):
    """The columns of a matrix of rows: sums and counts, then maxima."""

    sums: list[str]
    maxima: list[str]


def columns_of(accumulators: Iterable[str]) -> Columns:
    """The columns that accumulators are taken of, and the elements, which tell what took part.

    Example:
        >>> columns_of(["lr", "negated_smallest_lr", "coupled_decay_squares"])
        Columns(sums=['elements', 'decay_squares'], maxima=['lr'])
    """
    needed = {"elements", *(ACCUMULATORS[name].column for name in accumulators)}
    ordered = [name for name in COLUMNS if name in needed]
    return Columns(
        [name for name in ordered if not COLUMNS[name].is_maximum],
        [name for name in ordered if COLUMNS[name].is_maximum],
    )


class Tensors(NamedTuple):
    """What is kept of the tensors: where they stand, and which accumulators are taken over them."""

    places: list[Place]
    kinds: list[int]
    """The position of each tensor's kind."""
    over: list[set[Over]]
    """The kinds."""

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Tensors":
        """What is kept of them."""
        positions: dict[tuple[int, bool], int] = {}
        over: list[set[Over]] = []
        kinds = []
        for row in rows:
            key = (id(row.settings), row.has_amsgrad)
            if key not in positions:
                positions[key] = len(over)
                over.append(_over(row))
            kinds.append(positions[key])
        return cls([row.place for row in rows], kinds, over)


def _over(row: Row) -> set[Over]:
    over = {Over.ALL}
    if row.settings.weight_decay > 0:
        over.add(Over.DECOUPLED if row.settings.decoupled else Over.COUPLED)
    if row.has_amsgrad:
        over.add(Over.AMSGRAD)
    return over


def agreement(knowledge: Knowledge, failed_rank: int | None = None) -> Tensor:
    """What the ranks have to agree on: the largest of each number counts.

    Args:
        knowledge: What this rank's part of the optimizer's state allows to tell.
        failed_rank: This rank, if its measurement has failed (default: None, it has not).

    Example:
        >>> agreement(Knowledge.GRADIENT | Knowledge.STEP, failed_rank=1).tolist()
        [-1.0, 0.0, 0.0, 0.0, -1.0, -1.0]
    """
    known = [float(-(each in knowledge)) for each in KINDS]
    failed = -math.inf if failed_rank is None else -float(failed_rank)
    return torch.tensor([*known, failed], dtype=torch.float64)


class Measurement:
    """What one step did.

    Args:
        wanted: What is derived.
        columns: What is told of each tensor.
        tensors: The tensors; those of which no element took part are passed over.
        sums: Their columns that add up, `[tensors, columns]`.
        maxima: Their columns of maxima, `[tensors, columns]`.
        exponents: Counts `[groups, quantities, bins]`; of no groups if they were not taken.
        agreed: What `agreement` made, the largest of all ranks'.
    """

    def __init__(
        self,
        wanted: Wanted,
        columns: Columns,
        tensors: Tensors,
        sums: Tensor,
        maxima: Tensor,
        exponents: Tensor,
        agreed: Tensor,
    ) -> None:
        self.wanted = wanted
        self.columns = columns
        self.tensors = tensors
        self.sums, self.maxima, self.exponents = sums, maxima, exponents
        self.agreed = agreed
        self._rolled: dict[Scope, dict[str, dict[str, float]]] = {}

    @property
    def knowledge(self) -> Knowledge:
        """What the optimizer's state allows to tell, on every rank."""
        known = compress(KINDS, (each < 0 for each in self.agreed.tolist()))
        return reduce(or_, known, Knowledge.SETTINGS)

    @property
    def failed_rank(self) -> int | None:
        """The first rank on which the measurement has failed; None if it has on none."""
        first = -float(self.agreed[-1])
        return int(first) if math.isfinite(first) else None

    @property
    def is_empty(self) -> bool:
        """Whether no parameter took part in the step."""
        return not self._taking_part.places

    @property
    def has_nonfinite(self) -> bool:
        """Whether any element is not finite, as far as that is measured."""
        if "nonfinite" not in self.columns.sums:
            return False
        return bool((self.sums[:, self.columns.sums.index("nonfinite")] > 0).any())

    def renewed(self, own: bool = False) -> "Measurement":
        """The same measurement, of which nothing is derived yet.

        Args:
            own: Whether pinned memory, which is scarce, is left for ordinary one (default: False).
        """
        told = [self.sums, self.maxima, self.exponents, self.agreed]
        if own:
            told = [each.clone() if each.is_pinned() else each for each in told]
        return Measurement(self.wanted, self.columns, self.tensors, *told)

    def values(self) -> dict[str, float]:
        """The statistics by key; those that are undefined in a scope are absent."""
        values = {}
        for scope in self.wanted.scopes:
            for suffix, row in self._rolled_up(scope).items():
                for statistic, value in _derived(self._derivable, row):
                    values[statistic.key + suffix] = value
        return values | self._worst_tensors()

    def table(self, scope: Scope) -> list[dict[str, str | float]]:
        """The statistics as rows, one for each of the scope's, by their bare names."""
        rows = self._rolled_up(scope).values()
        return [
            {scope.value: name}
            | {statistic.name: value for statistic, value in _derived(self._derivable, row)}
            for name, row in zip(self._members(scope).names, rows, strict=True)
        ]

    def of(self, scope: Scope, statistics: Iterable[Statistic]) -> dict[str, dict[str, float]]:
        """Statistics by their bare names, of each of the scope's by its name.

        Args:
            scope: The kind of scope.
            statistics: Which; those that are undefined, or were not asked for, are absent.
        """
        statistics, rows = self._derivable_of(statistics), self._rolled_up(scope).values()
        return {
            name: {each.name: value for each, value in _derived(statistics, row)}
            for name, row in zip(self._members(scope).names, rows, strict=False)
        }

    def largest(self, scope: Scope, settings: Iterable[str]) -> dict[str, dict[str, float]]:
        """The largest values of settings in each of the scope's, by its name.

        Args:
            scope: The kind of scope.
            settings: Names of statistics of the schedule, each of one accumulator and its smallest.
        """
        settings, rows = list(settings), self._rolled_up(scope).values()
        return {
            name: {each: row[each] for each in settings if not math.isnan(row.get(each, math.nan))}
            for name, row in zip(self._members(scope).names, rows, strict=False)
        }

    def tensors_of(self, scope: str) -> set[str]:
        """The names of a scope's tensors, the scope given as `model`, `group/<name>` and so on."""
        kind, _, name = scope.partition("/")
        places = self._taking_part.places
        return {each.tensor for each in places if not name or getattr(each, kind) == name}

    def exponent_counts(self) -> dict[str, list[int]]:
        """The counts by binary exponent of the model and of each group, by key."""
        by_group = self.exponents.cpu()
        if not len(by_group):
            return {}
        names = dict.fromkeys(place.group for place in self.tensors.places)
        of_group = dict(zip(names, by_group, strict=True))
        members = self._members(Scope.group)
        scopes = {self.wanted.suffix: by_group.sum(0)}
        scopes |= {
            suffix: of_group[name]
            for name, suffix in zip(members.names, members.suffixes, strict=True)
        }
        return {
            f"adam_histogram/{quantity}{suffix}": counts.tolist()
            for suffix, quantities in scopes.items()
            for quantity, counts in zip(QUANTITIES, quantities, strict=True)
        }

    def _members(self, scope: Scope) -> "_Members":
        places = self._taking_part.places
        if scope is Scope.model:
            return _Members(["model"], [self.wanted.suffix], [0] * len(places))
        names = [getattr(place, scope.value) for place in places]
        positions = {name: position for position, name in enumerate(dict.fromkeys(names))}
        suffixes = [self.wanted.suffix_of(scope, name) for name in positions]
        return _Members(list(positions), suffixes, [positions[name] for name in names])

    @cached_property
    def _taking_part(self) -> Tensors:
        if not self.tensors.places:
            return self.tensors
        is_part = (self._rows[:, self._position["elements"]] > 0).tolist()
        places, kinds, over = self.tensors
        return Tensors(list(compress(places, is_part)), list(compress(kinds, is_part)), over)

    @cached_property
    def _rows(self) -> Array:
        """The columns of each tensor."""
        # In numpy: torch would wake its threads for so little.
        return np.concatenate([self.sums.cpu().numpy(), self.maxima.cpu().numpy()], axis=1)

    @cached_property
    def _position(self) -> dict[str, int]:
        """Where each column stands."""
        sums, maxima = self.columns
        return {name: index for index, name in enumerate([*sums, *maxima])}

    @cached_property
    def _accumulators(self) -> list[str]:
        return self.wanted.accumulators(self.knowledge)

    @cached_property
    def _derivable(self) -> list[Statistic]:
        return self._derivable_of(self.wanted.statistics)

    def _derivable_of(self, statistics: Iterable[Statistic]) -> list[Statistic]:
        """Those that have all of their accumulators."""
        there = {*self._accumulators}
        return [each for each in statistics if there.issuperset(each.accumulators)]

    @cached_property
    def _accumulated(self) -> Array:
        """The accumulators of each tensor that took part, `[tensors, accumulators]`."""
        _, kinds, over = self._taking_part
        taken = [ACCUMULATORS[name] for name in self._accumulators]
        rows = self._rows[self._rows[:, self._position["elements"]] > 0]
        rows = rows[:, [self._position[each.column] for each in taken]]
        nothing = np.array([COLUMNS[each.column].nothing for each in taken])
        is_over = np.array([[each.over in some for each in taken] for some in over])
        counts = is_over[kinds] & (rows != nothing)
        signs = np.array([-1.0 if each.is_negated else 1.0 for each in taken])
        return np.where(counts, signs * rows, nothing)

    def _rolled_up(self, scope: Scope) -> dict[str, dict[str, float]]:
        """The accumulators, by name, of each of the scope's, by what it appends to a key."""
        if scope not in self._rolled:
            self._rolled[scope] = self._roll_up(scope)
        return self._rolled[scope]

    def _roll_up(self, scope: Scope) -> dict[str, dict[str, float]]:
        if self.is_empty or not self._accumulators:
            return {}
        _, suffixes, members = self._members(scope)
        rows, order = self._accumulated, np.argsort(members, kind="stable")
        firsts = np.searchsorted(np.asarray(members)[order], np.arange(len(suffixes)))
        are_maxima = [ACCUMULATORS[name].is_maximum for name in self._accumulators]
        with np.errstate(all="ignore"):
            added = np.add.reduceat(rows[order], firsts)
            largest = np.maximum.reduceat(rows[order], firsts)
        return {
            suffix: dict(zip(self._accumulators, row, strict=True))
            for suffix, row in zip(
                suffixes, np.where(are_maxima, largest, added).tolist(), strict=True
            )
        }

    def _worst_tensors(self) -> dict[str, float]:
        """The tensors with the largest values of the statistics that `worst` names."""
        worst: dict[str, float] = {}
        rows = self._rolled_up(Scope.tensor) if self.wanted.worst else {}
        for statistic, tensors in self.wanted.worst.items():
            values = {
                statistic.key + suffix: value
                for suffix, row in rows.items()
                for _, value in _derived(self._derivable_of([statistic]), row)
            }
            # NaN is the worst there is.
            order = {key: math.inf if math.isnan(value) else value for key, value in values.items()}
            for key in sorted(values, key=order.__getitem__, reverse=True)[:tensors]:
                worst[key] = values[key]
        return worst


class Copies:
    """Tensors on their way to the host, which waits for nothing.

    Args:
        tensors: The tensors; those of CUDA are of one device.

    Example:
        >>> copies = Copies([torch.tensor(2.0)])
        >>> copies.have_arrived(), copies.tensors()
        (True, [tensor(2.)])
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._copies = [_copy(each) for each in tensors]
        self._event: torch.cuda.Event | None = None
        device = next((each.device for each in tensors if each.is_cuda), None)
        if device is not None:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def have_arrived(self) -> bool:
        """Whether they can be had without waiting."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def tensors(self) -> list[Tensor]:
        """The copies; waits for them."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies


class Arriving:
    """A measurement on its way to the host, which waits for nothing.

    Args:
        measurement: The measurement.
        others: Numbers of the same device that are wanted with it (default: none).
    """

    def __init__(self, measurement: Measurement, others: Sequence[Tensor] = ()) -> None:
        self._measurement = measurement
        self._columns = measurement.sums.shape[1]
        rows = measurement.sums
        if rows.is_cuda:
            # One copy of all.
            rows = torch.cat([measurement.sums, measurement.maxima], dim=1)
        self._is_copied = rows.is_cuda
        self._copies = Copies([rows, measurement.exponents, measurement.agreed, *others])

    def has_arrived(self) -> bool:
        """Whether it can be had without waiting."""
        return self._copies.have_arrived()

    def others(self) -> list[float]:
        """The other numbers; waits for them."""
        return [float(each) for each in self._copies.tensors()[3:]]

    def measurement(self) -> Measurement:
        """The measurement on the host; waits for it."""
        arrived = self._measurement
        rows, exponents, agreed = self._copies.tensors()[:3]
        if self._is_copied:
            sums, maxima = torch.tensor_split(rows, [self._columns], dim=1)
            arrived = Measurement(
                *(arrived.wanted, arrived.columns, arrived.tensors),
                *(sums, maxima, exponents, agreed),
            )
        return arrived


def _copy(tensor: Tensor) -> Tensor:
    """Begins a copy to memory that the device can write into by itself."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class _Members(NamedTuple):
    """The scopes of one kind."""

    names: list[str]
    suffixes: list[str]
    """What each appends to a key."""
    tensors: list[int]
    """The position of each tensor's scope."""


def _derived(
    statistics: Iterable[Statistic], row: Mapping[str, float]
) -> Iterator[tuple[Statistic, float]]:
    """Those of a scope's statistics that its accumulators define."""
    for statistic in statistics:
        value = statistic.derive(*[row[name] for name in statistic.accumulators])
        if value is not None:
            yield statistic, value
