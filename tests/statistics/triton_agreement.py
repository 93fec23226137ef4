"""What a measurement in float32 has to share with the reference kernel's in float64."""

import torch
from torch import Tensor

from lightning_adam.statistics.accumulators import COLUMNS
from lightning_adam.statistics.kernels import eager
from lightning_adam.statistics.views import TensorView

ALL = [name for name in COLUMNS if name != "skipped_steps"]
RELATIVE = 1e-5
"""The error allowed of a sum."""
NEAR = 4 * 2.0**-23
"""Four units in the last place of float32."""


def assert_rows_agree(views: list[TensorView], rows: Tensor, columns: list[str]) -> None:
    expected = eager.measure(views, columns).cpu()
    actual = rows.cpu()
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float64
    for view, got, wanted in zip(views, actual, expected, strict=True):
        allowed = tolerances(view) if view.parameter.numel() else {}
        for name, one, other in zip(columns, got.tolist(), wanted.tolist(), strict=True):
            where = f"{name} of {view.place.tensor}: {one}, expected {other}"
            if one == other or (one != one and other != other):
                continue
            # Infinities and NaN are equal or wrong.
            assert abs(one - other) < float("inf"), where
            assert abs(one - other) <= allowed.get(name, RELATIVE * abs(other)), where


def tolerances(view: TensorView) -> dict[str, float]:
    """How far those columns may be off for which that is not a share of themselves."""
    pieces = [_tolerances(elements) for elements in eager._elements(view)]
    return {name: sum(float(piece[name]) for piece in pieces) for name in pieces[0]}


def _tolerances(e: eager._Elements) -> dict[str, Tensor]:
    # What cancels is measured by what it was made of.
    settings = e.settings
    undone = e.p.abs() + e.update.abs()
    strength = e.scalar(e.decay_rate if e.is_decoupled else settings.weight_decay)
    decay = (strength / (1 - e.decay_rate if e.is_decoupled else 1.0)).abs() * undone
    entered = e.g.abs() + (settings.weight_decay * undone if e.is_coupled else 0.0)
    # Without eps and v this is 0/0, but then it is NaN or infinite that the column is.
    floor = e.v_own.clamp(min=settings.eps**2)
    lag = torch.where(e.active & (floor > 0), entered**2 / floor, 0.0)
    sums = {
        "exp_avg_sum": e.m.abs(),
        "entered_squares": entered**2,
        "exp_avg_times_entered": e.m.abs() * entered,
        "entered_over_second_moment": lag,
        "decay_squares": decay**2,
        "decay_times_update": decay * e.update.abs(),
    }
    counts = {
        "eps_dominated": _is_near(e.denominator, e.scalar(settings.eps)),
        "direction_large": _is_near(e.u.abs(), e.scalar(0.8)),
        "update_lost": _is_undecided(e, "parameter", e.p, e.update),
        "decay_lost": _is_undecided(e, "parameter", e.p, e.p * e.decay_rate),
        "exp_avg_sq_stalled": _is_undecided(e, "exp_avg_sq", e.v, e.v * (1 - settings.beta2)),
    }
    return {name: RELATIVE * terms.nan_to_num().sum() for name, terms in sums.items()} | {
        name: near.sum() for name, near in counts.items()
    }


def _is_near(values: Tensor, boundary: Tensor) -> Tensor:
    return (values - boundary).abs() <= NEAR * boundary


def _is_undecided(e: eager._Elements, name: str, value: Tensor, change: Tensor) -> Tensor:
    """Where a little more or less of a change, or of its outcome, decides whether it is lost."""
    outcomes = [value - change * (1 + sign * NEAR) for sign in (-1, 1)]
    if e.piece[name].dtype in (torch.float16, torch.bfloat16):
        outcomes += [(value - change) * (1 + sign * NEAR) for sign in (-1, 1)]
    lost = torch.stack([e.rounds_to_itself(name, outcome, value) for outcome in outcomes])
    return lost.any(0) & ~lost.all(0)


def assert_counts_agree(views: list[TensorView], counts: Tensor, groups: list[int]) -> None:
    """Histograms, of which an element near an octave's edge may stand on its other side."""
    assert counts.dtype == torch.int64
    edges = torch.zeros(counts.shape, dtype=torch.int64)
    for view, group in zip(views, groups, strict=True):
        for elements in eager._elements(view):
            magnitudes = [line(elements) for line in eager._MAGNITUDES.values()]
            for quantity, values in enumerate(magnitudes):
                below, above = (eager._exponents(values * (1 + s * NEAR)).cpu() for s in (-1, 1))
                is_near = (below != above).long()
                for bins in (below, above):
                    edges[group, quantity].scatter_add_(0, bins, is_near)
    expected = eager.count_exponents(views, groups).cpu()
    assert (expected.sum(-1) == counts.cpu().sum(-1)).all()
    assert ((expected - counts.cpu()).abs() <= edges).all()
