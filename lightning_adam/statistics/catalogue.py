"""What each statistic is: one declaration a statistic, and the sums it is derived from.

A kernel returns one `Row` of sums and maxima a tensor. Rows add up over the tensors of a group, of
the model and over ranks; only then is a statistic derived, so that a group's number is what one
tensor holding all its elements would give, never a mean of means.

Symbols: p parameter, m exp_avg, v exp_avg_sq after the step; g the gradient the step used; η lr,
λ weight_decay, ε eps, t the state's step; m̂ = m/(1-β1^t), ṽ = v/(1-β2^t); v̂ = ṽ, with amsgrad
max_exp_avg_sq/(1-β2^t); u = m̂/(√v̂+ε); p₀ the parameter before the step; g̃ what entered the
moments: g (-g with maximize), plus λp₀ with coupled decay. An element is active unless
m = v = g̃ = 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Row(NamedTuple):
    """The accumulators: what a kernel returns for a tensor, and what adds up over tensors.

    Example:
        >>> Row._fields[0], MAXIMA
        ('elements', ('largest_lr', 'negated_smallest_lr'))
    """

    elements: float
    """Number of elements."""
    active: float
    """Number of active elements."""
    grad_squares: float
    """Σ g²."""
    entered_squares: float
    """Σ g̃²."""
    exp_avg_squares: float
    """Σ m²."""
    exp_avg_times_entered: float
    """Σ m·g̃."""
    exp_avg_sq: float
    """Σ v."""
    denominator: float
    """Σ √v̂."""
    entered_over_second_moment: float
    """Σ g̃²/max(ṽ, ε²) over active elements."""
    eps_dominated: float
    """Number of active elements with √v̂ < ε."""
    energy_without_eps: float
    """Σ m̂²/v̂ over v̂ > 0."""
    energy_lost_to_eps: float
    """Σ u²r(2+r) over v̂ > 0, with r = ε/√v̂."""
    exp_avg_sq_zero: float
    """Number of elements with v = 0 and g̃ ≠ 0."""
    direction_squares: float
    """Σ u²."""
    update_squares: float
    """Σ (ηu)²."""
    update_nonzero: float
    """Number of elements with ηu ≠ 0."""
    update_lost: float
    """Number of elements with ηu ≠ 0 and fl(p-ηu) = p in the parameter's dtype."""
    nonfinite: float
    """Number of elements with a non-finite g, m, v or p."""
    weight_squares: float
    """Σ p²."""
    decoupled_elements: float
    """Number of elements under decoupled decay (λ > 0)."""
    decoupled_decay_squares: float
    """Σ (ηλp₀)² over elements under decoupled decay."""
    decoupled_update_squares: float
    """Σ (ηu)² over elements under decoupled decay."""
    coupled_elements: float
    """Number of elements under coupled decay (λ > 0)."""
    coupled_decay_squares: float
    """Σ (λp₀)² over elements under coupled decay."""
    largest_lr: float
    """max η."""
    negated_smallest_lr: float
    """max -η: with `largest_lr`, whether the scope has one learning rate."""


MAXIMA = Row._fields[-2:]
"""The accumulators of which the largest counts; all others add up."""
SUMS = Row._fields[:-2]


@dataclass(frozen=True)
class Statistic:
    """One number that is logged, and all there is to know of it."""

    name: str
    family: str
    """First part of the key: `adam_<family>/<name>`."""
    meaning: str
    """In words."""
    formula: str
    """In the symbols of this file."""
    source: str
    """Where it comes from, empty where it is plain arithmetic."""
    derive: Callable[[Row], float | None]
    """From the sums of a scope; None where it is undefined (empty set, 0/0, mixed values)."""

    @property
    def key(self) -> str:
        """The key of the whole model, to which scopes append theirs."""
        return f"adam_{self.family}/{self.name}"


STATISTICS: dict[str, Statistic] = {}
"""The catalogue, by name, in the order in which it is shown."""


def statistic(
    family: str, formula: str, source: str = ""
) -> Callable[[Callable[[Row], float | None]], Callable[[Row], float | None]]:
    """Enters a function into the catalogue: its name is the statistic's, its docstring the meaning.

    Args:
        family: First part of the key: moments, underflow, update, weight_decay or schedule.
        formula: The definition in the symbols of this file.
        source: The paper that defines it (default: none).
    """

    def enter(derive: Callable[[Row], float | None]) -> Callable[[Row], float | None]:
        meaning = " ".join((derive.__doc__ or "").split())
        name = derive.__name__
        STATISTICS[name] = Statistic(name, family, meaning, formula, source, derive)
        return derive

    return enter


def ratio(numerator: float, denominator: float) -> float | None:
    """A quotient, None where it is undefined."""
    return None if denominator == 0 else numerator / denominator


def root(square: float | None) -> float | None:
    """A square root that passes on what is undefined."""
    return None if square is None else math.sqrt(square)


@statistic("moments", "‖g‖")
def grad_norm(row: Row) -> float | None:
    """Norm of the gradient that the step used: clipped and unscaled."""
    return math.sqrt(row.grad_squares)


@statistic("moments", "√mean(m²)")
def exp_avg_rms(row: Row) -> float | None:
    """Root mean square of the first moment."""
    return root(ratio(row.exp_avg_squares, row.elements))


@statistic("moments", "mean(v)")
def exp_avg_sq_mean(row: Row) -> float | None:
    """Mean of the second moment."""
    return ratio(row.exp_avg_sq, row.elements)


@statistic("moments", "mean(√v̂)")
def denominator_mean(row: Row) -> float | None:
    """Mean of the denominator before eps is added: what eps has to be small against."""
    return ratio(row.denominator, row.elements)


@statistic("moments", "cos(m, g̃)")
def momentum_alignment(row: Row) -> float | None:
    """Cosine between the first moment and what entered it.

    1 if the gradient keeps its direction, near 0 if it is noise.
    """
    norms = math.sqrt(row.exp_avg_squares) * math.sqrt(row.entered_squares)
    return ratio(row.exp_avg_times_entered, norms)


@statistic(
    "moments",
    "√mean(g̃²/max(ṽ, ε²)) over active elements",
    "RMS_t of StableAdamW, Wortsman et al. 2023, arXiv 2304.13013",
)
def exp_avg_sq_lag(row: Row) -> float | None:
    """How far the second moment lags behind the gradient.

    About 1 in health, far above 1 when the gradient has grown faster than it.
    """
    return root(ratio(row.entered_over_second_moment, row.active))


@statistic("underflow", "share of active elements with √v̂ < ε")
def eps_dominated_fraction(row: Row) -> float | None:
    """Share of the active elements whose denominator is mostly eps: there Adam is SGD."""
    return ratio(row.eps_dominated, row.active)


@statistic("underflow", "Σu²r(2+r) / Σ(m̂²/v̂) over v̂>0, r = ε/√v̂")
def eps_energy_loss(row: Row) -> float | None:
    """Share of the update's energy that eps takes: 0 in health.

    Rows that went quiet do not move it.
    """
    return ratio(row.energy_lost_to_eps, row.energy_without_eps)


@statistic("underflow", "share of elements with v=0 and g̃≠0")
def exp_avg_sq_zero_fraction(row: Row) -> float | None:
    """Share of elements whose second moment has underflowed: it is 0, their gradient is not."""
    return ratio(row.exp_avg_sq_zero, row.elements)


@statistic("underflow", "share with fl(p-ηu)=p among elements with ηu≠0")
def update_lost_fraction(row: Row) -> float | None:
    """Share of the updates that are rounded away in the parameter's dtype."""
    return ratio(row.update_lost, row.update_nonzero)


@statistic("underflow", "number of elements with a non-finite g, m, v or p")
def nonfinite_count(row: Row) -> float | None:
    """Elements in which something is NaN or infinite."""
    return row.nonfinite


@statistic("update", "‖ηu‖")
def update_norm(row: Row) -> float | None:
    """Norm of the step that Adam took, without the decay."""
    return math.sqrt(row.update_squares)


@statistic("update", "√mean(u²) over active elements")
def direction_rms(row: Row) -> float | None:
    """Size of the step in units of the learning rate.

    Near 1 if successive gradients agree, about √((1-β1)/(1+β1)) if they are noise.
    """
    return root(ratio(row.direction_squares, row.active))


@statistic("update", "‖ηu‖/‖p‖")
def update_to_weight(row: Row) -> float | None:
    """Relative size of the step."""
    return ratio(math.sqrt(row.update_squares), math.sqrt(row.weight_squares))


@statistic("weight_decay", "‖p‖")
def weight_norm(row: Row) -> float | None:
    """Norm of the parameters."""
    return math.sqrt(row.weight_squares)


@statistic("weight_decay", "decoupled ‖ηλp₀‖, coupled ‖λp₀‖, over decayed tensors of one kind")
def decay_norm(row: Row) -> float | None:
    """Norm of what weight decay takes off the weights, or, coupled, adds to the gradient."""
    if bool(row.decoupled_elements) == bool(row.coupled_elements):
        return None
    return math.sqrt(row.decoupled_decay_squares + row.coupled_decay_squares)


@statistic("weight_decay", "‖ηλp₀‖/‖ηu‖ over tensors under decoupled decay")
def decay_to_update(row: Row) -> float | None:
    """Decoupled decay beside the step it accompanies."""
    decay, update = row.decoupled_decay_squares, row.decoupled_update_squares
    return ratio(math.sqrt(decay), math.sqrt(update))


@statistic("schedule", "η")
def lr(row: Row) -> float | None:
    """Learning rate of the step, where the scope has one."""
    return row.largest_lr if row.largest_lr == -row.negated_smallest_lr else None
