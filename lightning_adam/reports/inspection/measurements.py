"""Measures the last step of a saved optimizer, as far as it does not need the gradient.

Uses the kernels, columns and statistics of `AdamMonitor`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_adam.config.monitor import Scope
from lightning_adam.reports.inspection.saved_optimizer import SavedOptimizer
from lightning_adam.statistics import kernels
from lightning_adam.statistics.catalogue import STATISTICS, Statistic, ratio
from lightning_adam.statistics.columns import ACCUMULATORS, GIVEN, Capabilities, sources_of
from lightning_adam.statistics.histograms import (
    BINS,
    DENOMINATOR_POSITION,
    HARMLESS,
    QUANTITIES,
    magnitude_above,
)
from lightning_adam.statistics.measurement import Measurement, MetricRequest, rank_status
from lightning_adam.statistics.param_states import MOMENTS, Layout, ParamStates, in_parts
from lightning_adam.statistics.sharding import LocalStats
from lightning_adam.statistics.state_reader import StateReader, capabilities_of

WEIGHT_COLUMNS = frozenset(
    {
        "weight_squares",
        "weight_nonzero",
        "update_lost",
        "decay_lost",
        "undecayed_squares",
        "undecayed_times_update",
        "undecayed_over_denominator_squares",
    }
)
"""Columns that require the parameters."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_ELEMENTS = 1 << 22
"""Number of elements to copy at a time: 64 MB, unless a single tensor has more."""


def _underflowed(active: float, second_moment_positive: float, elements: float) -> float | None:
    """Fraction of elements with a second moment of 0 but a nonzero first moment."""
    return ratio(active - second_moment_positive, elements)


UNDERFLOWED = Statistic(
    name="exp_avg_sq_underflowed_fraction",
    family="underflow",
    meaning=_underflowed.__doc__ or "",
    formula="fraction of elements with v=0 and m≠0",
    unit="fraction",
    source="",
    is_headline=False,
    accumulators=("active", "second_moment_positive", "elements"),
    derive=_underflowed,
)
"""Replaces `exp_avg_sq_zero_fraction`, which needs the gradient."""


class LastStep(NamedTuple):
    """The measurement of the last step."""

    states: ParamStates
    measurement: Measurement
    exponents: Tensor
    """Counts by binary exponent, `[tensors, quantities, bins]`; empty if the step is unknown."""
    statistics: list[Statistic]
    """The statistics that can be computed from the checkpoint."""

    @property
    def names(self) -> set[str]:
        """The names of the statistics."""
        return {each.name for each in self.statistics}

    def model(self) -> Mapping[str, float]:
        """Returns the statistics of the model."""
        return self.measurement.of(Scope.model, self.statistics).get("model", {})

    def denominators(self, scope: str = "model") -> list[int]:
        """Returns the counts of √v̂ by binary exponent in a scope."""
        tensors = self.measurement.tensors_of(scope)
        chosen = [name.tensor in tensors for name in self.states.scopes.names]
        counts: list[int] = (
            self.exponents[torch.tensor(chosen), DENOMINATOR_POSITION].sum(0).tolist()
        )
        return counts

    def low_denominator(self, scope: str) -> float | None:
        """Returns the 1st percentile of √v̂ in a scope."""
        return magnitude_above(self.denominators(scope), HARMLESS)


def measure_last_step(saved: SavedOptimizer) -> LastStep:
    """Measures the last step of a saved optimizer."""
    states = StateReader().after_step(saved.optimizer)
    statistics = available_statistics(saved, states)
    exponents = torch.zeros(0, len(QUANTITIES), BINS, dtype=torch.int64)
    if saved.is_adam:
        counts = [
            kernels.count_exponents(part, range(len(part)), len(part))
            for part in _parts(states, "counting")
        ]
        exponents = torch.cat(counts)
    measurement = measure(states, statistics, optimizer=saved.name, exponents=exponents)
    return LastStep(states, measurement, exponents, statistics)


def available_statistics(saved: SavedOptimizer, states: ParamStates) -> list[Statistic]:
    """Returns the statistics that need no gradient, and no weights if they are unknown.

    `nonfinite_count` is included, because a non-finite gradient makes the first moment non-finite.
    """
    capabilities = capabilities_of(saved.optimizer, states) & ~Capabilities.GRADIENT
    return [
        each
        for each in (*STATISTICS.values(), UNDERFLOWED)
        if (each.needs in capabilities or each.name == "nonfinite_count")
        and not GIVEN.keys() & _sources(each)
        and (saved.weights or not WEIGHT_COLUMNS & _sources(each))
    ]


def _sources(statistic: Statistic) -> set[str]:
    return set(sources_of(ACCUMULATORS[name].column for name in statistic.accumulators))


Change = Callable[[ParamStates], ParamStates]


def measure(
    states: ParamStates,
    statistics: Iterable[Statistic],
    change: Change | None = None,
    optimizer: str = "",
    exponents: Tensor | None = None,
) -> Measurement:
    """Measures statistics in all scopes.

    Args:
        states: The tensors.
        statistics: The statistics.
        change: Applied to the tensors before the measurement (default: None).
        optimizer: Name of the optimizer in the keys (default: empty, it is the only one).
        exponents: Counts by binary exponent for each tensor (default: None).

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> adam = torch.optim.Adam([weight], eps=1.0)
        >>> weight.grad = torch.ones(3)
        >>> adam.step()
        >>> states, update = StateReader().after_step(adam), STATISTICS["normalized_update_max"]
        >>> measure(states, [update]).of(Scope.model, [update])
        {'model': {'normalized_update_max': 0.5}}
        >>> measure(states, [update], with_eps(3.0)).of(Scope.model, [update])
        {'model': {'normalized_update_max': 0.25}}
    """
    request = MetricRequest(list(statistics), [*Scope], optimizer=optimizer)
    columns = request.columns(Capabilities.ALL)
    matrices = [
        kernels.measure(part if change is None else change(part), [*columns.sums, *columns.maxima])
        for part in _parts(states, "measuring")
    ]
    sums, maxima = torch.tensor_split(torch.cat(matrices), [len(columns.sums)], dim=1)
    by_group = torch.zeros(0, len(QUANTITIES), BINS, dtype=torch.int64)
    if exponents is not None and len(exponents):
        names = states.scopes.group_names
        groups = torch.tensor([names.index(each.group) for each in states.scopes.names])
        by_group = exponents.new_zeros(len(names), *exponents.shape[1:])
        by_group.index_add_(0, groups, exponents)
    stats = LocalStats(sums, maxima, by_group, rank_status(Capabilities.ALL))
    subsets = [each.subsets for each in states.settings]
    return Measurement(request, columns, states.scopes, subsets, stats)


def with_eps(eps: float) -> Change:
    """Returns a change that sets another eps."""
    return lambda states: replace(
        states, settings=[each._replace(eps=eps) for each in states.settings]
    )


def in_dtype(dtype: torch.dtype) -> Change:
    """Returns a change that casts parameters and moments to another dtype."""

    def change(states: ParamStates) -> ParamStates:
        cast: dict[str, Any] = {
            name: [None if each is None else each.to(dtype) for each in getattr(states, name)]
            for name in ("parameter", "grad", *MOMENTS)
        }
        return replace(states, layout=Layout(), **cast)

    return change


def _parts(states: ParamStates, activity: str) -> Iterator[ParamStates]:
    """Yields the tensors in parts, so that copies of them fit into memory."""
    # The bar is only shown in a terminal.
    bar = tqdm(states, desc=activity, unit="tensor", leave=False, disable=None)
    return map(ParamStates.of, in_parts(bar, MAX_ELEMENTS))
