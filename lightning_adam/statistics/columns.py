"""The columns of a measurement, and the accumulators over tensors.

A kernel returns a row of `COLUMNS` for each tensor. Those of `DERIVED` are computed from them on
the host in float64. An accumulator aggregates a column over a subset of the tensors. The symbols
are those of `catalogue.py`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from enum import Enum, IntFlag
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float64]


class Capabilities(IntFlag):
    """What can be read from an optimizer besides parameters and hyperparameters."""

    SETTINGS = 0
    """Nothing."""
    GRADIENT = 1
    """The gradients that the step used, which it leaves unchanged."""
    FIRST_MOMENT = 2
    """`exp_avg`."""
    SECOND_MOMENT = 4
    """`exp_avg_sq`."""
    STORAGE = 8
    """`exp_avg_sq` is not quantized, and decays by `betas[1]` in its dtype."""
    STEP = 16
    """The step is that of Adam or AdamW, so that u, p₀ and g̃ can be computed."""
    ALL = GRADIENT | FIRST_MOMENT | SECOND_MOMENT | STORAGE | STEP


class Column(NamedTuple):
    """A number for each tensor."""

    formula: str
    is_maximum: bool
    """Whether it is a maximum over elements and shards; otherwise it is a sum."""
    needs: Capabilities

    @property
    def empty(self) -> float:
        """The value of a tensor without elements."""
        return -math.inf if self.is_maximum else 0.0


def _sum_of(formula: str, needs: Capabilities = Capabilities.STEP) -> Column:
    return Column(f"Σ {formula}", False, needs)


def _count_of(formula: str, needs: Capabilities = Capabilities.STEP) -> Column:
    return Column(f"number of elements {formula}".rstrip(), False, needs)


def _max_of(formula: str, needs: Capabilities = Capabilities.STEP) -> Column:
    return Column(f"max {formula}", True, needs)


SETTINGS, GRADIENT = Capabilities.SETTINGS, Capabilities.GRADIENT
FIRST, SECOND = Capabilities.FIRST_MOMENT, Capabilities.SECOND_MOMENT
STORED = SECOND | Capabilities.STORAGE
EFFECTIVE = GRADIENT | Capabilities.STEP
KINDS = (GRADIENT, FIRST, SECOND, Capabilities.STORAGE, Capabilities.STEP)
"""The individual capabilities."""
HYPERPARAMETERS = ("lr", "beta1", "beta2", "eps", "weight_decay", "step")
"""Columns with a hyperparameter or the step of the tensor."""
COLUMNS: dict[str, Column] = {
    "elements": _count_of("", SETTINGS),
    "grad_squares": _sum_of("g²", GRADIENT),
    "grad_zero": _count_of("with g = 0", GRADIENT),
    "exp_avg_sum": _sum_of("m", FIRST),
    "exp_avg_squares": _sum_of("m²", FIRST),
    "weight_squares": _sum_of("p²", SETTINGS),
    "nonfinite": _count_of("with a non-finite g, m, v or p", GRADIENT | FIRST),
    "exp_avg_sq_sum": _sum_of("v", SECOND),
    "exp_avg_sq_subnormal": _count_of("with 0 < v < the smallest normal of v's dtype", STORED),
    "exp_avg_sq_stalled": _count_of("with v > 0 and fl(β2·v) = v", STORED),
    "max_exp_avg_sq_sum": _sum_of("max_exp_avg_sq; 0 without amsgrad"),
    "active": _count_of("that are active"),
    "effective_grad_squares": _sum_of("g̃²", EFFECTIVE),
    "exp_avg_times_effective_grad": _sum_of("m·g̃", EFFECTIVE),
    "exp_avg_sq_roots": _sum_of("√v, with amsgrad √max_exp_avg_sq"),
    "grad_over_second_moment": _sum_of("g̃²/max(ṽ, ε²) over active elements", EFFECTIVE),
    "second_moment_positive": _count_of("with ṽ > 0"),
    "signal": _sum_of("min(m̂²/ṽ, 1) over ṽ > 0"),
    "eps_dominated": _count_of("that are active, with √v̂ < ε"),
    "denominator_share": _sum_of("√v̂/(√v̂+ε) over active elements"),
    "energy_without_eps": _sum_of("m̂²/v̂ over v̂ > 0"),
    "energy_lost_to_eps": _sum_of("u²r(2+r) over v̂ > 0, r = ε/√v̂"),
    "exp_avg_sq_zero": _count_of("with v = 0 and g̃ ≠ 0", EFFECTIVE),
    "normalized_update_squares": _sum_of("u²"),
    "normalized_update_large": _count_of("with |u| > 0.8"),
    "update_nonzero": _count_of("with ηu ≠ 0"),
    "update_lost": _count_of("with ηu ≠ 0 and fl(p-ηu) = p"),
    "weight_nonzero": _count_of("with p ≠ 0"),
    "decay_lost": _count_of("with p ≠ 0 and fl(p(1-ηλ)) = p"),
    "undecayed_squares": _sum_of("(p+ηu)²"),
    "undecayed_times_update": _sum_of("(p+ηu)·u"),
    "undecayed_over_denominator_squares": _sum_of("((p+ηu)/(√v̂+ε))² under coupled decay, else 0"),
    "grad_max_abs": _max_of("|g|", GRADIENT),
    "exp_avg_max_abs": _max_of("|m|", FIRST),
    "exp_avg_sq_largest": _max_of("v", SECOND),
    "normalized_update_max_abs": _max_of("|u| over active elements"),
    "lr": _max_of("η", SETTINGS),
    "beta1": _max_of("β1", SETTINGS),
    "beta2": _max_of("β2", SETTINGS),
    "eps": _max_of("ε", SETTINGS),
    "weight_decay": _max_of("λ", SETTINGS),
    "step": _max_of("t", SETTINGS),
}
"""The columns of the kernels by name: sums and counts, then maxima."""
GIVEN: dict[str, Column] = {
    "grad_squares_before_clip": _sum_of("g² before clipping; NaN if not measured", GRADIENT),
    "loss_scale": _max_of("the GradScaler's scale; NaN without one", SETTINGS),
    "skipped_steps": _max_of("the optimizer's skipped steps", SETTINGS),
}
"""Columns that the caller of a measurement provides."""


class Derived(NamedTuple):
    """A column that is computed from others."""

    column: Column
    sources: tuple[str, ...]
    compute: Callable[..., Any]


def _derived(formula: str, compute: Callable[..., Any], *, is_maximum: bool = False) -> Derived:
    """Returns a derived column; the names of the arguments of `compute` are its sources."""
    sources = compute.__code__.co_varnames[: compute.__code__.co_argcount]
    needs = Capabilities.SETTINGS
    for name in sources:
        needs |= COLUMNS[name].needs
    make = _max_of if is_maximum else _sum_of
    return Derived(make(formula, needs), sources, compute)


DERIVED: dict[str, Derived] = {
    "update_squares": _derived(
        "(ηu)²", lambda lr, normalized_update_squares: lr**2 * normalized_update_squares
    ),
    "denominator_sum": _derived(
        "√v̂",
        lambda exp_avg_sq_roots, beta2, step: exp_avg_sq_roots / (1 - beta2**step) ** 0.5,
    ),
    "previous_exp_avg_squares": _derived(
        "(β1·m₋₁)²",
        lambda exp_avg_squares, exp_avg_times_effective_grad, effective_grad_squares, beta1: (
            exp_avg_squares
            - 2 * (1 - beta1) * exp_avg_times_effective_grad
            + (1 - beta1) ** 2 * effective_grad_squares
        ),
    ),
    "previous_exp_avg_times_grad": _derived(
        "β1·m₋₁·g̃",
        lambda exp_avg_times_effective_grad, effective_grad_squares, beta1: (
            exp_avg_times_effective_grad - (1 - beta1) * effective_grad_squares
        ),
    ),
    "rms_ratio": _derived(
        "√mean(g̃²/max(ṽ, ε²)) of a tensor",
        lambda grad_over_second_moment, active: _root_of_ratio(grad_over_second_moment, active),
        is_maximum=True,
    ),
    "update_to_weight": _derived(
        "‖ηu‖/‖p‖ of a tensor",
        lambda lr, normalized_update_squares, weight_squares: _root_of_ratio(
            lr**2 * normalized_update_squares, weight_squares
        ),
        is_maximum=True,
    ),
    "decay_rate": _derived("ηλ", lambda lr, weight_decay: lr * weight_decay, is_maximum=True),
    "decay_squares": _derived(
        "(ηλp₀)² of decoupled decay",
        lambda lr, weight_decay, undecayed_squares: (
            _decay_strength(lr, weight_decay) ** 2 * undecayed_squares
        ),
    ),
    "decay_times_update": _derived(
        "ηλp₀·ηu of decoupled decay",
        lambda lr, weight_decay, undecayed_times_update: (
            _decay_strength(lr, weight_decay) * lr * undecayed_times_update
        ),
    ),
    "equilibrium_squares": _derived(
        "η/(2λ)", lambda elements, lr, weight_decay: elements * lr / (2 * weight_decay)
    ),
    "decay_step_squares": _derived(
        "(ηλp₀/(√v̂+ε))² of coupled decay",
        lambda lr, weight_decay, undecayed_over_denominator_squares: (
            (lr * weight_decay) ** 2 * undecayed_over_denominator_squares
        ),
    ),
    "decay_grad_squares": _derived(
        "(λp₀)² of coupled decay",
        lambda weight_decay, undecayed_squares: weight_decay**2 * undecayed_squares,
    ),
}
"""The columns that are computed from `COLUMNS`, by name."""


def _root_of_ratio(numerator: "Array", denominator: "Array") -> "Array":
    """Returns the root of the ratio for each tensor; -inf, an empty maximum, if undefined."""
    # Without np.where, because fast commands import this module without numpy.
    defined = denominator != 0
    root: Array = (numerator / (denominator + ~defined)) ** 0.5
    root[~defined] = -math.inf
    return root


def _decay_strength(lr: "Array", weight_decay: "Array") -> "Array":
    """Returns the factor from p+ηu = (1-ηλ)p₀ to ηλp₀."""
    return lr * weight_decay / (1 - lr * weight_decay)


ALL_COLUMNS: dict[str, Column] = {
    **COLUMNS,
    **GIVEN,
    **{name: derived.column for name, derived in DERIVED.items()},
}


class ParamSubset(Enum):
    """The tensors over which an accumulator aggregates."""

    ALL = "all tensors"
    DECOUPLED = "tensors under decoupled decay"
    COUPLED = "tensors under coupled decay"
    AMSGRAD = "tensors with amsgrad"


class Accumulator(NamedTuple):
    """The sum or the maximum of a column over tensors."""

    column: str
    subset: ParamSubset = ParamSubset.ALL
    is_negated: bool = False
    """Whether it is the maximum of the negated column, that is, its negated minimum."""

    @property
    def is_maximum(self) -> bool:
        """Whether it is a maximum; otherwise it is a sum."""
        return ALL_COLUMNS[self.column].is_maximum

    @property
    def needs(self) -> Capabilities:
        """The capabilities that an optimizer needs."""
        needs = ALL_COLUMNS[self.column].needs
        return needs if self.subset is ParamSubset.ALL else needs | Capabilities.STEP


def sources_of(columns: Iterable[str]) -> list[str]:
    """Returns the columns of `COLUMNS` and `GIVEN` from which columns are computed, in order.

    Example:
        >>> sources_of(["decay_rate", "grad_zero"])
        ['grad_zero', 'lr', 'weight_decay']
    """
    needed = {
        source
        for name in columns
        for source in (DERIVED[name].sources if name in DERIVED else (name,))
    }
    return [name for name in (*COLUMNS, *GIVEN) if name in needed]


def column_values(name: str, known: "Mapping[str, Array]") -> "Array":
    """Returns the values of a column, one for each tensor.

    Args:
        name: The column.
        known: The columns of `sources_of([name])`, by name.

    Example:
        >>> import numpy as np
        >>> column_values("decay_rate", {"lr": np.array([0.1]), "weight_decay": np.array([0.5])})
        array([0.05])
    """
    if name not in DERIVED:
        return known[name]
    derived = DERIVED[name]
    values: Array = derived.compute(*(known[source] for source in derived.sources))
    return values


def _over_subset(
    subset: ParamSubset, prefix: str, columns: Iterable[str]
) -> dict[str, Accumulator]:
    return {f"{prefix}_{column}": Accumulator(column, subset) for column in columns}


def _negated_minima(columns: Iterable[str]) -> dict[str, Accumulator]:
    return {
        f"negated_smallest_{column}": Accumulator(column, is_negated=True) for column in columns
    }


_OF_DECOUPLED = (
    *("decay_squares", "update_squares", "decay_times_update", "weight_squares"),
    *("equilibrium_squares", "weight_nonzero", "decay_lost", "decay_rate"),
)
_OF_COUPLED = ("decay_step_squares", "decay_grad_squares", "grad_squares")
_OF_SUBSETS = {*_OF_DECOUPLED, *_OF_COUPLED, "max_exp_avg_sq_sum"} - {
    *("update_squares", "weight_squares", "grad_squares")
}
"""Columns that are only defined for a subset."""
ACCUMULATORS: dict[str, Accumulator] = {
    **{name: Accumulator(name) for name in ALL_COLUMNS if name not in _OF_SUBSETS},
    # No minimum of lr: the learning rate of a scope is its largest one.
    **_negated_minima(name for name in HYPERPARAMETERS if name != "lr"),
    **_over_subset(ParamSubset.AMSGRAD, "amsgrad", ("exp_avg_sq_sum", "max_exp_avg_sq_sum")),
    **_over_subset(ParamSubset.COUPLED, "coupled", ("elements", *_OF_COUPLED)),
    **_over_subset(ParamSubset.DECOUPLED, "decoupled", ("elements", *_OF_DECOUPLED)),
    "negated_smallest_decoupled_decay_rate": Accumulator("decay_rate", ParamSubset.DECOUPLED, True),
}
"""The accumulators by name."""
