"""What a kernel returns for a tensor, its columns, and the accumulators that they add up to.

The symbols are those of `catalogue.py`. A kernel knows nothing of groups and of decay's two kinds:
it has a column for each of `COLUMNS`, and an accumulator is a column over some of the tensors.
"""

import math
from collections.abc import Iterable
from enum import Enum, IntFlag
from typing import NamedTuple


class Knowledge(IntFlag):
    """What has to be known of an optimizer for a column, beside its parameters and settings."""

    SETTINGS = 0
    """Nothing else."""
    GRADIENT = 1
    """The gradients that its step used: it leaves them as they were."""
    FIRST_MOMENT = 2
    """`exp_avg`."""
    SECOND_MOMENT = 4
    """`exp_avg_sq`."""
    STORAGE = 8
    """That `exp_avg_sq` is kept in its dtype, and decays in it by `betas[1]`."""
    STEP = 16
    """That its step is Adam's or AdamW's: u and p₀ can be told from the state, and g̃ from them and
    the gradient. What was active has a moment; with the gradient, it may have nothing else."""
    ALL = GRADIENT | FIRST_MOMENT | SECOND_MOMENT | STORAGE | STEP


class Column(NamedTuple):
    """One number that a kernel returns for a tensor."""

    formula: str
    is_maximum: bool
    """Over the elements, and over shards, the largest counts; all other columns add up."""
    needs: Knowledge

    @property
    def nothing(self) -> float:
        """What stands for no elements."""
        return -math.inf if self.is_maximum else 0.0


def total(formula: str, needs: Knowledge = Knowledge.STEP) -> Column:
    """A sum over the elements.

    Example:
        >>> total("g²", Knowledge.GRADIENT).formula
        'Σ g²'
    """
    return Column(f"Σ {formula}", False, needs)


def count(formula: str, needs: Knowledge = Knowledge.STEP) -> Column:
    """The number of elements for which something holds.

    Example:
        >>> count("with g = 0", Knowledge.GRADIENT).formula
        'number of elements with g = 0'
    """
    return Column(f"number of elements {formula}".rstrip(), False, needs)


def largest(formula: str, needs: Knowledge = Knowledge.STEP) -> Column:
    """The largest value over the elements; minus infinity where there is none.

    Example:
        >>> largest("|g|", Knowledge.GRADIENT).nothing
        -inf
    """
    return Column(f"max {formula}", True, needs)


SETTINGS, GRADIENT = Knowledge.SETTINGS, Knowledge.GRADIENT
FIRST, SECOND = Knowledge.FIRST_MOMENT, Knowledge.SECOND_MOMENT
STORED = SECOND | Knowledge.STORAGE
ENTERED = GRADIENT | Knowledge.STEP
KINDS = (GRADIENT, FIRST, SECOND, Knowledge.STORAGE, Knowledge.STEP)
"""What can be known, one by one."""
COLUMNS: dict[str, Column] = {
    "elements": count("", SETTINGS),
    "grad_squares": total("g²", GRADIENT),
    "grad_zero": count("with g = 0", GRADIENT),
    "exp_avg_sum": total("m", FIRST),
    "exp_avg_squares": total("m²", FIRST),
    "weight_squares": total("p²", SETTINGS),
    "nonfinite": count("with a non-finite g, m, v or p", GRADIENT | FIRST),
    "exp_avg_sq_sum": total("v", SECOND),
    "exp_avg_sq_subnormal": count("with 0 < v < the smallest normal of v's dtype", STORED),
    "exp_avg_sq_stalled": count("with v > 0 and fl(β2·v) = v", STORED),
    "max_exp_avg_sq_sum": total("max_exp_avg_sq; 0 without amsgrad"),
    "active": count("that are active"),
    "entered_squares": total("g̃²", ENTERED),
    "exp_avg_times_entered": total("m·g̃", ENTERED),
    "denominator_sum": total("√v̂"),
    "entered_over_second_moment": total("g̃²/max(ṽ, ε²) over active elements", ENTERED),
    "second_moment_positive": count("with ṽ > 0"),
    "signal": total("min(m̂²/ṽ, 1) over ṽ > 0"),
    "eps_dominated": count("that are active, with √v̂ < ε"),
    "denominator_share": total("√v̂/(√v̂+ε) over active elements"),
    "energy_without_eps": total("m̂²/v̂ over v̂ > 0"),
    "energy_lost_to_eps": total("u²r(2+r) over v̂ > 0, r = ε/√v̂"),
    "exp_avg_sq_zero": count("with v = 0 and g̃ ≠ 0", ENTERED),
    "direction_squares": total("u²"),
    "direction_large": count("with |u| > 0.8"),
    "update_squares": total("(ηu)²"),
    "update_nonzero": count("with ηu ≠ 0"),
    "update_lost": count("with ηu ≠ 0 and fl(p-ηu) = p"),
    "weight_nonzero": count("with p ≠ 0"),
    "decay_squares": total("d², d = ηλp₀ if decay is decoupled, λp₀ if it is coupled"),
    "decay_times_update": total("d·ηu"),
    "decay_lost": count("with p ≠ 0 and fl(p(1-ηλ)) = p"),
    "equilibrium_squares": total("η/(2λ) if λ > 0"),
    "grad_max_abs": largest("|g|", GRADIENT),
    "exp_avg_max_abs": largest("|m|", FIRST),
    "exp_avg_sq_largest": largest("v", SECOND),
    "direction_max_abs": largest("|u| over active elements"),
    "lr": largest("η", SETTINGS),
    "beta1": largest("β1", SETTINGS),
    "beta2": largest("β2", SETTINGS),
    "eps": largest("ε", SETTINGS),
    "weight_decay": largest("λ", SETTINGS),
    "decay_rate": largest("ηλ"),
    "step": largest("t", SETTINGS),
    "skipped_steps": largest("the optimizer's skipped steps", SETTINGS),
}
"""What is known of a tensor, by name: sums and counts, then maxima. A kernel returns all but the
last, which no tensor tells."""


class Over(Enum):
    """The tensors over which an accumulator is taken."""

    ALL = "all tensors"
    DECOUPLED = "tensors under decoupled decay"
    COUPLED = "tensors under coupled decay"
    AMSGRAD = "tensors with amsgrad"


class Accumulator(NamedTuple):
    """A column that is added up, or whose largest value is taken, over tensors."""

    column: str
    over: Over = Over.ALL
    is_negated: bool = False
    """The largest value of the column's negative: its smallest, negated."""

    @property
    def is_maximum(self) -> bool:
        """Over tensors the largest counts; all other accumulators add up."""
        return COLUMNS[self.column].is_maximum

    @property
    def needs(self) -> Knowledge:
        """What has to be known of an optimizer."""
        needs = COLUMNS[self.column].needs
        return needs if self.over is Over.ALL else needs | Knowledge.STEP


def over(tensors: Over, prefix: str, columns: Iterable[str]) -> dict[str, Accumulator]:
    """Accumulators of columns over some of the tensors, under names of their own.

    Example:
        >>> list(over(Over.COUPLED, "coupled", ["elements", "grad_squares"]))
        ['coupled_elements', 'coupled_grad_squares']
    """
    return {f"{prefix}_{column}": Accumulator(column, tensors) for column in columns}


def smallest(columns: Iterable[str]) -> dict[str, Accumulator]:
    """The smallest values of columns of maxima, negated, so that they are maxima too.

    Example:
        >>> smallest(["lr"])["negated_smallest_lr"].is_negated
        True
    """
    return {
        f"negated_smallest_{column}": Accumulator(column, is_negated=True) for column in columns
    }


_SETTINGS = ("lr", "beta1", "beta2", "eps", "weight_decay", "step")
_DECOUPLED = (
    "elements",
    "decay_squares",
    "update_squares",
    "decay_times_update",
    "weight_squares",
    "equilibrium_squares",
    "weight_nonzero",
    "decay_lost",
)
_OF_ONE_KIND = (
    "max_exp_avg_sq_sum",
    "decay_squares",
    "decay_times_update",
    "decay_lost",
    "weight_nonzero",
    "equilibrium_squares",
    "decay_rate",
)
"""Columns that are wanted over tensors of one kind alone."""
ACCUMULATORS: dict[str, Accumulator] = {
    **{name: Accumulator(name) for name in COLUMNS if name not in _OF_ONE_KIND},
    **smallest(_SETTINGS),
    **over(Over.AMSGRAD, "amsgrad", ("exp_avg_sq_sum", "max_exp_avg_sq_sum")),
    **over(Over.COUPLED, "coupled", ("elements", "decay_squares", "grad_squares")),
    **over(Over.DECOUPLED, "decoupled", (*_DECOUPLED, "decay_rate")),
    "negated_smallest_decoupled_decay_rate": Accumulator("decay_rate", Over.DECOUPLED, True),
}
"""What statistics are derived from, by name; adds up over tensors, groups and ranks."""
