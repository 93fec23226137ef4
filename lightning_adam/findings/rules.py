"""The rules: one declaration a pathology.

To add one, write a function under `@rule`, here or in your own code: its name is the code, its
docstring the meaning, its arguments what it judges by. Thresholds were calibrated on the runs of
`benchmarks/findings.py` where no paper gives them.
"""

import math
from collections.abc import Callable

from lightning_adam.config.monitor import Scope, Severity
from lightning_adam.findings import remedies
from lightning_adam.findings.rule import Past, Training, Warmup, rule

WHERE_ARITHMETIC_FAILS = (Scope.model, Scope.layer)


@rule(
    severity=Severity.error,
    sentence="{nonfinite_count:.0f} elements are NaN or infinite.",
    remedy=remedies.first_nonfinite,
    source="arithmetic",
    persistence=1,
    warmup=Warmup.NONE,
    explained_by=("eps_vanishes",),
)
def not_finite(nonfinite_count: float) -> bool:
    """A gradient, a moment or a parameter is NaN or infinite on a step that was taken.

    It stays in the moments and spreads to every parameter. The tensor that is named is the first.
    """
    return nonfinite_count != 0


@rule(
    severity=Severity.error,
    sentence="eps takes {eps_energy_loss:.0%} of the energy of the update: it outweighs √v̂.",
    remedy=remedies.smaller_eps,
    source="Wortsman et al. 2023, arXiv 2309.14322; Everett et al. 2024, arXiv 2407.05872;"
    " threshold calibrated",
    scopes=WHERE_ARITHMETIC_FAILS,
    explained_by=("not_finite", "exp_avg_sq_underflow", "eps_vanishes"),
    evidence=("eps_dominated_fraction", "eps_damping"),
)
def eps_dominates(
    eps_energy_loss: float,
    denominator_mean: float,
    eps: float,
    training: Training,
    *,
    threshold: float = 0.3,
    denominator_below: float = 100.0,
) -> bool:
    """Eps, not the second moment, divides the first: steps shrink with the gradient, as SGD's do.

    In health it shows where a loss has all but vanished, and in rows whose gradients do not matter
    beside the others', as those of tokens that never come: then the mean denominator is far above
    eps, by `denominator_below` or more.
    """
    is_all = denominator_mean < denominator_below * eps
    return eps_energy_loss > threshold and is_all and not training.has_converged


@rule(
    severity=Severity.error,
    sentence="The second moment of {exp_avg_sq_zero_fraction:.0%} of the elements has underflowed:"
    " their gradient is not 0.",
    remedy=remedies.state_that_holds_gradients,
    source="derived: v is 0 for a first gradient below 5.5e-3 in float16, 2.1e-19 in bfloat16,"
    " 8.4e-22 in float32, at β2 = 0.999; threshold calibrated",
    scopes=WHERE_ARITHMETIC_FAILS,
    warmup=Warmup.NONE,
    explained_by=("eps_vanishes",),
    evidence=("grad_rms", "eps_damping"),
)
def exp_avg_sq_underflow(exp_avg_sq_zero_fraction: float, *, threshold: float = 0.01) -> bool:
    """The square of a small gradient is 0 in the dtype of the state: only eps divides its step."""
    return exp_avg_sq_zero_fraction > threshold


@rule(
    severity=Severity.error,
    sentence="The second moment of {exp_avg_sq_stalled_fraction:.0%} of the elements cannot decay"
    " in its dtype: the gradient is {rms_ratio:.0%} of what it remembers.",
    remedy=remedies.state_that_decays,
    source="derived: half an ulp of bfloat16 is larger than (1-β2)v for 1-β2 below 0.002 to 0.004;"
    " threshold calibrated",
    explained_by=("not_finite",),
    evidence=("normalized_update_rms",),
)
def exp_avg_sq_stalled(
    exp_avg_sq_stalled_fraction: float,
    rms_ratio: float,
    training: Training,
    *,
    threshold: float = 0.5,
    lag_below: float = 0.3,
) -> bool:
    """The second moment grows with the gradient, but cannot fall with it again: steps stay small.

    (1-β2)v is less than half a unit in the last place of v, as in bfloat16 with β2 = 0.999.
    """
    return (
        exp_avg_sq_stalled_fraction > threshold
        and rms_ratio < lag_below
        and not training.has_converged
    )


@rule(
    severity=Severity.error,
    sentence="{update_lost_fraction:.0%} of the updates are rounded away: the weights do not move.",
    remedy=remedies.kept_updates,
    source="Zamirai et al. 2020, arXiv 2010.06192; threshold calibrated",
    warmup=Warmup.NONE,
    explained_by=("not_finite", "exp_avg_sq_stalled", "eps_dominates", "schedule_exhausted"),
    evidence=("grad_zero_fraction", "update_to_weight"),
)
def updates_lost(
    update_lost_fraction: float,
    grad_zero_fraction: float,
    lr: float,
    training: Training,
    *,
    threshold: float = 0.5,
) -> bool:
    """An update that is less than half a unit in the last place of its weight changes nothing.

    What is counted are the updates of elements that have a gradient, at least: those without
    fade away in health. The end of a schedule, at less than 1 % of the peak, does not count.
    """
    lost = update_lost_fraction - grad_zero_fraction
    return lost > threshold * (1 - grad_zero_fraction) and _is_under_way(lr, training)


@rule(
    severity=Severity.warning,
    sentence="The gradient is {rms_ratio:.1f} times as large as the second moment expects.",
    remedy=remedies.faster_second_moment,
    source="Wortsman et al. 2023, arXiv 2304.13013, section 3.4: spikes of the loss follow 1 to 8"
    " steps after a value of 2.3; threshold calibrated",
    persistence=1,
    explained_by=("not_finite", "exp_avg_sq_underflow", "state_mismatch", "eps_vanishes"),
    evidence=("grad_norm", "normalized_update_max"),
)
def exp_avg_sq_lags(rms_ratio: float, *, threshold: float = 3.0) -> bool:
    """The gradient has grown faster than the second moment could follow: steps are too large.

    It lasts a step or two, and a loss spike often follows. To see one, measure at every step.
    """
    return rms_ratio > threshold


@rule(
    severity=Severity.info,
    sentence="The gradient is {rms_ratio:.0%} of what the second moment remembers.",
    remedy=remedies.lower_beta2,
    source="2506.04805; threshold calibrated: a model that converges shows 0.03 to 0.3 in health",
    warmup=Warmup.SECOND_MOMENT,
    explained_by=("exp_avg_sq_stalled", "eps_dominates", "exp_avg_sq_underflow"),
)
def exp_avg_sq_stale(rms_ratio: float, *, threshold: float = 0.3) -> bool:
    """The second moment remembers an old, larger gradient: steps are smaller than they could be."""
    return rms_ratio < threshold


@rule(
    severity=Severity.warning,
    sentence="Weight decay changes nothing: it is rounded away from {decay_lost_fraction:.0%} of"
    " the weights.",
    remedy=remedies.kept_updates,
    source="Zamirai et al. 2020, arXiv 2010.06192; Nerogar/OneTrainer issue 996; threshold"
    " calibrated",
    warmup=Warmup.NONE,
    explained_by=("updates_lost", "not_finite"),
    evidence=("decay_to_update",),
)
def decay_lost(
    decay_lost_fraction: float,
    lr: float,
    weight_decay: float,
    training: Training,
    *,
    threshold: float = 0.5,
) -> bool:
    """p(1-ηλ) is p in the dtype of the weights, as for ηλ below 0.002 in bfloat16.

    A decay that would not have changed a weight by 1 % in the whole run is not missed.
    """
    steps = min(training.total_steps, 1e6)
    would_matter = lr * weight_decay * steps > 0.01
    return decay_lost_fraction > threshold and would_matter and _is_under_way(lr, training)


@rule(
    severity=Severity.warning,
    sentence="Steps repeat each other: their rms is {normalized_update_rms:.2f} learning rates, and"
    " {normalized_update_large_fraction:.0%} of the elements take the longest.",
    remedy=remedies.calmer_steps,
    source="Molybog et al. 2023, arXiv 2304.09871; threshold calibrated",
    warmup=Warmup.DIRECTION,
    explained_by=(
        "not_finite",
        "exp_avg_sq_lags",
        "exp_avg_sq_underflow",
        "updates_lost",
        "state_mismatch",
        "eps_vanishes",
    ),
    evidence=("grad_momentum_cosine",),
)
def correlated_updates(
    normalized_update_rms: float,
    normalized_update_large_fraction: float,
    update_to_weight: float,
    beta1: float,
    training: Training,
    *,
    threshold: float = 0.6,
    large_fraction: float = 0.2,
    update_to_weight_above: float = 1e-4,
    large_step: float = 5e-3,
) -> bool:
    """Gradients of successive steps agree, so that the elements move together, at full length.

    Large models diverge from it. Noise gives √((1-β1)/(1+β1)), 0.23 at β1 = 0.9: what counts is
    half as much again, and twice as many long steps as in noise. Where steps are below `large_step`
    of the weights and the loss falls, they agree because they are small, which does no harm.
    """
    noise = math.sqrt((1 - beta1) / (1 + beta1))
    is_long = normalized_update_rms > max(threshold, 1.5 * noise)
    are_many = normalized_update_large_fraction > max(
        large_fraction, 2 * math.erfc(0.8 / noise / 2**0.5)
    )
    does_no_harm = update_to_weight < large_step and training.loss_share < 1
    return (is_long or are_many) and update_to_weight >= update_to_weight_above and not does_no_harm


@rule(
    severity=Severity.warning,
    sentence="A step moves the weights by {update_to_weight:.1e} of their size while the gradient"
    " keeps its direction: the learning rate is far too small.",
    remedy=remedies.larger_lr,
    source="calibrated",
    explained_by=("updates_lost", "eps_dominates", "exp_avg_sq_stalled", "exp_avg_sq_underflow"),
    evidence=("lr",),
)
def learning_rate_too_small(
    update_to_weight: float,
    signal_fraction: float,
    grad_momentum_cosine: float,
    lr: float,
    beta1: float,
    step: float,
    training: Training,
    *,
    threshold: float = 1e-4,
    signal_above_noise: float = 3.0,
    cosine: float = 0.1,
) -> bool:
    """Steps are tiny and all point the same way: the training could go ten times as fast.

    The gradient's mean explains more than `signal_above_noise` times as much of it as in noise.
    """
    noise = (1 - beta1) / (1 + beta1) * (1 - beta1 ** (2 * step)) / (1 - beta1**step) ** 2
    has_direction = signal_fraction > signal_above_noise * noise and grad_momentum_cosine > cosine
    is_at_peak = not lr < 0.5 * training.peak_lr
    return update_to_weight < threshold and has_direction and is_at_peak


@rule(
    severity=Severity.warning,
    sentence="A step moves the weights by {update_to_weight:.1%} of their size, and"
    " {grad_zero_fraction:.0%} of the gradient is 0.",
    remedy=remedies.smaller_lr,
    source="CS231n, Learning, section 'Ratio of weights:updates'; thresholds calibrated",
    explained_by=(
        "decay_dominates",
        "decay_uneven",
        "not_finite",
        "exp_avg_sq_lags",
        "state_mismatch",
    ),
    evidence=("normalized_update_rms",),
)
def learning_rate_too_large(
    update_to_weight: float,
    grad_zero_fraction: float,
    lr: float,
    past: Past,
    *,
    threshold: float = 0.03,
    first_above: float = 0.3,
    alive_below: float = 0.25,
) -> bool:
    """Steps are as large as the weights, so that what was learnt is overwritten.

    Or the first ones were, by more than `first_above`, and have left less than `alive_below` of the
    elements that had a gradient with one: units that do not fire any more. It is not judged while
    the learning rate rises, nor of weights that began at 0.
    """
    if lr > past.last("lr") or past.first("update_to_weight") > 0.9999:
        return False
    alive, were_alive = 1 - grad_zero_fraction, 1 - past.first("grad_zero_fraction")
    are_dead = alive < alive_below * were_alive
    has_killed = past.largest("update_to_weight") > first_above and are_dead
    return update_to_weight > threshold or has_killed


@rule(
    severity=Severity.warning,
    sentence="AMSGrad's maximum holds the steps at 1/{amsgrad_gap:.1f} of their size.",
    remedy=remedies.no_amsgrad,
    source="Reddi et al. 2018, arXiv 1904.09237; threshold calibrated",
    explained_by=("not_finite",),
    evidence=("normalized_update_rms",),
)
def amsgrad_frozen(amsgrad_gap: float, training: Training, *, threshold: float = 2.0) -> bool:
    """One large gradient has set AMSGrad's maximum, which never falls: the steps stay small."""
    return amsgrad_gap > threshold and not training.has_converged


@rule(
    severity=Severity.warning,
    sentence="Weight decay is {decay_to_update:.0%} of the step, and has shrunk the weights.",
    remedy=remedies.weaker_decay,
    source="derived; threshold calibrated",
    explained_by=("not_finite", "updates_lost", "eps_dominates", "exp_avg_sq_stalled"),
)
def decay_dominates(
    decay_to_update: float,
    weight_norm: float,
    update_to_weight: float,
    past: Past,
    training: Training,
    *,
    threshold: float = 0.3,
    shrunk_to: float = 0.9,
) -> bool:
    """Weight decay takes the weights away faster than the gradient makes them.

    Weights that the first step has made, or made anew, are not missed.
    """
    were_made = past.first("update_to_weight") > 0.3
    has_shrunk = weight_norm < shrunk_to * past.first("weight_norm") and not were_made
    return decay_to_update > threshold and has_shrunk and not training.has_converged


@rule(
    severity=Severity.warning,
    sentence="Decay is added to the gradient, {decay_to_grad:.2g} times as large on the whole, and"
    " to some tensors over ten times as much as to others: Adam divides it by √v.",
    remedy=remedies.decoupled_decay,
    source="Loshchilov & Hutter 2019, arXiv 1711.05101, section 2; thresholds calibrated",
    explained_by=("not_finite",),
)
def decay_uneven(
    decay_to_grad: float,
    tensors: Callable[[str], list[float]],
    *,
    threshold: float = 0.1,
    spread: float = 10.0,
) -> bool:
    """Coupled decay (L2) shrinks weights with small gradients, and hardly those with large ones.

    The decay beside the gradient differs between tensors by more than `spread`.
    """
    decays = [each for each in tensors("decay_to_grad") if each > 0]
    return len(decays) > 1 and max(decays) > max(threshold, spread * min(decays))


@rule(
    severity=Severity.error,
    sentence="The step does not fit the moments: its size is {normalized_update_rms:.2f} learning"
    " rates, and was {normalized_update_rms_before:.2f}; part of the optimizer's state was lost.",
    remedy=remedies.restored_state,
    source="derived: thresholds of what is seen after moments or steps are lost",
    persistence=1,
    warmup=Warmup.NONE,
    explained_by=("not_finite",),
    evidence=("step",),
)
def state_mismatch(
    normalized_update_rms: float,
    exp_avg_carryover: float,
    step: float,
    past: Past,
    training: Training,
    *,
    larger: float = 2.5,
    smaller: float = 1 / 3,
) -> bool:
    """After a checkpoint was loaded, the moments are not those of the step: some of it is lost.

    Moments without their past, which point where one gradient does; a step that begins anew beside
    old moments, so that steps are less than `smaller` of what they were; or it stands still.
    """
    is_out_of_step = normalized_update_rms > larger or normalized_update_rms < smaller * past.last(
        "normalized_update_rms"
    )
    is_of_one_gradient = exp_avg_carryover < 0.05
    is_forgetful = step > 3 and is_of_one_gradient and past.last("exp_avg_carryover") > 0.05
    # At the first step of all the first moment is of one gradient.
    is_too_old = step == 1 and not is_of_one_gradient
    is_lost = training.is_resumed and (is_out_of_step or is_forgetful or is_too_old)
    return is_lost or step == past.last("step")


@rule(
    severity=Severity.error,
    sentence="The learning rate is 0 with {steps_left:.0f} steps to go.",
    remedy=remedies.whole_schedule,
    source="arithmetic",
    persistence=2,
    warmup=Warmup.NONE,
    evidence=("lr",),
)
def schedule_exhausted(lr: float, step: float, past: Past, training: Training) -> bool:
    """The schedule is shorter than the training: what is left of it changes nothing."""
    has_steps_left = training.total_steps - step > 0.01 * training.total_steps
    is_over = lr == 0 and past.largest("lr") > 0
    return is_over and math.isfinite(training.total_steps) and has_steps_left


def _is_under_way(lr: float, training: Training) -> bool:
    """Whether the schedule is not at its end, where steps are too small to matter."""
    return not lr < 0.01 * training.peak_lr
