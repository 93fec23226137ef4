"""Rules on gradients and losses that change suddenly."""

import math
from collections.abc import Mapping

from lightning_adam.config.monitor import Severity
from lightning_adam.findings import suggestions
from lightning_adam.findings.context import GradientTrend, History, Spikes, TensorValues
from lightning_adam.findings.rule import Warmup, rule


@rule(
    severity=Severity.warning,
    sentence="The gradient of a tensor is {rms_ratio_max:.1f} times the root of its second moment.",
    when="rms_ratio_max is above {threshold:g}. It is info unless rms_ratio of a tensor is above"
    " {jump:g} (or 0.8/√(1-β2), if that is less) and {times_largest:g} times its earlier maximum,"
    " and the tensor has at least {grad_share:g} of the squared gradient norm; or unless rms_ratio"
    " of the model is above {pooled:g} and {times_largest:g} times its earlier maximum, or stays"
    " above {pooled:g}, while lr does not rise",
    suggest=suggestions.absorb_jump,
    source="Wortsman et al. 2023, arXiv 2304.13013, section 3.4: a value of 2.3 in the patch"
    " embedding precedes spikes of the loss by 1 to 8 steps; other thresholds calibrated",
    patience=1,
    waits_for_peak=False,
    suppressed_by=("not_finite", "exp_avg_sq_underflow", "state_mismatch"),
    evidence=("rms_ratio", "grad_norm", "normalized_update_max"),
    limits={"rms_ratio_max": "threshold", "rms_ratio": "pooled"},
)
def exp_avg_sq_lags(
    rms_ratio_max: float,
    rms_ratio: float,
    beta2: float,
    lr: float,
    history: History,
    spikes: Spikes,
    tensors: TensorValues,
    *,
    threshold: float = 2.3,
    pooled: float = 3.0,
    jump: float = 5.0,
    times_largest: float = 2.0,
    grad_share: float = 0.01,
) -> bool | Severity:
    """The gradient of a tensor grows faster than its second moment, so that steps are too large.

    This lasts one or two steps, and a loss spike often follows. To detect it, measure every step.
    Small tensors and rows that rarely have a gradient exceed the threshold in healthy runs.
    """
    if rms_ratio_max <= threshold:
        return False
    is_new = rms_ratio > max(pooled, times_largest * history.largest("rms_ratio"))
    is_lasting = history.smoothed("rms_ratio") > pooled
    if (is_new or is_lasting) and not lr > history.last("lr"):
        return True
    least = min(jump, 0.8 / math.sqrt(1 - beta2))
    jumped = {
        name: ratio
        for name, ratio in tensors("rms_ratio").items()
        if ratio > least and spikes.rms_ratio_times_largest.get(name, 0.0) > times_largest
    }
    return bool(_select_by_share(jumped, tensors, grad_share)) or Severity.info


@rule(
    severity=Severity.warning,
    sentence="The gradient norm of a tensor is more than {deviations:.0f} standard deviations above"
    " its moving average.",
    when="the gradient norm of a tensor is more than {deviations:g} standard deviations above its"
    " moving average. It is info unless the norm is also above {times_largest:g} times its earlier"
    " maximum, and the tensor has at least {grad_share:g} of the squared gradient norm",
    suggest=suggestions.absorb_jump,
    source="z-score on a moving average: Kumar et al. 2025, ZClip, arXiv 2504.02507; by tensor:"
    " Wang et al. 2025, AdaGC, arXiv 2502.11034; thresholds calibrated",
    patience=1,
    waits_for_peak=False,
    suppressed_by=("not_finite", "exp_avg_sq_lags", "state_mismatch"),
)
def grad_spike(
    grad_norm: float,
    spikes: Spikes,
    tensors: TensorValues,
    *,
    deviations: float = 6.0,
    times_largest: float = 5.0,
    grad_share: float = 0.1,
) -> bool | Severity:
    """The gradient norm of a tensor is far above its moving average.

    Gradients have heavy tails, so this alone is info.
    """
    jumped = {name: score for name, score in spikes.tensor_scores.items() if score > deviations}
    if not jumped:
        return False
    new = {
        name: score
        for name, score in jumped.items()
        if spikes.tensor_times_largest.get(name, 0.0) > times_largest
    }
    return bool(_select_by_share(new, tensors, grad_share)) or Severity.info


@rule(
    severity=Severity.warning,
    sentence="The loss or the gradient norm is more than {deviations:.0f} standard deviations above"
    " the mean of the last 128 measurements.",
    when="the loss or grad_norm is more than {deviations:g} standard deviations above its mean. It"
    " is info unless the loss stays there for {lasting:g} measurements",
    suggest=suggestions.inspect_batch,
    source="SkipStepOptimizer of allenai/OLMo-core: 6 standard deviations over 128 steps",
    patience=1,
    warmup=Warmup.NONE,
    waits_for_peak=False,
    suppressed_by=("not_finite", "state_mismatch"),
)
def loss_spike(
    grad_norm: float, spikes: Spikes, *, deviations: float = 6.0, lasting: float = 3
) -> bool | Severity:
    """The loss or the gradient norm is far above that of earlier measurements.

    A single spike, such as one bad batch, is info.
    """
    if spikes.loss > deviations and spikes.loss_streak >= lasting:
        return True
    is_spike = max(spikes.loss, spikes.grad_norm, key=_nan_to_minus_inf) > deviations
    return Severity.info if is_spike else False


@rule(
    severity=Severity.info,
    sentence="The second moment decays as fast as β2 allows: the gradient is only {rms_ratio:.0%}"
    " of its root.",
    when="rms_ratio is below 1, exp_avg_sq_mean is below {shrunk_to:g} of its maximum, and it"
    " decays faster than {decay_share:g} of the rate of β2",
    suggest=suggestions.lower_beta2,
    source="Bai et al. 2025, arXiv 2506.04805: v then decays as β2^t until the preconditioned"
    " curvature along the gradient exceeds 2/η, and the loss spikes; thresholds calibrated",
    warmup=Warmup.SECOND_MOMENT,
    suppressed_by=("exp_avg_sq_stalled", "eps_dominates", "exp_avg_sq_underflow"),
    evidence=("exp_avg_sq_mean",),
)
def exp_avg_sq_collapse(
    exp_avg_sq_mean: float,
    rms_ratio: float,
    beta2: float,
    step: float,
    history: History,
    *,
    decay_share: float = 0.9,
    shrunk_to: float = 0.5,
) -> bool:
    """The gradient has almost vanished, and the second moment decays as fast as β2 allows.

    Steps are small at first, but become too large for the curvature as the second moment shrinks.
    Converging runs show this too.
    """
    before, steps = history.last("exp_avg_sq_mean"), step - history.last("step")
    if not (0 < exp_avg_sq_mean < shrunk_to * history.largest("exp_avg_sq_mean") and before > 0):
        return False
    at_rate_of_beta2 = decay_share * steps * math.log(beta2)
    return rms_ratio < 1 and math.log(exp_avg_sq_mean / before) < at_rate_of_beta2


@rule(
    severity=Severity.warning,
    sentence="AMSGrad's maximum shrinks the steps to 1/{amsgrad_gap:.1f} of their size.",
    when="amsgrad_gap, times the smoothed grad_norm relative to its maximum, is above"
    " {threshold:g}",
    suggest=suggestions.disable_amsgrad,
    source="Reddi et al. 2018, arXiv 1904.09237; threshold calibrated",
    is_local=True,
    suppressed_by=("not_finite",),
    evidence=("normalized_update_rms",),
)
def amsgrad_frozen(amsgrad_gap: float, gradient: GradientTrend, *, threshold: float = 2.0) -> bool:
    """One large gradient has set AMSGrad's maximum, which never decreases: steps stay small.

    A gap that is explained by a declining gradient does not count.
    """
    return amsgrad_gap * gradient.decline > threshold


def _select_by_share(found: Mapping[str, float], tensors: TensorValues, share: float) -> list[str]:
    """Returns the tensors with at least a share of the squared gradient norm."""
    if not found:
        return []
    squares = {name: norm**2 for name, norm in tensors("grad_norm").items()}
    total = math.fsum(squares.values())
    return [name for name in found if not squares.get(name, 0.0) < share * total]


def _nan_to_minus_inf(value: float) -> float:
    return -math.inf if math.isnan(value) else value
