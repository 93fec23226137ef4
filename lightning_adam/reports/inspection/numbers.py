"""A saved optimizer → measurements of its last step, without the gradient, as it was and changed.

Nothing is defined here: kernels, columns and statistics are those that a training is measured by.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_adam.reports.inspection.saved import Saved
from lightning_adam.statistics import kernels
from lightning_adam.statistics.catalogue import STATISTICS, Statistic, ratio
from lightning_adam.statistics.columns import ACCUMULATORS, GIVEN, Capabilities, sources_of
from lightning_adam.statistics.histograms import BINS, DENOMINATOR_POSITION, QUANTITIES
from lightning_adam.statistics.measurement import Measurement, MetricRequest, rank_status
from lightning_adam.statistics.param_states import MOMENTS, Layout, ParamStates, in_parts
from lightning_adam.statistics.sharding import LocalStats
from lightning_adam.statistics.state_reader import StateReader, capabilities_of

OF_WEIGHTS = frozenset(
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
"""Columns that depend on the parameters."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
AT_A_TIME = 1 << 22
"""Elements that are copied at a time: 64 MB, if no tensor is larger."""


def _underflowed(active: float, second_moment_positive: float, elements: float) -> float | None:
    """Share of elements whose first moment is not 0, though the second is."""
    return ratio(active - second_moment_positive, elements)


UNDERFLOWED = Statistic(
    name="exp_avg_sq_underflowed_fraction",
    family="underflow",
    meaning=_underflowed.__doc__ or "",
    formula="share of elements with v=0 and m≠0",
    unit="fraction",
    source="",
    is_headline=False,
    accumulators=("active", "second_moment_positive", "elements"),
    derive=_underflowed,
)
"""What a state tells of `exp_avg_sq_zero_fraction`, which needs the gradient."""


class Moments(NamedTuple):
    """What is measured of an optimizer, as it was saved."""

    states: ParamStates
    measurement: Measurement
    exponents: Tensor
    """Counts of each tensor's √v̂ by binary exponent, `[tensors, 256]`."""
    known: list[Statistic]
    """The statistics that the file tells."""


def moments_of(saved: Saved) -> Moments:
    """Measures what was saved."""
    states = StateReader().after_step(saved.optimizer)
    known = known_statistics(saved, states)
    exponents = torch.zeros(len(states), 0)
    if saved.is_adams:
        counts = [
            kernels.count_exponents(few, range(len(few)), len(few))[:, DENOMINATOR_POSITION]
            for few in _few(states, "counting")
        ]
        exponents = torch.cat(counts)
    return Moments(states, measured(states, known), exponents, known)


def known_statistics(saved: Saved, states: ParamStates) -> list[Statistic]:
    """The statistics that need no gradient, and no weights where these are not known.

    A gradient that is not finite leaves a first moment that is not, so that what is not finite is
    counted all the same. What was given to a measurement, such as skipped steps, no file tells.
    """
    capabilities = capabilities_of(saved.optimizer, states) & ~Capabilities.GRADIENT
    return [
        each
        for each in (*STATISTICS.values(), UNDERFLOWED)
        if (each.needs in capabilities or each.name == "nonfinite_count")
        and not GIVEN.keys() & _sources(each)
        and (saved.weights or not OF_WEIGHTS & _sources(each))
    ]


def _sources(statistic: Statistic) -> set[str]:
    return set(sources_of(ACCUMULATORS[name].column for name in statistic.accumulators))


Change = Callable[[ParamStates], ParamStates]


def measured(
    states: ParamStates, statistics: Iterable[Statistic], change: Change | None = None
) -> Measurement:
    """A measurement of some statistics.

    Args:
        states: The tensors.
        statistics: What is to be derived.
        change: What is done to them before (default: nothing).

    Example:
        >>> from lightning_adam.config.monitor import Scope
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> adam = torch.optim.Adam([weight], eps=1.0)
        >>> weight.grad = torch.ones(3)
        >>> adam.step()
        >>> states, update = StateReader().after_step(adam), STATISTICS["normalized_update_max"]
        >>> measured(states, [update]).of(Scope.model, [update])
        {'model': {'normalized_update_max': 0.5}}
        >>> measured(states, [update], with_eps(3.0)).of(Scope.model, [update])
        {'model': {'normalized_update_max': 0.25}}
    """
    request = MetricRequest(list(statistics))
    columns = request.columns(Capabilities.ALL)
    parts = [
        kernels.measure(few if change is None else change(few), [*columns.sums, *columns.maxima])
        for few in _few(states, "measuring")
    ]
    sums, maxima = torch.tensor_split(torch.cat(parts), [len(columns.sums)], dim=1)
    no_exponents = torch.zeros(0, len(QUANTITIES), BINS, dtype=torch.int64)
    stats = LocalStats(sums, maxima, no_exponents, rank_status(Capabilities.ALL))
    subsets = [each.subsets for each in states.settings]
    return Measurement(request, columns, states.scopes, subsets, stats)


def with_eps(eps: float) -> Change:
    """The same moments, divided with another eps.

    Args:
        eps: The eps.
    """
    return lambda states: replace(
        states, settings=[each._replace(eps=eps) for each in states.settings]
    )


def in_dtype(dtype: torch.dtype) -> Change:
    """The same numbers, as parameters and moments of another dtype hold them.

    Args:
        dtype: The dtype.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> adam = torch.optim.Adam([weight])
        >>> weight.grad = torch.ones(3)
        >>> adam.step()
        >>> states = StateReader().after_step(adam)
        >>> in_dtype(torch.bfloat16)(states).exp_avg[0].dtype
        torch.bfloat16
    """

    def change(states: ParamStates) -> ParamStates:
        cast: dict[str, Any] = {
            name: [None if each is None else each.to(dtype) for each in getattr(states, name)]
            for name in ("parameter", "grad", *MOMENTS)
        }
        return replace(states, layout=Layout(), **cast)

    return change


def _few(states: ParamStates, doing: str) -> Iterator[ParamStates]:
    """The tensors, so many at a time that their copies fit into memory."""
    # Only a person who waits is told how far it has come.
    bar = tqdm(states, desc=doing, unit="tensor", leave=False, disable=None)
    return map(ParamStates.of, in_parts(bar, AT_A_TIME))
