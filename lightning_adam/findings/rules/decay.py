"""Rules on weight decay."""

import math

from lightning_adam.config.monitor import Severity
from lightning_adam.findings import suggestions
from lightning_adam.findings.context import GradientTrend, History, TensorValues
from lightning_adam.findings.rule import Warmup, rule


@rule(
    severity=Severity.warning,
    sentence="Weight decay is {decay_to_update:.0%} of the step and has shrunk the weights.",
    when="decay_to_update is above {threshold:g} and weight_norm is below {shrunk_to:g} times its"
    " first value, unless the first step replaced the weights. It is info if the smoothed"
    " grad_norm is below {converged_below:g} of its maximum",
    suggest=suggestions.weaken_decay,
    source="derived; threshold calibrated",
    is_local=True,
    suppressed_by=("not_finite", "updates_lost", "eps_dominates", "exp_avg_sq_stalled"),
    limits={"decay_to_update": "threshold"},
)
def decay_dominates(
    decay_to_update: float,
    weight_norm: float,
    update_to_weight: float,
    gradient: GradientTrend,
    history: History,
    *,
    threshold: float = 0.3,
    shrunk_to: float = 0.9,
    converged_below: float = 0.02,
) -> bool | Severity:
    """Weight decay shrinks the weights faster than the gradient builds them."""
    were_replaced = history.first("update_to_weight") > 0.3
    has_shrunk = weight_norm < shrunk_to * history.first("weight_norm") and not were_replaced
    if decay_to_update <= threshold or not has_shrunk:
        return False
    return Severity.info if gradient.decline < converged_below else True


@rule(
    severity=Severity.warning,
    sentence="Weight decay is added to the gradient ({decay_to_grad:.2g} times the gradient norm)"
    " and divided by √v: some tensors decay over ten times as fast as others.",
    when="decay_to_grad of a tensor is above {threshold:g} and above {spread:g} times that of"
    " another. A tensor does not count if its grad_rms is below {negligible:g} of the largest one",
    suggest=suggestions.decouple_decay,
    source="Loshchilov & Hutter 2019, arXiv 1711.05101, section 2; thresholds calibrated",
    suppressed_by=("not_finite",),
)
def decay_uneven(
    decay_to_grad: float,
    tensors: TensorValues,
    *,
    threshold: float = 0.1,
    spread: float = 10.0,
    negligible: float = 1e-3,
) -> bool:
    """Coupled decay (L2) shrinks weights with small gradients far more than those with large ones.

    Tensors with a negligible gradient do not count, such as a bias before a normalization.
    """
    gradients = tensors("grad_rms")
    largest = max(gradients.values(), default=math.nan)
    decays = [
        each
        for name, each in tensors("decay_to_grad").items()
        if each > 0 and gradients.get(name, 0.0) > negligible * largest
    ]
    return len(decays) > 1 and max(decays) > max(threshold, spread * min(decays))


@rule(
    severity=Severity.info,
    sentence="Some tensors under weight decay rotate more than {spread:g} times as fast as others.",
    when="update_to_weight of a tensor with decay is above {spread:g} times that of another, and"
    " weight_norm is within {steady_within:g} of its moving average; with decoupled decay, only"
    " after {timescales:g}/(lr*weight_decay) steps",
    suggest=suggestions.no_suggestion,
    source="Kosson et al. 2023, arXiv 2305.17212: in equilibrium AdamW rotates each layer by"
    " √(2ηλ(1-β1)/(1+β1)) per step, and Adam with L2 does not; thresholds calibrated",
    warmup=Warmup.DIRECTION,
    suppressed_by=("not_finite", "decay_uneven", "decay_dominates"),
    evidence=("update_to_weight", "update_to_weight_max"),
)
def rotation_uneven(
    weight_norm: float,
    weight_decay: float,
    lr: float,
    step: float,
    history: History,
    tensors: TensorValues,
    *,
    spread: float = 10.0,
    timescales: float = 1.0,
    steady_within: float = 0.01,
) -> bool:
    """The weight norm is steady, but tensors still rotate at very different speeds.

    In equilibrium, decay balances growth, and all decayed tensors rotate at the same speed.
    """
    decoupled, coupled = tensors("decay_to_update"), tensors("decay_to_grad")
    if decoupled and lr * weight_decay * step < timescales:
        return False
    smoothed = history.smoothed("weight_norm")
    if weight_decay == 0 or not abs(weight_norm - smoothed) < steady_within * smoothed:
        return False
    speeds = tensors("update_to_weight")
    found = [speeds[name] for name in (*decoupled, *coupled) if 0 < speeds.get(name, 0.0) < 1]
    return len(found) > 1 and max(found) > spread * min(found)
