"""The accumulators: what a kernel returns for a tensor, and what adds up over tensors.

The symbols are those of `catalogue.py`. Every kernel has a line for each of `ACCUMULATORS`.
"""

from enum import IntEnum
from typing import NamedTuple


class Knowledge(IntEnum):
    """How much of an optimizer has to be known for an accumulator."""

    FIRST_MOMENT = 1
    """Its parameters, their gradients and `exp_avg`."""
    SECOND_MOMENT = 2
    """`exp_avg_sq` too, decaying by `betas[1]`."""
    STEP = 3
    """That its step is Adam's or AdamW's: u, p₀ and g̃ can be told from the state."""


class Accumulator(NamedTuple):
    """A column of the kernels' rows."""

    formula: str
    is_maximum: bool
    """Over tensors the largest counts; all other accumulators add up."""
    needs: Knowledge


def total(formula: str, needs: Knowledge = Knowledge.STEP) -> Accumulator:
    """A sum over the elements."""
    return Accumulator(f"Σ {formula}", False, needs)


def count(formula: str, needs: Knowledge = Knowledge.STEP) -> Accumulator:
    """The number of elements for which something holds."""
    return Accumulator(f"number of elements {formula}".rstrip(), False, needs)


def largest(formula: str, needs: Knowledge = Knowledge.STEP) -> Accumulator:
    """The largest value over the elements; minus infinity where there is none."""
    return Accumulator(f"max {formula}", True, needs)


FIRST, SECOND = Knowledge.FIRST_MOMENT, Knowledge.SECOND_MOMENT
ACCUMULATORS: dict[str, Accumulator] = {
    "elements": count("", FIRST),
    "grad_squares": total("g²", FIRST),
    "grad_max_abs": largest("|g|", FIRST),
    "grad_zero": count("with g = 0", FIRST),
    "exp_avg_sum": total("m", FIRST),
    "exp_avg_squares": total("m²", FIRST),
    "exp_avg_max_abs": largest("|m|", FIRST),
    "weight_squares": total("p²", FIRST),
    "nonfinite": count("with a non-finite g, m, v or p", FIRST),
    "exp_avg_sq_sum": total("v", SECOND),
    "exp_avg_sq_largest": largest("v", SECOND),
    "exp_avg_sq_subnormal": count("with 0 < v < the smallest normal of v's dtype", SECOND),
    "exp_avg_sq_stalled": count("with v > 0 and fl(β2·v) = v", SECOND),
    "active": count("that are active"),
    "entered_squares": total("g̃²"),
    "exp_avg_times_entered": total("m·g̃"),
    "denominator_sum": total("√v̂"),
    "entered_over_second_moment": total("g̃²/max(ṽ, ε²) over active elements"),
    "second_moment_positive": count("with ṽ > 0"),
    "signal": total("min(m̂²/ṽ, 1) over ṽ > 0"),
    "amsgrad_exp_avg_sq": total("v over tensors with amsgrad"),
    "amsgrad_max_exp_avg_sq": total("max_exp_avg_sq"),
    "eps_dominated": count("that are active, with √v̂ < ε"),
    "denominator_share": total("√v̂/(√v̂+ε) over active elements"),
    "energy_without_eps": total("m̂²/v̂ over v̂ > 0"),
    "energy_lost_to_eps": total("u²r(2+r) over v̂ > 0, r = ε/√v̂"),
    "exp_avg_sq_zero": count("with v = 0 and g̃ ≠ 0"),
    "direction_squares": total("u²"),
    "direction_max_abs": largest("|u| over active elements"),
    "direction_large": count("with |u| > 0.8"),
    "update_squares": total("(ηu)²"),
    "update_nonzero": count("with ηu ≠ 0"),
    "update_lost": count("with ηu ≠ 0 and fl(p-ηu) = p"),
    "decoupled_elements": count("under decoupled decay"),
    "decoupled_decay_squares": total("(ηλp₀)² under decoupled decay"),
    "decoupled_update_squares": total("(ηu)² under decoupled decay"),
    "decoupled_decay_times_update": total("ηλp₀·ηu under decoupled decay"),
    "decoupled_weight_squares": total("p² under decoupled decay"),
    "decoupled_equilibrium_squares": total("η/(2λ) under decoupled decay"),
    "decoupled_nonzero": count("under decoupled decay, with p ≠ 0"),
    "decoupled_lost": count("under decoupled decay, with p ≠ 0 and fl(p(1-ηλ)) = p"),
    "largest_decay_rate": largest("ηλ over tensors under decoupled decay"),
    "negated_smallest_decay_rate": largest("-ηλ over tensors under decoupled decay"),
    "coupled_elements": count("under coupled decay"),
    "coupled_decay_squares": total("(λp₀)² under coupled decay"),
    "coupled_grad_squares": total("g² under coupled decay"),
    "largest_lr": largest("η", FIRST),
    "negated_smallest_lr": largest("-η", FIRST),
    "largest_beta1": largest("β1", FIRST),
    "negated_smallest_beta1": largest("-β1", FIRST),
    "largest_beta2": largest("β2", FIRST),
    "negated_smallest_beta2": largest("-β2", FIRST),
    "largest_eps": largest("ε", FIRST),
    "negated_smallest_eps": largest("-ε", FIRST),
    "largest_weight_decay": largest("λ", FIRST),
    "negated_smallest_weight_decay": largest("-λ", FIRST),
    "largest_step": largest("t", FIRST),
    "negated_smallest_step": largest("-t", FIRST),
    "largest_skipped_steps": largest("the optimizer's skipped steps", FIRST),
}
"""What a kernel can return for a tensor, by name."""
