"""Rules on numerical faults: NaN, eps, underflow and rounding."""

import math
from collections.abc import Mapping

from lightning_adam.config.monitor import Scope, Severity
from lightning_adam.findings import suggestions
from lightning_adam.findings.context import GradientTrend, RunFacts
from lightning_adam.findings.rule import Warmup, rule

MODEL_AND_LAYERS = (Scope.model, Scope.layer)


@rule(
    severity=Severity.error,
    sentence="{nonfinite_count:.0f} elements are NaN or infinite.",
    when="nonfinite_count is not 0",
    suggest=suggestions.locate_nonfinite,
    source="arithmetic",
    patience=1,
    warmup=Warmup.NONE,
    waits_for_peak=False,
)
def not_finite(nonfinite_count: float) -> bool:
    """A gradient, moment or parameter is NaN or infinite after a step.

    The value stays in the moments and spreads to every parameter. The finding names the first
    tensors.
    """
    return nonfinite_count != 0


@rule(
    severity=Severity.error,
    sentence="eps removes {eps_energy_loss:.0%} of the energy of the update: it outweighs √v̂.",
    when="eps_energy_loss is above {threshold:g} and denominator_mean is below"
    " {denominator_below:g} times eps. It is info if denominator_mean is below {beside_model:g} of"
    " that of the model, or the smoothed grad_norm is below {converged_below:g} of its maximum or"
    " above {grown_above:g} times its first value",
    suggest=suggestions.reduce_eps,
    source="Wortsman et al. 2023, arXiv 2309.14322; Everett et al. 2024, arXiv 2407.05872;"
    " thresholds calibrated",
    scopes=MODEL_AND_LAYERS,
    is_local=True,
    suppressed_by=("not_finite", "exp_avg_sq_underflow"),
    evidence=("eps_dominated_fraction", "eps_damping"),
    limits={"eps_energy_loss": "threshold"},
)
def eps_dominates(
    eps_energy_loss: float,
    denominator_mean: float,
    eps: float,
    gradient: GradientTrend,
    model: Mapping[str, float],
    *,
    threshold: float = 0.3,
    denominator_below: float = 10.0,
    beside_model: float = 1e-3,
    converged_below: float = 0.1,
    grown_above: float = 10.0,
) -> bool | Severity:
    """The denominator is mostly eps, so that steps shrink with the gradient, as in SGD.

    If the mean denominator is well above eps, eps dominates only elements with negligible
    gradients, such as embedding rows of unused tokens. In healthy runs, gradients can also be small
    for a while: at convergence, or behind a gate that is initialized to 0.
    """
    if eps_energy_loss <= threshold or denominator_mean >= denominator_below * eps:
        return False
    is_negligible = denominator_mean < beside_model * model["denominator_mean"]
    has_changed = gradient.decline < converged_below or gradient.growth > grown_above
    return Severity.info if is_negligible or has_changed else True


@rule(
    severity=Severity.error,
    sentence="The second moment of {exp_avg_sq_zero_fraction:.0%} of the elements has underflowed:"
    " it is 0, but their gradient is not.",
    when="exp_avg_sq_zero_fraction is above {threshold:g}",
    suggest=suggestions.prevent_underflow,
    source="derived: v is 0 for a first gradient below 5.5e-3 in float16, 2.1e-19 in bfloat16,"
    " 8.4e-22 in float32, at β2 = 0.999; threshold calibrated",
    scopes=MODEL_AND_LAYERS,
    is_local=True,
    warmup=Warmup.NONE,
    waits_for_peak=False,
    suppressed_by=("not_finite",),
    evidence=("grad_rms", "eps_damping"),
    limits={"exp_avg_sq_zero_fraction": "threshold"},
)
def exp_avg_sq_underflow(exp_avg_sq_zero_fraction: float, *, threshold: float = 0.01) -> bool:
    """Small gradients square to 0 in the dtype of the state: the denominator is only eps."""
    return exp_avg_sq_zero_fraction > threshold


@rule(
    severity=Severity.error,
    sentence="The second moment of {exp_avg_sq_stalled_fraction:.0%} of the elements cannot decay"
    " in its dtype: the gradient is only {rms_ratio:.0%} of its root.",
    when="exp_avg_sq_stalled_fraction is above {threshold:g} and rms_ratio is below"
    " {rms_ratio_below:g}",
    suggest=suggestions.let_state_decay,
    source="derived: half an ulp of bfloat16 is larger than (1-β2)v for 1-β2 below 0.002 to 0.004;"
    " threshold calibrated",
    is_local=True,
    suppressed_by=("not_finite",),
    evidence=("normalized_update_rms",),
    limits={"exp_avg_sq_stalled_fraction": "threshold"},
)
def exp_avg_sq_stalled(
    exp_avg_sq_stalled_fraction: float,
    rms_ratio: float,
    *,
    threshold: float = 0.5,
    rms_ratio_below: float = 0.3,
) -> bool:
    """The second moment grows with the gradient but cannot decay again, so that steps stay small.

    (1-β2)v is less than half a unit in the last place of v, as in bfloat16 with β2 = 0.999.
    """
    return exp_avg_sq_stalled_fraction > threshold and rms_ratio < rms_ratio_below


@rule(
    severity=Severity.error,
    sentence="{update_lost_fraction:.0%} of the updates are rounded away: the weights do not"
    " change.",
    when="the update is lost in more than {threshold:g} of the elements that have a gradient, and"
    " lr is at least 1 % of its peak",
    suggest=suggestions.keep_updates,
    source="Zamirai et al. 2020, arXiv 2010.06192; threshold calibrated",
    is_local=True,
    warmup=Warmup.NONE,
    suppressed_by=("not_finite", "exp_avg_sq_stalled", "eps_dominates", "schedule_exhausted"),
    evidence=("grad_zero_fraction", "update_to_weight"),
)
def updates_lost(
    update_lost_fraction: float,
    grad_zero_fraction: float,
    lr: float,
    run: RunFacts,
    *,
    threshold: float = 0.5,
) -> bool:
    """Updates below half a unit in the last place of their weight have no effect.

    This is normal for elements without a gradient, and at the end of a schedule.
    """
    lost = update_lost_fraction - grad_zero_fraction
    return lost > threshold * (1 - grad_zero_fraction) and _is_before_end(lr, run)


@rule(
    severity=Severity.warning,
    sentence="Weight decay is rounded away from {decay_lost_fraction:.0%} of the weights.",
    when="decay_lost_fraction is above {threshold:g}, lr is at least 1 % of its peak, and decay"
    " would shrink a weight by more than 1 % over the run",
    suggest=suggestions.use_mixed_precision,
    source="Zamirai et al. 2020, arXiv 2010.06192; Nerogar/OneTrainer issue 996; threshold"
    " calibrated",
    is_local=True,
    warmup=Warmup.NONE,
    suppressed_by=("updates_lost", "not_finite"),
    evidence=("decay_to_update",),
    limits={"decay_lost_fraction": "threshold"},
)
def decay_lost(
    decay_lost_fraction: float,
    lr: float,
    weight_decay: float,
    run: RunFacts,
    *,
    threshold: float = 0.5,
) -> bool:
    """p(1-ηλ) rounds to p in the dtype of the weights, as for ηλ below 0.002 in bfloat16."""
    steps = min(run.total_steps, 1e6)
    would_matter = lr * weight_decay * steps > 0.01
    return decay_lost_fraction > threshold and would_matter and _is_before_end(lr, run)


def _is_before_end(lr: float, run: RunFacts) -> bool:
    """Whether the learning rate is at least 1 % of its peak."""
    return math.isnan(run.peak_lr) or lr >= 0.01 * run.peak_lr
