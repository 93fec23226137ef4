"""Compares a float32 measurement with that of the reference kernel in float64."""

import torch
from torch import Tensor

from lightning_adam.statistics.columns import COLUMNS
from lightning_adam.statistics.kernels import eager
from lightning_adam.statistics.param_states import ParamState, ParamStates

ALL = list(COLUMNS)
RELATIVE = 1e-5
"""The allowed relative error of a sum."""
NEAR = 4 * 2.0**-23
"""Four units in the last place of float32."""


def assert_rows_agree(states: ParamStates, rows: Tensor, columns: list[str]) -> None:
    expected = eager.measure(states, columns).cpu()
    actual = rows.cpu()
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float64
    for state, got, wanted in zip(states, actual, expected, strict=True):
        allowed = tolerances(state) if state.parameter.numel() else {}
        for name, one, other in zip(columns, got.tolist(), wanted.tolist(), strict=True):
            where = f"{name} of {state.name.tensor}: {one}, expected {other}"
            if one == other or (one != one and other != other):
                continue
            # Infinities and NaN must be equal.
            assert abs(one - other) < float("inf"), where
            assert abs(one - other) <= allowed.get(name, RELATIVE * abs(other)), where


def tolerances(state: ParamState) -> dict[str, float]:
    """Returns the absolute tolerances of columns without a relative one."""
    pieces = [_tolerances(elements) for elements in eager._elements(state)]
    return {name: sum(float(piece[name]) for piece in pieces) for name in pieces[0]}


def _tolerances(e: eager._Elements) -> dict[str, Tensor]:
    # Cancellation: the tolerance is relative to the terms.
    settings = e.settings
    undecayed = e.p.abs() + e.update.abs()
    effective = e.g.abs() + (settings.weight_decay * undecayed if e.is_coupled else 0.0)
    # 0/0 without eps and v, but then the column is NaN or infinite.
    floor = e.v_own.clamp(min=settings.eps**2)
    grad_ratio = torch.where(e.active & (floor > 0), effective**2 / floor, 0.0)
    sums = {
        "exp_avg_sum": e.m.abs(),
        "effective_grad_squares": effective**2,
        "exp_avg_times_effective_grad": e.m.abs() * effective,
        "grad_over_second_moment": grad_ratio,
        "undecayed_squares": undecayed**2,
        "undecayed_times_update": undecayed * e.u.abs(),
        "undecayed_over_denominator_squares": (undecayed / (e.denominator + settings.eps)) ** 2,
    }
    counts = {
        "eps_dominated": _is_near(e.denominator, e.scalar(settings.eps)),
        "normalized_update_large": _is_near(e.u.abs(), e.scalar(0.8)),
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
    """Returns where rounding decides whether a change is lost."""
    outcomes = [value - change * (1 + sign * NEAR) for sign in (-1, 1)]
    if e.piece[name].dtype in (torch.float16, torch.bfloat16):
        outcomes += [(value - change) * (1 + sign * NEAR) for sign in (-1, 1)]
    lost = torch.stack([e.rounds_to_itself(name, outcome, value) for outcome in outcomes])
    return lost.any(0) & ~lost.all(0)


def assert_counts_agree(states: ParamStates, counts: Tensor, groups: list[int]) -> None:
    """Compares histograms; elements near the edge of an octave may be in either."""
    assert counts.dtype == torch.int64
    edges = torch.zeros(counts.shape, dtype=torch.int64)
    for state, group in zip(states, groups, strict=True):
        for elements in eager._elements(state):
            magnitudes = [line(elements) for line in eager._MAGNITUDES.values()]
            for quantity, values in enumerate(magnitudes):
                below, above = (eager._exponents(values * (1 + s * NEAR)).cpu() for s in (-1, 1))
                is_near = (below != above).long()
                for bins in (below, above):
                    edges[group, quantity].scatter_add_(0, bins, is_near)
    expected = eager.count_exponents(states, groups, len(counts)).cpu()
    assert (expected.sum(-1) == counts.cpu().sum(-1)).all()
    assert ((expected - counts.cpu()).abs() <= edges).all()
