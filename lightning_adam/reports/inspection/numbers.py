"""A saved optimizer → measurements of its last step, without the gradient, as it was and changed.

Nothing is defined here: kernels, columns and statistics are those that a training is measured by.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_adam.reports.inspection.saved import Saved
from lightning_adam.statistics import kernels
from lightning_adam.statistics.accumulators import ACCUMULATORS, Knowledge
from lightning_adam.statistics.catalogue import STATISTICS, Statistic, ratio
from lightning_adam.statistics.histograms import DENOMINATOR_POSITION, QUANTITIES
from lightning_adam.statistics.measurement import (
    Measurement,
    Tensors,
    Wanted,
    agreement,
    columns_of,
)
from lightning_adam.statistics.views import (
    MOMENTS,
    Row,
    TensorView,
    Views,
    in_parts,
    knowledge_of,
)

OF_WEIGHTS = frozenset(
    {
        "weight_squares",
        "weight_nonzero",
        "update_lost",
        "decay_squares",
        "decay_times_update",
        "decay_lost",
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

    views: list[TensorView]
    measurement: Measurement
    exponents: Tensor
    """Counts of each tensor's √v̂ by binary exponent, `[tensors, 256]`."""
    known: list[Statistic]
    """The statistics that the file tells."""


def moments_of(saved: Saved) -> Moments:
    """Measures what was saved."""
    views = Views().after_step(saved.optimizer)
    known = known_statistics(saved, views)
    exponents = torch.zeros(len(views), 0)
    if saved.is_adams:
        counts = [
            kernels.count_exponents(few, range(len(few)))[:, DENOMINATOR_POSITION]
            for few in _few(views, "counting")
        ]
        exponents = torch.cat(counts)
    return Moments(views, measured(views, known), exponents, known)


def known_statistics(saved: Saved, views: Sequence[TensorView]) -> list[Statistic]:
    """The statistics that need no gradient, and no weights where these are not known.

    A gradient that is not finite leaves a first moment that is not, so that what is not finite is
    counted all the same. How many steps were skipped, no file tells.
    """
    knowledge = knowledge_of(saved.optimizer, views) & ~Knowledge.GRADIENT
    return [
        each
        for each in (*STATISTICS.values(), UNDERFLOWED)
        if (each.needs in knowledge or each.name == "nonfinite_count")
        and each.name != "skipped_steps"
        and (saved.weights or not OF_WEIGHTS & _columns(each))
    ]


def _columns(statistic: Statistic) -> set[str]:
    return {ACCUMULATORS[name].column for name in statistic.accumulators}


Change = Callable[[TensorView], TensorView]


def measured(
    views: Sequence[TensorView], statistics: Iterable[Statistic], change: Change | None = None
) -> Measurement:
    """A measurement of some statistics.

    Args:
        views: The tensors.
        statistics: What is to be derived.
        change: What is done to each of them before (default: nothing).

    Example:
        >>> from lightning_adam.config.monitor import Scope
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> adam = torch.optim.Adam([weight], eps=1.0)
        >>> weight.grad = torch.ones(3)
        >>> adam.step()
        >>> views, direction = Views().after_step(adam), STATISTICS["normalized_update_max"]
        >>> measured(views, [direction]).of(Scope.model, [direction])
        {'model': {'normalized_update_max': 0.5}}
        >>> measured(views, [direction], with_eps(3.0)).of(Scope.model, [direction])
        {'model': {'normalized_update_max': 0.25}}
    """
    wanted = Wanted(list(statistics), [], {}, "", [])
    columns = columns_of(wanted.accumulators(Knowledge.ALL))
    rows, parts = [], []
    for few in _few(views, "measuring"):
        changed = few if change is None else [change(view) for view in few]
        rows += [Row(*view[:2], view.max_exp_avg_sq is not None) for view in changed]
        parts.append(kernels.measure(changed, [*columns.sums, *columns.maxima]))
    sums, maxima = torch.tensor_split(torch.cat(parts), [len(columns.sums)], dim=1)
    return Measurement(
        wanted,
        columns,
        Tensors.of(rows),
        sums,
        maxima,
        torch.zeros(0, len(QUANTITIES), 0),
        agreement(Knowledge.ALL),
    )


def with_eps(eps: float) -> Change:
    """The same moments, divided with another eps.

    Args:
        eps: The eps.
    """
    return lambda view: view._replace(settings=view.settings._replace(eps=eps))


def in_dtype(dtype: torch.dtype) -> Change:
    """The same numbers, as parameters and moments of another dtype hold them.

    Args:
        dtype: The dtype.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> adam = torch.optim.Adam([weight])
        >>> weight.grad = torch.ones(3)
        >>> adam.step()
        >>> (view,) = Views().after_step(adam)
        >>> in_dtype(torch.bfloat16)(view).exp_avg.dtype
        torch.bfloat16
    """

    def change(view: TensorView) -> TensorView:
        cast: dict[str, Any] = {
            name: None if getattr(view, name) is None else getattr(view, name).to(dtype)
            for name in ("parameter", "grad", *MOMENTS)
        }
        return view._replace(**cast)

    return change


def _few(views: Sequence[TensorView], doing: str) -> Iterator[list[TensorView]]:
    """The views, so many at a time that their copies fit into memory."""
    # Only a person who waits is told how far it has come.
    return in_parts(tqdm(views, desc=doing, unit="tensor", leave=False, disable=None), AT_A_TIME)
