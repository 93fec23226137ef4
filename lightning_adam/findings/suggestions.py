"""Suggestions: the overrides against a fault, computed from the numbers that prove it.

A suggestion declines, by returning nothing, where it would change nothing or would be extreme. It
is a lead unless the planted faults of `benchmarks/findings` show that it helps, and the healthy
runs that it does not hurt. No learning rate follows from a statistic alone: the suggestion is a
sweep.
"""

import math

from lightning_adam.findings.context import RuleContext
from lightning_adam.findings.finding import Suggestion

LOWEST_EPS = 1e-20
"""Below it, float32 cannot hold the v of a gradient that eps would not dominate."""
MIXED = {"float16": "16-mixed", "bfloat16": "bf16-mixed"}
"""By dtype of the parameters, the precision that keeps them in float32."""
SMALL_BATCH = 256
"""Samples a step below which the second moment needs a long memory (arXiv 2507.07101)."""


def rounded(number: float) -> float:
    """Returns a number rounded to one digit.

    Example:
        >>> rounded(0.000333)
        0.0003
    """
    return float(f"{number:.0e}")


def learning_rate_sweep(context: RuleContext, *factors: float) -> Suggestion:
    """Returns a sweep over multiples of the optimizer's learning rate, at its peak."""
    peak = float(context.run.defaults.get("lr", math.nan))
    peak = context.run.peak_lr if math.isnan(peak) else peak
    values = ",".join(f"{rounded(peak * factor):g}" for factor in factors)
    path = context.run.optimizer_path / "lr"
    name, _, _ = path.unquoted_override(0).rpartition("=")
    hint = "compare validation metrics"
    return Suggestion((f"{name}={values}",), hint, is_lead=True, is_sweep=True)


def larger_lr(context: RuleContext) -> list[Suggestion]:
    """Compare learning rates up to thirty times as large."""
    return [learning_rate_sweep(context, 1, 3, 10, 30)]


def smaller_lr(context: RuleContext) -> list[Suggestion]:
    """Compare learning rates down to a hundredth."""
    return [learning_rate_sweep(context, 0.01, 0.03, 0.1, 0.3, 1)]


def other_beta2(context: RuleContext, beta2: float) -> list[Suggestion]:
    """Another memory of the second moment; nothing if β1 would exceed √β2."""
    beta1 = context.betas[0]
    if beta1 >= math.sqrt(beta2):
        return []
    return [Suggestion(context.overrides(betas=[beta1, beta2]), is_lead=True)]


def lower_beta2(context: RuleContext) -> list[Suggestion]:
    """A second moment with a tenth of the memory, at large batches only."""
    beta2, samples = context.betas[1], context.run.samples_per_step
    if beta2 <= 0.95 or math.isnan(samples) or samples < SMALL_BATCH:
        return []
    return other_beta2(context, round(1 - min(10 * (1 - beta2), 0.05), 6))


def clip(context: RuleContext) -> list[Suggestion]:
    """Clip gradients at twice their usual norm, where the trainer can and does not."""
    run = context.run
    if run.is_manual_optimization or run.is_clipped:
        return []
    usual = context.history.smoothed("grad_norm")
    if not (math.isfinite(usual) and usual > 0):
        return []
    path = run.trainer_path / "gradient_clip_val"
    return [Suggestion((path.unquoted_override(rounded(2 * usual)),), is_lead=True)]


def mixed_precision(context: RuleContext) -> list[Suggestion]:
    """Parameters and state in float32, which mixed precision keeps."""
    precisions = [MIXED[each] for each in sorted(context.run.dtypes & MIXED.keys())]
    path = context.run.trainer_path / "precision"
    hint = "parameters and Adam's state in float32"
    return [Suggestion((path.unquoted_override(each),), hint) for each in precisions[:1]]


def smaller_eps(context: RuleContext) -> list[Suggestion]:
    """The largest power of ten below a twentieth of all but 1 % of the denominators.

    An eps that is a tenth of a denominator still removes a sixth of the energy of its update.
    """
    if "float16" in context.run.dtypes:
        return mixed_precision(context)
    low = context.low_denominator()
    if low is not None and low > LOWEST_EPS:
        eps = float(f"1e{math.floor(math.log10(low / 20))}")
        if eps < context.setting("eps"):
            return [Suggestion(context.overrides(eps=eps))]
    return [
        Suggestion(hint="multiply the loss by a constant, such as 1e6", is_lead=True),
        Suggestion(hint="use Adam-atan2, which has no eps (arXiv 2407.05872)", is_lead=True),
    ]


def representable_eps(context: RuleContext) -> list[Suggestion]:
    """Parameters in a dtype that holds eps, or an eps that their dtype holds."""
    larger = Suggestion(
        context.overrides(eps=1e-4), "small gradients still underflow", is_lead=True
    )
    return [*mixed_precision(context), larger]


def state_that_holds_gradients(context: RuleContext) -> list[Suggestion]:
    """A second moment that holds the squares of the gradients."""
    # An eps that was chosen for half precision is too large beside float32.
    eps = context.overrides(eps=1e-8) if context.setting("eps") > 1e-8 else ()
    precise = [
        Suggestion((*each.overrides, *eps), each.hint, is_lead=True)
        for each in mixed_precision(context)
    ]
    scaled = Suggestion(hint="multiply the loss by a constant, such as 1e6", is_lead=True)
    return precise or [scaled]


def state_that_decays(context: RuleContext) -> list[Suggestion]:
    """A second moment that can decay in its dtype."""
    return [*mixed_precision(context), *lower_beta2(context)]


def kept_updates(context: RuleContext) -> list[Suggestion]:
    """Parameters in float32, or an optimizer that compensates for the rounding."""
    kahan = "use Kahan summation (torch-optimi) or stochastic rounding (torchao)"
    precise = mixed_precision(context)
    sweep = [] if precise else larger_lr(context)
    return [*precise, *sweep, Suggestion(hint=kahan, is_lead=True)]


def absorbed_jump(context: RuleContext) -> list[Suggestion]:
    """Clipping, or a second moment that follows the gradient faster."""
    return [*clip(context), *lower_beta2(context)]


def inspected_batch(context: RuleContext) -> list[Suggestion]:
    """The data of the step, and clipping."""
    hint = "inspect the batches of this step; resume from a checkpoint before it to skip them"
    return [Suggestion(hint=hint, is_lead=True), *clip(context)]


def decorrelated_steps(context: RuleContext) -> list[Suggestion]:
    """Smaller steps, a faster second moment, or another order of the data."""
    large = context.values.get("update_to_weight", 0.0) > 1e-3
    sweep = [learning_rate_sweep(context, 0.1, 0.3, 1)] if large else []
    shuffled = Suggestion(hint="shuffle the data more thoroughly", is_lead=True)
    return [*sweep, *lower_beta2(context), shuffled]


def no_amsgrad(context: RuleContext) -> list[Suggestion]:
    """A second moment that can decrease."""
    return [Suggestion(context.overrides(amsgrad=False))]


def weaker_decay(context: RuleContext) -> list[Suggestion]:
    """A weight decay that is a tenth of the step."""
    factor = 0.1 / context.values["decay_to_update"]
    weight_decay = rounded(context.setting("weight_decay") * factor)
    if not weight_decay < context.setting("weight_decay"):
        return []
    return [Suggestion(context.overrides(weight_decay=weight_decay))]


def decoupled_decay(context: RuleContext) -> list[Suggestion]:
    """AdamW, with its usual strength of weight decay."""
    path = context.run.optimizer_path / "decoupled_weight_decay"
    overrides = (path.unquoted_override(True), *context.overrides(weight_decay=0.01))
    return [Suggestion(overrides, "AdamW", is_lead=True)]


def weight_decay(context: RuleContext) -> list[Suggestion]:
    """Weight decay, or an explicit schedule."""
    hint = "use AdamW with weight decay on matrices, or let the schedule alone reduce the steps"
    return [Suggestion(hint=hint, is_lead=True)]


def restored_state(context: RuleContext) -> list[Suggestion]:
    """The optimizer's state as it was."""
    return [Suggestion(hint="resume with ckpt_path, which restores the optimizer's state")]


def first_nonfinite(context: RuleContext) -> list[Suggestion]:
    """The operation that produced the value, and a precision with a wider range."""
    path = context.run.trainer_path / "detect_anomaly"
    located = Suggestion(
        (path.unquoted_override(True),),
        "names the operation; resume from a checkpoint before this step",
        is_lead=True,
    )
    is_float16 = "float16" in context.run.dtypes
    return [*(mixed_precision(context) if is_float16 else []), located]


def whole_schedule(context: RuleContext) -> list[Suggestion]:
    """A schedule as long as the run."""
    run = context.run
    if "total_steps" not in (run.schedule or {}):
        return []
    total = int(run.total_steps) if math.isfinite(run.total_steps) else None
    return [Suggestion(((run.scheduler_path / "total_steps").unquoted_override(total),))]


def nothing(context: RuleContext) -> list[Suggestion]:
    """None."""
    return []
