"""Rules on the size and the direction of the steps."""

import math

from lightning_adam.config.monitor import Severity
from lightning_adam.findings import suggestions
from lightning_adam.findings.context import History, RunFacts
from lightning_adam.findings.rule import Warmup, rule


@rule(
    severity=Severity.warning,
    sentence="Successive steps are correlated: their rms is {normalized_update_rms:.2f} times the"
    " learning rate, and {normalized_update_large_fraction:.0%} of the elements take almost the"
    " largest step.",
    when="normalized_update_rms is above {threshold:g} and above 1.5 times its value for noise, or"
    " normalized_update_large_fraction is above {large_fraction:g} and above twice its value for"
    " noise. It is info if update_to_weight is below {large_step:g}",
    suggest=suggestions.decorrelate_steps,
    source="Molybog et al. 2023, arXiv 2304.09871; threshold calibrated",
    warmup=Warmup.DIRECTION,
    suppressed_by=(
        "not_finite",
        "exp_avg_sq_lags",
        "exp_avg_sq_underflow",
        "updates_lost",
        "state_mismatch",
    ),
    evidence=("grad_momentum_cosine",),
    limits={
        "normalized_update_rms": "threshold",
        "normalized_update_large_fraction": "large_fraction",
    },
)
def correlated_updates(
    normalized_update_rms: float,
    normalized_update_large_fraction: float,
    update_to_weight: float,
    update_norm: float,
    beta1: float,
    run: RunFacts,
    *,
    threshold: float = 0.6,
    large_fraction: float = 0.2,
    large_step: float = 5e-3,
) -> bool | Severity:
    """Gradients of successive steps are correlated, so that many elements take full-size steps.

    Large models can diverge from this. Noise gives √((1-β1)/(1+β1)), 0.23 at β1 = 0.9. For β1 below
    about 0.4, correlation cannot be distinguished from noise, and the rule does not apply. Steps
    that are small relative to the weights, or those of a GAN, are often correlated: that is info.
    """
    noise = math.sqrt((1 - beta1) / (1 + beta1))
    if 1.5 * noise >= 1:
        # Even a constant gradient gives only 1.
        return False
    is_long = normalized_update_rms > max(threshold, 1.5 * noise)
    are_many = normalized_update_large_fraction > max(
        large_fraction, 2 * math.erfc(0.8 / noise / 2**0.5)
    )
    if not (is_long or are_many):
        return False
    step = _relative(update_to_weight, update_norm, run)
    return True if step >= large_step else Severity.info


@rule(
    severity=Severity.info,
    sentence="A step changes the weights by {update_to_weight:.1e} of their norm, and the gradient"
    " keeps its direction. A larger learning rate may train faster.",
    when="update_to_weight is below {threshold:g}, signal_fraction is above {signal_above_noise:g}"
    " times its value for noise, grad_momentum_cosine is above {cosine:g}, and lr is at least half"
    " of its peak",
    suggest=suggestions.try_larger_lr,
    source="calibrated",
    suppressed_by=("updates_lost", "eps_dominates", "exp_avg_sq_stalled", "exp_avg_sq_underflow"),
    evidence=("lr",),
    limits={"update_to_weight": "threshold"},
)
def learning_rate_too_small(
    update_to_weight: float,
    signal_fraction: float,
    grad_momentum_cosine: float,
    lr: float,
    beta1: float,
    step: float,
    run: RunFacts,
    *,
    threshold: float = 1e-4,
    signal_above_noise: float = 3.0,
    cosine: float = 0.1,
) -> bool:
    """Steps are tiny and point in the same direction.

    Correct fine-tuning looks the same, so this is never more than info.
    """
    noise = (1 - beta1) / (1 + beta1) * (1 - beta1 ** (2 * step)) / (1 - beta1**step) ** 2
    has_direction = signal_fraction > signal_above_noise * noise and grad_momentum_cosine > cosine
    is_at_peak = not lr < 0.5 * run.peak_lr
    return update_to_weight < threshold and has_direction and is_at_peak


@rule(
    severity=Severity.warning,
    sentence="A step changes the weights by {update_to_weight:.1%} of their norm, and"
    " {grad_zero_fraction:.0%} of the gradient is 0.",
    when="update_to_weight is above {threshold:g}; or it was above {first_above:g}, and the"
    " fraction of elements with a gradient is now below {alive_below:g} of the first one. Weights"
    " smaller than a standard initialisation (variance 1/fan_in) count as having that norm",
    suggest=suggestions.try_smaller_lr,
    source="CS231n, Learning, section 'Ratio of weights:updates'; thresholds calibrated",
    suppressed_by=(
        "decay_dominates",
        "decay_uneven",
        "not_finite",
        "exp_avg_sq_lags",
        "state_mismatch",
    ),
    evidence=("normalized_update_rms",),
    limits={"update_to_weight": "threshold"},
)
def learning_rate_too_large(
    update_to_weight: float,
    update_norm: float,
    grad_zero_fraction: float,
    history: History,
    run: RunFacts,
    *,
    threshold: float = 0.03,
    first_above: float = 0.3,
    alive_below: float = 0.25,
) -> bool:
    """Steps are large relative to the weights, so that each step overwrites what was learned.

    Also raised if the first steps were, and most units have had no gradient since.
    """
    if history.first("update_to_weight") > 0.9999:
        # The weights are initialized to 0.
        return False
    nonzero, first_nonzero = 1 - grad_zero_fraction, 1 - history.first("grad_zero_fraction")
    now = _relative(update_to_weight, update_norm, run)
    largest = _relative(history.largest("update_to_weight"), history.largest("update_norm"), run)
    return now > threshold or (largest > first_above and nonzero < alive_below * first_nonzero)


@rule(
    severity=Severity.info,
    sentence="Without weight decay, the weight norm has grown to more than {threshold:g} times its"
    " first value: relative steps shrink accordingly.",
    when="weight_norm is above {threshold:g} times its first value and weight_decay is 0",
    suggest=suggestions.add_weight_decay,
    source="Kosson et al. 2023, arXiv 2305.17212; threshold calibrated",
    warmup=Warmup.DIRECTION,
    evidence=("update_to_weight",),
)
def weights_grow(
    weight_norm: float, weight_decay: float, history: History, *, threshold: float = 3.0
) -> bool:
    """Weights grow without decay, which reduces the relative step size like a hidden schedule.

    This matters in layers that are followed by a normalization, which makes their norm irrelevant.
    Weights that are initialized near 0 grow in healthy runs.
    """
    return weight_decay == 0 and weight_norm > threshold * history.first("weight_norm")


def _relative(update_to_weight: float, update_norm: float, run: RunFacts) -> float:
    """Returns the step relative to the weights, or to a standard initialization if that is larger.

    Embeddings are often initialized far below it.
    """
    if not run.initial_norm:
        return update_to_weight
    return min(update_to_weight, update_norm / run.initial_norm)
