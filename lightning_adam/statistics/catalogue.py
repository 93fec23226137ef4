"""The catalogue of statistics, one function each.

A kernel returns a row of columns for each tensor: sums, counts and maxima. They are aggregated to
accumulators over the tensors of a layer, a group or the model, and over ranks. A statistic is
derived from accumulators, so that the value of a group is never a mean of means.

The arguments of a statistic are the names of accumulators. To add a statistic, write a function
here. Add a missing accumulator to `ACCUMULATORS`, and a missing column to `DERIVED`, or to
`COLUMNS` and each kernel.
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
from lightning_adam.statistics.columns import ACCUMULATORS, Capabilities

SYMBOLS = """\
p parameter, m exp_avg and v exp_avg_sq after the step; g the gradient of the step, clipped and
unscaled; η lr, λ weight_decay, ε eps, t the step; m̂ = m/(1-β1^t), ṽ = v/(1-β2^t); v̂ = ṽ, with
amsgrad max_exp_avg_sq/(1-β2^t); u = m̂/(√v̂+ε); p₀ the parameter before the step; g̃ the effective
gradient: g (-g with maximize), plus λp₀ with coupled decay; m₋₁ = (m-(1-β1)g̃)/β1 the first moment
before the step; fl(x) is x rounded to the tensor's dtype. An element is active unless m = v = g̃ =
0. A tensor decays if its λ > 0: decoupled, as in AdamW, or coupled, as in Adam."""
"""The symbols of the formulas."""


@dataclass(frozen=True)
class Statistic:
    """The definition of a statistic."""

    name: str
    family: str
    """First part of the key: `adam_<family>/<name>`."""
    meaning: str
    """Explanation in words."""
    formula: str
    """Definition in words and `SYMBOLS`."""
    unit: str
    """Unit; empty for a pure number."""
    source: str
    """The paper that defines it; empty if there is none."""
    is_headline: bool
    """Whether it is logged by default."""
    accumulators: tuple[str, ...]
    """The accumulators that are the arguments of `derive`, in order."""
    derive: Callable[..., float | None]
    """Computes the value from accumulators; None if undefined (empty set, 0/0, mixed values)."""

    @property
    def key(self) -> str:
        """The key of the value for the model."""
        return self.key_of("")

    def key_of(self, scope: str) -> str:
        """Returns the key of the value for a scope.

        Args:
            scope: The part of the key for the scope, as in `group/decay/`; empty for the model.
        """
        return f"adam_{self.family}/{scope}{self.name}"

    @property
    def needs(self) -> Capabilities:
        """The capabilities that an optimizer needs."""
        needs = (ACCUMULATORS[name].needs for name in self.accumulators)
        return reduce(or_, needs)


STATISTICS: dict[str, Statistic] = {}
"""The statistics by name, in display order."""
Derive = Callable[..., float | None]


def statistic(
    family: str, formula: str, *, unit: str = "", source: str = "", headline: bool = False
) -> Callable[[Derive], Derive]:
    """Adds a function to the catalogue: its name is the statistic, its docstring the meaning.

    Args:
        family: First part of the key: gradient, moments, underflow, update, weight_decay, schedule.
        formula: The definition in words and `SYMBOLS`.
        unit: Unit (default: none, a pure number).
        source: The paper that defines it (default: none).
        headline: Whether it is logged by default (default: False).

    Example:
        >>> @statistic("moments", "√Σg²/Σp²")
        ... def grad_to_weight(grad_squares, weight_squares):
        ...     '''The gradient relative to the weights.'''
        ...     return root(ratio(grad_squares, weight_squares))
        >>> added = STATISTICS.pop("grad_to_weight")
        >>> added.key, added.derive(4.0, 1.0)
        ('adam_moments/grad_to_weight', 2.0)
    """

    def register(derive: Derive) -> Derive:
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

    return register


def select(patterns: Iterable[str]) -> list[Statistic]:
    """Returns the statistics that match a selection, in the order of the catalogue.

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
        if any(_matches(pattern, statistic) for pattern in patterns)
    ]


def _matches(pattern: str, statistic: Statistic) -> bool:
    if pattern in ("headline", "all"):
        return pattern == "all" or statistic.is_headline
    names = (statistic.name, f"{statistic.family}/{statistic.name}", statistic.key)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def key_part(name: object) -> str:
    """Returns a name as one part of a key, with only letters, digits, `_` and `.`.

    Example:
        >>> key_part("encoder/block (frozen)")
        'encoder_block__frozen_'
    """
    return re.sub(r"[^A-Za-z0-9_.]", "_", str(name))


SMALLEST_PREVIOUS = 1e-3
"""Smallest fraction of ‖m‖² that ‖β1·m₋₁‖² may be: below it, m₋₁ is mostly rounding error."""


def ratio(numerator: float, denominator: float) -> float | None:
    """Returns a quotient, or None if it is undefined.

    Example:
        >>> ratio(1.0, 2.0), ratio(0.0, 0.0)
        (0.5, None)
    """
    return None if denominator == 0 else numerator / denominator


def root(square: float | None) -> float | None:
    """Returns a square root, or None if the square is undefined.

    Example:
        >>> root(4.0), root(None)
        (2.0, None)
    """
    return None if square is None else math.sqrt(square)


def largest_of(maximum: float) -> float | None:
    """Returns a maximum, or None if there were no values.

    Example:
        >>> largest_of(2.0), largest_of(-math.inf)
        (2.0, None)
    """
    return None if maximum == -math.inf else maximum


def one_value(largest: float, negated_smallest: float) -> float | None:
    """Returns the common value of all tensors of a scope, or None if they differ.

    Example:
        >>> one_value(0.1, -0.1), one_value(0.2, -0.1)
        (0.1, None)
    """
    return largest_of(largest) if largest == -negated_smallest else None


def cosine(product: float, squares: float, other_squares: float) -> float | None:
    """Returns the cosine between two vectors, or None if one of them is zero.

    Args:
        product: Their inner product.
        squares: The square of the first norm.
        other_squares: The square of the second norm.

    Example:
        >>> cosine(-6.0, 4.0, 9.0), cosine(0.0, 0.0, 9.0)
        (-1.0, None)
    """
    return ratio(product, math.sqrt(squares) * math.sqrt(other_squares))


@statistic("gradient", "‖g‖", unit="gradient", headline=True)
def grad_norm(grad_squares: float) -> float | None:
    """Norm of the gradient that the step used, clipped and unscaled."""
    return math.sqrt(grad_squares)


@statistic("gradient", "√mean(g²)", unit="gradient")
def grad_rms(grad_squares: float, elements: float) -> float | None:
    """Root mean square of the gradient: its norm, independent of the number of parameters."""
    return root(ratio(grad_squares, elements))


@statistic("gradient", "max |g|", unit="gradient")
def grad_max(grad_max_abs: float) -> float | None:
    """Largest gradient of any element."""
    return largest_of(grad_max_abs)


@statistic("gradient", "fraction of elements with g=0", unit="fraction")
def grad_zero_fraction(grad_zero: float, elements: float) -> float | None:
    """Fraction of elements with a gradient of exactly 0: not used in the step, or underflowed."""
    return ratio(grad_zero, elements)


@statistic("gradient", "‖g‖ before clipping", unit="gradient", headline=True)
def grad_norm_before_clip(grad_squares_before_clip: float) -> float | None:
    """Norm of the unscaled gradient before the Trainer clips it; absent without clipping."""
    return None if math.isnan(grad_squares_before_clip) else math.sqrt(grad_squares_before_clip)


@statistic("gradient", "‖g‖ after clipping / ‖g‖ before", unit="fraction", headline=True)
def clip_coefficient(grad_squares: float, grad_squares_before_clip: float) -> float | None:
    """Factor by which clipping scales the gradient: 1 without effect; absent without clipping."""
    if math.isnan(grad_squares_before_clip):
        return None
    return ratio(math.sqrt(grad_squares), math.sqrt(grad_squares_before_clip))


@statistic("gradient", "scale of the GradScaler")
def loss_scale(loss_scale: float) -> float | None:
    """Factor by which the GradScaler multiplies the loss; absent without a GradScaler."""
    return None if math.isnan(loss_scale) else largest_of(loss_scale)


@statistic("moments", "√mean(m²)", unit="gradient", headline=True)
def exp_avg_rms(exp_avg_squares: float, elements: float) -> float | None:
    """Root mean square of the first moment."""
    return root(ratio(exp_avg_squares, elements))


@statistic("moments", "mean(m)", unit="gradient")
def exp_avg_mean(exp_avg_sum: float, elements: float) -> float | None:
    """Signed mean of the first moment: far from 0 if many elements move in the same direction."""
    return ratio(exp_avg_sum, elements)


@statistic("moments", "max |m|", unit="gradient")
def exp_avg_max(exp_avg_max_abs: float) -> float | None:
    """Largest first moment of any element."""
    return largest_of(exp_avg_max_abs)


@statistic("moments", "mean(v)", unit="gradient²", headline=True)
def exp_avg_sq_mean(exp_avg_sq_sum: float, elements: float) -> float | None:
    """Mean of the second moment."""
    return ratio(exp_avg_sq_sum, elements)


@statistic("moments", "max v", unit="gradient²")
def exp_avg_sq_max(exp_avg_sq_largest: float) -> float | None:
    """Largest second moment of any element."""
    return largest_of(exp_avg_sq_largest)


@statistic("moments", "mean(√v̂)", unit="gradient", headline=True)
def denominator_mean(denominator_sum: float, elements: float) -> float | None:
    """Mean of the denominator before eps is added. eps should be far below it."""
    return ratio(denominator_sum, elements)


@statistic("moments", "cos(m₋₁, g̃)", headline=True)
def grad_momentum_cosine(
    previous_exp_avg_times_grad: float,
    previous_exp_avg_squares: float,
    effective_grad_squares: float,
    exp_avg_squares: float,
) -> float | None:
    """Cosine between the first moment before the step and the effective gradient.

    0 if successive gradients are noise, 1 if they are constant. Undefined if the first moment
    consists of the current gradient only, as at the first step.
    """
    if previous_exp_avg_squares < SMALLEST_PREVIOUS * exp_avg_squares:
        return None
    return cosine(previous_exp_avg_times_grad, previous_exp_avg_squares, effective_grad_squares)


@statistic("moments", "‖β1·m₋₁‖/‖m‖")
def exp_avg_carryover(previous_exp_avg_squares: float, exp_avg_squares: float) -> float | None:
    """Share of the first moment that stems from earlier steps.

    0 at the first step and after the moments were lost, β1 if the gradient is constant.
    """
    if 0 <= previous_exp_avg_squares < SMALLEST_PREVIOUS * exp_avg_squares:
        return 0.0
    return ratio(math.sqrt(max(previous_exp_avg_squares, 0.0)), math.sqrt(exp_avg_squares))


@statistic("moments", "mean(min(m̂²/ṽ, 1)) over ṽ>0", unit="fraction")
def signal_fraction(signal: float, second_moment_positive: float) -> float | None:
    """Fraction of the gradient's second moment that its mean explains.

    1 if the gradient is constant. Noise gives about (1-β1)/(1+β1)·(1-β1^2t)/(1-β1^t)² if β2 is near
    1 and β1 is not small.
    """
    return ratio(signal, second_moment_positive)


@statistic(
    "moments",
    "√mean(g̃²/max(ṽ, ε²)) over active elements",
    source="RMS_t of StableAdamW, Wortsman et al. 2023, arXiv 2304.13013",
    headline=True,
)
def rms_ratio(grad_over_second_moment: float, active: float) -> float | None:
    """Gradient relative to the root of the second moment: about 1 in a healthy run.

    Far above 1 if the gradient grows faster than the second moment.
    """
    return root(ratio(grad_over_second_moment, active))


@statistic(
    "moments",
    "max over tensors of rms_ratio",
    source="RMS_t of StableAdamW, Wortsman et al. 2023, arXiv 2304.13013",
    headline=True,
)
def rms_ratio_max(rms_ratio: float) -> float | None:
    """Largest rms_ratio of any tensor, which shows a jump in a single layer."""
    return largest_of(rms_ratio)


@statistic(
    "moments",
    "√(Σmax_exp_avg_sq/Σv), with amsgrad",
    source="Reddi et al. 2018, arXiv 1904.09237",
)
def amsgrad_gap(amsgrad_max_exp_avg_sq_sum: float, amsgrad_exp_avg_sq_sum: float) -> float | None:
    """Factor by which amsgrad shrinks the steps: 1 if the maximum has no effect."""
    return root(ratio(amsgrad_max_exp_avg_sq_sum, amsgrad_exp_avg_sq_sum))


@statistic("underflow", "fraction of elements with m=v=g̃=0", unit="fraction")
def idle_fraction(active: float, elements: float) -> float | None:
    """Fraction of elements that never had a gradient, such as rows of unused tokens."""
    return ratio(elements - active, elements)


@statistic("underflow", "fraction of active elements with √v̂ < ε", unit="fraction", headline=True)
def eps_dominated_fraction(eps_dominated: float, active: float) -> float | None:
    """Fraction of active elements with a denominator of mostly eps, where Adam acts like SGD."""
    return ratio(eps_dominated, active)


@statistic(
    "underflow",
    "mean(√v̂/(√v̂+ε)) over active elements",
    source="Wortsman et al. 2023, arXiv 2309.14322",
)
def eps_damping(denominator_share: float, active: float) -> float | None:
    """Mean factor by which eps shrinks the step of an element: 1 if eps has no effect."""
    return ratio(denominator_share, active)


@statistic("underflow", "Σu²r(2+r) / Σ(m̂²/v̂) over v̂>0, r = ε/√v̂", unit="fraction", headline=True)
def eps_energy_loss(energy_lost_to_eps: float, energy_without_eps: float) -> float | None:
    """Fraction of the update's energy that eps removes: 0 in a healthy run.

    Elements with a negligible gradient hardly affect it.
    """
    return ratio(energy_lost_to_eps, energy_without_eps)


@statistic("underflow", "fraction of elements with v=0 and g̃≠0", unit="fraction", headline=True)
def exp_avg_sq_zero_fraction(exp_avg_sq_zero: float, elements: float) -> float | None:
    """Fraction of elements with an underflowed second moment: it is 0, but the gradient is not."""
    return ratio(exp_avg_sq_zero, elements)


@statistic("underflow", "fraction of elements with 0 < v < the smallest normal", unit="fraction")
def exp_avg_sq_subnormal_fraction(exp_avg_sq_subnormal: float, elements: float) -> float | None:
    """Fraction of elements with a subnormal second moment, which has fewer digits."""
    return ratio(exp_avg_sq_subnormal, elements)


@statistic("underflow", "fraction of elements with v>0 and fl(β2·v)=v", unit="fraction")
def exp_avg_sq_stalled_fraction(exp_avg_sq_stalled: float, elements: float) -> float | None:
    """Fraction of elements with a second moment that cannot decay, as in bf16 with β2=0.999."""
    return ratio(exp_avg_sq_stalled, elements)


@statistic(
    "underflow", "fraction with fl(p-ηu)=p among elements with ηu≠0", unit="fraction", headline=True
)
def update_lost_fraction(update_lost: float, update_nonzero: float) -> float | None:
    """Fraction of updates that are rounded away in the dtype of the parameter."""
    return ratio(update_lost, update_nonzero)


@statistic(
    "underflow", "number of elements with a non-finite g, m, v or p", unit="elements", headline=True
)
def nonfinite_count(nonfinite: float) -> float | None:
    """Number of elements with a NaN or infinite gradient, moment or parameter."""
    return nonfinite


@statistic("update", "‖ηu‖", unit="weight", headline=True)
def update_norm(update_squares: float) -> float | None:
    """Norm of the step without decoupled weight decay."""
    return math.sqrt(update_squares)


@statistic("update", "√mean(u²) over active elements", headline=True)
def normalized_update_rms(normalized_update_squares: float, active: float) -> float | None:
    """Root mean square of the step in units of the learning rate.

    Near 1 if successive gradients agree, about √((1-β1)/(1+β1)) if they are noise.
    """
    return root(ratio(normalized_update_squares, active))


@statistic("update", "max |u| over active elements")
def normalized_update_max(normalized_update_max_abs: float) -> float | None:
    """Largest step of any element in units of the learning rate."""
    return largest_of(normalized_update_max_abs)


@statistic("update", "fraction of active elements with |u| > 0.8", unit="fraction")
def normalized_update_large_fraction(normalized_update_large: float, active: float) -> float | None:
    """Fraction of active elements with almost the largest step: their gradients agree."""
    return ratio(normalized_update_large, active)


@statistic("update", "‖ηu‖/‖p‖", headline=True)
def update_to_weight(update_squares: float, weight_squares: float) -> float | None:
    """Norm of the step relative to that of the weights."""
    return ratio(math.sqrt(update_squares), math.sqrt(weight_squares))


@statistic("update", "max over tensors of update_to_weight")
def update_to_weight_max(update_to_weight: float) -> float | None:
    """Largest update_to_weight of any tensor."""
    return largest_of(update_to_weight)


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
    "‖ηλp₀‖ over decayed tensors, ‖ηλp₀/(√v̂+ε)‖ for coupled ones",
    unit="weight",
    headline=True,
)
def decay_norm(
    decoupled_elements: float,
    decoupled_decay_squares: float,
    coupled_elements: float,
    coupled_decay_step_squares: float,
) -> float | None:
    """Norm of the change of the weights by weight decay in one step."""
    if not (decoupled_elements or coupled_elements):
        return None
    return math.sqrt(decoupled_decay_squares + coupled_decay_step_squares)


@statistic("weight_decay", "‖ηλp₀‖/‖ηu‖ over tensors under decoupled decay", headline=True)
def decay_to_update(
    decoupled_decay_squares: float, decoupled_update_squares: float
) -> float | None:
    """Norm of decoupled decay relative to that of the step."""
    return ratio(math.sqrt(decoupled_decay_squares), math.sqrt(decoupled_update_squares))


@statistic("weight_decay", "cos(ηλp₀, ηu) over tensors under decoupled decay")
def decay_alignment(
    decoupled_decay_times_update: float,
    decoupled_decay_squares: float,
    decoupled_update_squares: float,
) -> float | None:
    """Cosine between decoupled decay and the step: -1 if they oppose each other."""
    return cosine(decoupled_decay_times_update, decoupled_decay_squares, decoupled_update_squares)


@statistic("weight_decay", "‖λp₀‖/‖g‖ over tensors under coupled decay")
def decay_to_grad(coupled_decay_grad_squares: float, coupled_grad_squares: float) -> float | None:
    """Norm of coupled decay relative to that of the gradient it is added to."""
    return ratio(math.sqrt(coupled_decay_grad_squares), math.sqrt(coupled_grad_squares))


@statistic(
    "weight_decay",
    "fraction with fl(p(1-ηλ))=p among elements with p≠0 under decoupled decay",
    unit="fraction",
)
def decay_lost_fraction(
    decoupled_decay_lost: float, decoupled_weight_nonzero: float
) -> float | None:
    """Fraction of weights from which decay is rounded away."""
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
    """Number of steps in which decay alone shrinks a weight to 1/e, if ηλ is equal in the scope."""
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
    """Norm of the weights relative to that at which decay and noisy steps balance."""
    return root(ratio(decoupled_weight_squares, decoupled_equilibrium_squares))


@statistic("schedule", "max η over parameter groups", headline=True)
def lr(lr: float) -> float | None:
    """Learning rate of the step; the largest one if parameter groups differ."""
    return largest_of(lr)


@statistic("schedule", "β1")
def beta1(beta1: float, negated_smallest_beta1: float) -> float | None:
    """Decay rate of the first moment, if all parameter groups have the same."""
    return one_value(beta1, negated_smallest_beta1)


@statistic("schedule", "β2")
def beta2(beta2: float, negated_smallest_beta2: float) -> float | None:
    """Decay rate of the second moment, if all parameter groups have the same."""
    return one_value(beta2, negated_smallest_beta2)


@statistic("schedule", "ε", unit="gradient")
def eps(eps: float, negated_smallest_eps: float) -> float | None:
    """Constant added to the denominator, if all parameter groups have the same."""
    return one_value(eps, negated_smallest_eps)


@statistic("schedule", "λ")
def weight_decay(weight_decay: float, negated_smallest_weight_decay: float) -> float | None:
    """Weight decay, if all parameter groups have the same."""
    return one_value(weight_decay, negated_smallest_weight_decay)


@statistic("schedule", "t", unit="steps")
def step(step: float, negated_smallest_step: float) -> float | None:
    """Step count of the optimizer state, if all tensors have the same."""
    return one_value(step, negated_smallest_step)


@statistic("schedule", "number of skipped steps", unit="steps")
def skipped_steps(skipped_steps: float) -> float | None:
    """Number of steps skipped so far, because of an infinite or missing gradient."""
    return None if math.isnan(skipped_steps) else largest_of(skipped_steps)


HYPERPARAMETER_STATISTICS = ("beta1", "beta2", "eps", "weight_decay")
"""Statistics that are only logged when they change."""


def explain_statistic(statistic: Statistic) -> str:
    """Returns the key, meaning, definition and source of a statistic.

    Example:
        >>> print(explain_statistic(STATISTICS["rms_ratio"]))
        adam_moments/rms_ratio (logged by default)
            Gradient relative to the root of the second moment: about 1 in a healthy run. Far
            above 1 if the gradient grows faster than the second moment.
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
