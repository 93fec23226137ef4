"""What each statistic is: one declaration a statistic, and the accumulators it is derived from.

A kernel returns a row of columns a tensor: sums, counts and maxima. Over the tensors of a layer,
a group, of the model and over ranks they add up to accumulators; only then is a statistic derived,
so that a group's number is what one tensor holding all its elements would give, never a mean of
means.

A statistic is a function whose arguments are the accumulators it needs. To add one, declare it
here, add what is missing to `COLUMNS` or `ACCUMULATORS`, and a line for a column to each kernel.
"""

import fnmatch
import inspect
import math
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from operator import or_

from lightning_adam.config.errors import format_override
from lightning_adam.statistics.accumulators import ACCUMULATORS, Knowledge

SYMBOLS = """\
p parameter, m exp_avg and v exp_avg_sq after the step; g the gradient the step used, clipped and
unscaled; η lr, λ weight_decay, ε eps, t the step; m̂ = m/(1-β1^t), ṽ = v/(1-β2^t); v̂ = ṽ, with
amsgrad max_exp_avg_sq/(1-β2^t); u = m̂/(√v̂+ε); p₀ the parameter before the step; g̃ what entered
the moments: g (-g with maximize), plus λp₀ with coupled decay; fl(x) is x rounded to the tensor's
dtype. An element is active unless m = v = g̃ = 0. A tensor decays if its λ > 0: decoupled, as in
AdamW, or coupled, as in Adam."""
"""The symbols of the formulas."""


@dataclass(frozen=True)
class Statistic:
    """One number that is logged, and all there is to know of it."""

    name: str
    family: str
    """First part of the key: `adam_<family>/<name>`."""
    meaning: str
    """In words."""
    formula: str
    """In words and `SYMBOLS`."""
    unit: str
    """What it is measured in; empty for a pure number."""
    source: str
    """Where it comes from; empty where it is plain arithmetic."""
    is_headline: bool
    """Whether it is logged by default."""
    accumulators: tuple[str, ...]
    """The accumulators it is derived from, in the order of the arguments of `derive`."""
    derive: Callable[..., float | None]
    """From a scope's accumulators; None where it is undefined (empty set, 0/0, mixed values)."""

    @property
    def key(self) -> str:
        """The key of the whole model, to which scopes append theirs."""
        return f"adam_{self.family}/{self.name}"

    @property
    def needs(self) -> Knowledge:
        """What has to be known of an optimizer."""
        needs = (ACCUMULATORS[name].needs for name in self.accumulators)
        return reduce(or_, needs)


STATISTICS: dict[str, Statistic] = {}
"""The catalogue, by name, in the order in which it is shown."""
Derive = Callable[..., float | None]


def statistic(
    family: str, formula: str, *, unit: str = "", source: str = "", headline: bool = False
) -> Callable[[Derive], Derive]:
    """Enters a function into the catalogue: its name is the statistic's, its docstring the meaning.

    Args:
        family: First part of the key: moments, underflow, update, weight_decay or schedule.
        formula: The definition in words and `SYMBOLS`.
        unit: What it is measured in (default: a pure number).
        source: The paper that defines it (default: none).
        headline: Whether it is logged by default (default: False).

    Example:
        >>> @statistic("moments", "√Σg²/Σp²")
        ... def grad_to_weight(grad_squares, weight_squares):
        ...     '''The gradient beside the weights.'''
        ...     return root(ratio(grad_squares, weight_squares))
        >>> entered = STATISTICS.pop("grad_to_weight")
        >>> entered.key, entered.derive(4.0, 1.0)
        ('adam_moments/grad_to_weight', 2.0)
    """

    def enter(derive: Derive) -> Derive:
        name = derive.__name__
        STATISTICS[name] = Statistic(
            name=name,
            family=family,
            meaning=" ".join((derive.__doc__ or "").split()),
            formula=formula,
            unit=unit,
            source=source,
            is_headline=headline,
            accumulators=tuple(inspect.signature(derive).parameters),
            derive=derive,
        )
        return derive

    return enter


def select(patterns: Iterable[str]) -> list[Statistic]:
    """The statistics that a selection means, in the catalogue's order.

    Args:
        patterns: `headline`, `all`, names, and globs over names, `family/name` and keys.

    Example:
        >>> [statistic.name for statistic in select(["eps_*", "update/normalized_update_rms"])]
        ['eps_dominated_fraction', 'eps_damping', 'eps_energy_loss', 'normalized_update_rms']
    """
    patterns = list(patterns)
    return [
        statistic
        for statistic in STATISTICS.values()
        if any(_means(pattern, statistic) for pattern in patterns)
    ]


def _means(pattern: str, statistic: Statistic) -> bool:
    if pattern in ("headline", "all"):
        return pattern == "all" or statistic.is_headline
    names = (statistic.name, f"{statistic.family}/{statistic.name}", statistic.key)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def key_part(name: object) -> str:
    """A name as it may stand in a key: letters, digits, `_`, `.` and `/`.

    Example:
        >>> key_part("encoder (frozen)")
        'encoder__frozen_'
    """
    return re.sub(r"[^A-Za-z0-9_./]", "_", str(name))


def ratio(numerator: float, denominator: float) -> float | None:
    """A quotient, None where it is undefined.

    Example:
        >>> ratio(1.0, 2.0), ratio(0.0, 0.0)
        (0.5, None)
    """
    return None if denominator == 0 else numerator / denominator


def root(square: float | None) -> float | None:
    """A square root that passes on what is undefined.

    Example:
        >>> root(4.0), root(None)
        (2.0, None)
    """
    return None if square is None else math.sqrt(square)


def of_any(maximum: float) -> float | None:
    """A maximum, None where there was nothing to take it of.

    Example:
        >>> of_any(2.0), of_any(-math.inf)
        (2.0, None)
    """
    return None if maximum == -math.inf else maximum


def one_value(largest: float, negated_smallest: float) -> float | None:
    """The value that all tensors of a scope share, None if there is none.

    Example:
        >>> one_value(0.1, -0.1), one_value(0.2, -0.1)
        (0.1, None)
    """
    return of_any(largest) if largest == -negated_smallest else None


def cosine(product: float, squares: float, other_squares: float) -> float | None:
    """The cosine between two vectors, None if one of them is zero.

    Args:
        product: Their inner product.
        squares: The square of the one's norm.
        other_squares: The square of the other's.

    Example:
        >>> cosine(-6.0, 4.0, 9.0), cosine(0.0, 0.0, 9.0)
        (-1.0, None)
    """
    return ratio(product, math.sqrt(squares) * math.sqrt(other_squares))


@statistic("moments", "‖g‖", unit="gradient", headline=True)
def grad_norm(grad_squares: float) -> float | None:
    """Norm of the gradient that the step used: clipped and unscaled."""
    return math.sqrt(grad_squares)


@statistic("moments", "√mean(g²)", unit="gradient")
def grad_rms(grad_squares: float, elements: float) -> float | None:
    """Root mean square of the gradient: its norm, whatever the number of parameters."""
    return root(ratio(grad_squares, elements))


@statistic("moments", "max |g|", unit="gradient")
def grad_max(grad_max_abs: float) -> float | None:
    """Largest gradient of any element."""
    return of_any(grad_max_abs)


@statistic("moments", "‖m‖", unit="gradient")
def exp_avg_norm(exp_avg_squares: float) -> float | None:
    """Norm of the first moment."""
    return math.sqrt(exp_avg_squares)


@statistic("moments", "√mean(m²)", unit="gradient", headline=True)
def exp_avg_rms(exp_avg_squares: float, elements: float) -> float | None:
    """Root mean square of the first moment."""
    return root(ratio(exp_avg_squares, elements))


@statistic("moments", "mean(m)", unit="gradient")
def exp_avg_mean(exp_avg_sum: float, elements: float) -> float | None:
    """Mean of the first moment, with its sign: whether the elements drift together."""
    return ratio(exp_avg_sum, elements)


@statistic("moments", "max |m|", unit="gradient")
def exp_avg_max(exp_avg_max_abs: float) -> float | None:
    """Largest first moment of any element."""
    return of_any(exp_avg_max_abs)


@statistic("moments", "mean(v)", unit="gradient²", headline=True)
def exp_avg_sq_mean(exp_avg_sq_sum: float, elements: float) -> float | None:
    """Mean of the second moment."""
    return ratio(exp_avg_sq_sum, elements)


@statistic("moments", "max v", unit="gradient²")
def exp_avg_sq_max(exp_avg_sq_largest: float) -> float | None:
    """Largest second moment of any element."""
    return of_any(exp_avg_sq_largest)


@statistic("moments", "mean(√v̂)", unit="gradient", headline=True)
def denominator_mean(denominator_sum: float, elements: float) -> float | None:
    """Mean of the denominator before eps is added: what eps has to be small against."""
    return ratio(denominator_sum, elements)


@statistic("moments", "cos(m, g̃)", headline=True)
def grad_momentum_cosine(
    exp_avg_times_entered: float, exp_avg_squares: float, entered_squares: float
) -> float | None:
    """Cosine between the first moment and what entered it.

    1 if the gradient keeps its direction, near 0 if it is noise.
    """
    return cosine(exp_avg_times_entered, exp_avg_squares, entered_squares)


@statistic("moments", "mean(min(m̂²/ṽ, 1)) over ṽ>0", unit="fraction")
def signal_fraction(signal: float, second_moment_positive: float) -> float | None:
    """Share of the gradient's second moment that its mean explains.

    1 if the gradient is all signal; noise gives about (1-β1)/(1+β1)·(1-β1^2t)/(1-β1^t)², if β2 is
    near 1 and β1 is not small.
    """
    return ratio(signal, second_moment_positive)


@statistic(
    "moments",
    "√mean(g̃²/max(ṽ, ε²)) over active elements",
    source="RMS_t of StableAdamW, Wortsman et al. 2023, arXiv 2304.13013",
    headline=True,
)
def rms_ratio(entered_over_second_moment: float, active: float) -> float | None:
    """How far the second moment lags behind the gradient.

    About 1 in health, far above 1 when the gradient has grown faster than it.
    """
    return root(ratio(entered_over_second_moment, active))


@statistic(
    "moments",
    "√(Σmax_exp_avg_sq/Σv), with amsgrad",
    source="Reddi et al. 2018, arXiv 1904.09237",
)
def amsgrad_gap(amsgrad_max_exp_avg_sq_sum: float, amsgrad_exp_avg_sq_sum: float) -> float | None:
    """How much smaller the steps are than without amsgrad: 1 if its maximum holds nothing back."""
    return root(ratio(amsgrad_max_exp_avg_sq_sum, amsgrad_exp_avg_sq_sum))


@statistic("underflow", "share of elements with m=v=g̃=0", unit="fraction")
def idle_fraction(active: float, elements: float) -> float | None:
    """Share of elements that have never had a gradient: rows not seen, inputs always zero."""
    return ratio(elements - active, elements)


@statistic("underflow", "share of active elements with √v̂ < ε", unit="fraction", headline=True)
def eps_dominated_fraction(eps_dominated: float, active: float) -> float | None:
    """Share of the active elements whose denominator is mostly eps: there Adam is SGD."""
    return ratio(eps_dominated, active)


@statistic(
    "underflow",
    "mean(√v̂/(√v̂+ε)) over active elements",
    source="Wortsman et al. 2023, arXiv 2309.14322",
)
def eps_damping(denominator_share: float, active: float) -> float | None:
    """What eps leaves of an element's step, on average: 1 if it is not felt, 0 if it is all."""
    return ratio(denominator_share, active)


@statistic("underflow", "Σu²r(2+r) / Σ(m̂²/v̂) over v̂>0, r = ε/√v̂", unit="fraction", headline=True)
def eps_energy_loss(energy_lost_to_eps: float, energy_without_eps: float) -> float | None:
    """Share of the update's energy that eps takes: 0 in health.

    Rows that went quiet do not move it.
    """
    return ratio(energy_lost_to_eps, energy_without_eps)


@statistic("underflow", "share of elements with v=0 and g̃≠0", unit="fraction", headline=True)
def exp_avg_sq_zero_fraction(exp_avg_sq_zero: float, elements: float) -> float | None:
    """Share of elements whose second moment has underflowed: it is 0, their gradient is not."""
    return ratio(exp_avg_sq_zero, elements)


@statistic("underflow", "share of elements with 0 < v < the smallest normal", unit="fraction")
def exp_avg_sq_subnormal_fraction(exp_avg_sq_subnormal: float, elements: float) -> float | None:
    """Share of elements whose second moment is subnormal in its dtype: it loses digits."""
    return ratio(exp_avg_sq_subnormal, elements)


@statistic("underflow", "share of elements with v>0 and fl(β2·v)=v", unit="fraction")
def exp_avg_sq_stalled_fraction(exp_avg_sq_stalled: float, elements: float) -> float | None:
    """Share of elements whose second moment cannot decay in its dtype, as in bf16 with β2=0.999."""
    return ratio(exp_avg_sq_stalled, elements)


@statistic(
    "underflow", "share with fl(p-ηu)=p among elements with ηu≠0", unit="fraction", headline=True
)
def update_lost_fraction(update_lost: float, update_nonzero: float) -> float | None:
    """Share of the updates that are rounded away in the parameter's dtype."""
    return ratio(update_lost, update_nonzero)


@statistic("underflow", "share of elements with g=0", unit="fraction")
def grad_zero_fraction(grad_zero: float, elements: float) -> float | None:
    """Share of elements whose gradient is exactly zero: not used in this step, or underflowed."""
    return ratio(grad_zero, elements)


@statistic(
    "underflow", "number of elements with a non-finite g, m, v or p", unit="elements", headline=True
)
def nonfinite_count(nonfinite: float) -> float | None:
    """Elements in which something is NaN or infinite."""
    return nonfinite


@statistic("update", "‖ηu‖", unit="weight", headline=True)
def update_norm(update_squares: float) -> float | None:
    """Norm of the step that Adam took, without the decay."""
    return math.sqrt(update_squares)


@statistic("update", "√mean(u²) over active elements", headline=True)
def normalized_update_rms(direction_squares: float, active: float) -> float | None:
    """Size of the step in units of the learning rate.

    Near 1 if successive gradients agree, about √((1-β1)/(1+β1)) if they are noise.
    """
    return root(ratio(direction_squares, active))


@statistic("update", "max |u| over active elements")
def normalized_update_max(direction_max_abs: float) -> float | None:
    """Largest step of any element in units of the learning rate."""
    return of_any(direction_max_abs)


@statistic("update", "share of active elements with |u| > 0.8", unit="fraction")
def normalized_update_large_fraction(direction_large: float, active: float) -> float | None:
    """Share of the active elements that take nearly the longest step: their gradients agree."""
    return ratio(direction_large, active)


@statistic("update", "‖ηu‖/‖p‖", headline=True)
def update_to_weight(update_squares: float, weight_squares: float) -> float | None:
    """Relative size of the step."""
    return ratio(math.sqrt(update_squares), math.sqrt(weight_squares))


@statistic("weight_decay", "‖p‖", unit="weight", headline=True)
def weight_norm(weight_squares: float) -> float | None:
    """Norm of the parameters."""
    return math.sqrt(weight_squares)


@statistic("weight_decay", "√mean(p²)", unit="weight")
def weight_rms(weight_squares: float, elements: float) -> float | None:
    """Root mean square of the parameters."""
    return root(ratio(weight_squares, elements))


@statistic(
    "weight_decay",
    "decoupled ‖ηλp₀‖, coupled ‖λp₀‖, over decayed tensors of one kind",
    unit="weight; gradient if coupled",
    headline=True,
)
def decay_norm(
    decoupled_elements: float,
    decoupled_decay_squares: float,
    coupled_elements: float,
    coupled_decay_squares: float,
) -> float | None:
    """Norm of what weight decay takes off the weights, or, coupled, adds to the gradient."""
    if bool(decoupled_elements) == bool(coupled_elements):
        return None
    return math.sqrt(decoupled_decay_squares + coupled_decay_squares)


@statistic("weight_decay", "‖ηλp₀‖/‖ηu‖ over tensors under decoupled decay", headline=True)
def decay_to_update(
    decoupled_decay_squares: float, decoupled_update_squares: float
) -> float | None:
    """Decoupled decay beside the step it accompanies."""
    return ratio(math.sqrt(decoupled_decay_squares), math.sqrt(decoupled_update_squares))


@statistic("weight_decay", "cos(ηλp₀, ηu) over tensors under decoupled decay")
def decay_alignment(
    decoupled_decay_times_update: float,
    decoupled_decay_squares: float,
    decoupled_update_squares: float,
) -> float | None:
    """Cosine between what decoupled decay and the step take off: -1 if they fight."""
    return cosine(decoupled_decay_times_update, decoupled_decay_squares, decoupled_update_squares)


@statistic("weight_decay", "‖λp₀‖/‖g‖ over tensors under coupled decay")
def decay_to_grad(coupled_decay_squares: float, coupled_grad_squares: float) -> float | None:
    """Coupled decay beside the gradient it is added to."""
    return ratio(math.sqrt(coupled_decay_squares), math.sqrt(coupled_grad_squares))


@statistic(
    "weight_decay",
    "share with fl(p(1-ηλ))=p among elements with p≠0 under decoupled decay",
    unit="fraction",
)
def decay_lost_fraction(
    decoupled_decay_lost: float, decoupled_weight_nonzero: float
) -> float | None:
    """Share of the weights from which decay is rounded away in their dtype."""
    return ratio(decoupled_decay_lost, decoupled_weight_nonzero)


@statistic(
    "weight_decay",
    "1/(ηλ) over tensors under decoupled decay",
    unit="steps",
    source="Wang & Aitchison 2024, arXiv 2405.13698",
)
def decay_timescale(
    decoupled_decay_rate: float, negated_smallest_decoupled_decay_rate: float
) -> float | None:
    """Steps in which decay forgets a weight, where the scope has one learning rate and decay."""
    rate = one_value(decoupled_decay_rate, negated_smallest_decoupled_decay_rate)
    return None if rate is None else ratio(1.0, rate)


@statistic(
    "weight_decay",
    "√(Σp²/Σ(η/2λ)) over elements under decoupled decay",
    source="Kosson et al. 2023, arXiv 2305.17212",
)
def equilibrium_ratio(
    decoupled_weight_squares: float, decoupled_equilibrium_squares: float
) -> float | None:
    """The weights beside the size at which decay and noisy steps balance: 1 in equilibrium."""
    return root(ratio(decoupled_weight_squares, decoupled_equilibrium_squares))


@statistic("schedule", "η", headline=True)
def lr(lr: float, negated_smallest_lr: float) -> float | None:
    """Learning rate of the step, where the scope has one."""
    return one_value(lr, negated_smallest_lr)


@statistic("schedule", "β1")
def beta1(beta1: float, negated_smallest_beta1: float) -> float | None:
    """Decay rate of the first moment, where the scope has one."""
    return one_value(beta1, negated_smallest_beta1)


@statistic("schedule", "β2")
def beta2(beta2: float, negated_smallest_beta2: float) -> float | None:
    """Decay rate of the second moment, where the scope has one."""
    return one_value(beta2, negated_smallest_beta2)


@statistic("schedule", "ε", unit="gradient")
def eps(eps: float, negated_smallest_eps: float) -> float | None:
    """What is added to the denominator, where the scope has one."""
    return one_value(eps, negated_smallest_eps)


@statistic("schedule", "λ")
def weight_decay(weight_decay: float, negated_smallest_weight_decay: float) -> float | None:
    """Strength of weight decay, where the scope has one."""
    return one_value(weight_decay, negated_smallest_weight_decay)


@statistic("schedule", "t", unit="steps")
def step(step: float, negated_smallest_step: float) -> float | None:
    """Steps that the state has seen, where all tensors of the scope have seen as many."""
    return one_value(step, negated_smallest_step)


@statistic("schedule", "steps that changed nothing", unit="steps")
def skipped_steps(skipped_steps: float) -> float | None:
    """Steps of the optimizer that were skipped so far, for an inf in the gradient or for none."""
    return None if math.isnan(skipped_steps) else of_any(skipped_steps)


def explain_statistic(statistic: Statistic) -> str:
    """Returns the key, the meaning, the definition and the source of a statistic.

    Example:
        >>> print(explain_statistic(STATISTICS["rms_ratio"]))
        adam_moments/rms_ratio (logged by default)
            How far the second moment lags behind the gradient. About 1 in health, far above 1
            when the gradient has grown faster than it.
            = √mean(g̃²/max(ṽ, ε²)) over active elements
            RMS_t of StableAdamW, Wortsman et al. 2023, arXiv 2304.13013
    """
    override = format_override("adam_monitor.statistics", ["headline", statistic.name])
    default = "logged by default" if statistic.is_headline else f"log with {override}"
    unit = f" [{statistic.unit}]" if statistic.unit else ""
    lines = [f"{statistic.key} ({default})"]
    lines += textwrap.wrap(statistic.meaning, 86, initial_indent=" " * 4, subsequent_indent=" " * 4)
    lines.append(f"    = {statistic.formula}{unit}")
    lines += [f"    {statistic.source}"] if statistic.source else []
    return "\n".join(lines)
