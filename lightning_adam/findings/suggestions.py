"""Suggestions: the overrides that fix a fault, computed from its evidence.

A function returns no suggestion if the override would change nothing or would be extreme. A
suggestion is a lead unless `benchmarks/findings` shows that it fixes planted faults and does not
hurt healthy runs. No statistic determines a learning rate, so that suggestion is a sweep.
"""

import math

from lightning_adam.findings.context import RuleContext
from lightning_adam.findings.finding import Suggestion

LOWEST_EPS = 1e-20
"""With a smaller eps, a gradient that eps does not dominate has a v that float32 cannot hold."""
MIXED = {"float16": "16-mixed", "bfloat16": "bf16-mixed"}
"""By dtype of the parameters: the mixed precision that keeps parameters in float32."""
SMALL_BATCH = 256
"""Samples per step below which β2 should not be lowered (arXiv 2507.07101)."""


def round_to_one_digit(number: float) -> float:
    """Returns a number rounded to one digit.

    Example:
        >>> round_to_one_digit(0.000333)
        0.0003
    """
    return float(f"{number:.0e}")


def sweep_learning_rate(context: RuleContext, *factors: float) -> Suggestion:
    """Returns a sweep over multiples of the optimizer's peak learning rate."""
    peak = float(context.run.defaults.get("lr", math.nan))
    peak = context.run.peak_lr if math.isnan(peak) else peak
    values = ",".join(f"{round_to_one_digit(peak * factor):g}" for factor in factors)
    path = context.run.optimizer_path / "lr"
    name, _, _ = path.unquoted_override(0).rpartition("=")
    hint = "compare validation metrics"
    return Suggestion((f"{name}={values}",), hint, is_lead=True, is_sweep=True)


def try_larger_lr(context: RuleContext) -> list[Suggestion]:
    """Compare learning rates up to 30 times as large."""
    return [sweep_learning_rate(context, 1, 3, 10, 30)]


def try_smaller_lr(context: RuleContext) -> list[Suggestion]:
    """Compare learning rates down to a hundredth of the current one."""
    return [sweep_learning_rate(context, 0.01, 0.03, 0.1, 0.3, 1)]


def change_beta2(context: RuleContext, beta2: float) -> list[Suggestion]:
    """Change β2, unless β1 would exceed √β2."""
    beta1 = context.betas[0]
    if beta1 >= math.sqrt(beta2):
        return []
    return [Suggestion(context.overrides(betas=[beta1, beta2]), is_lead=True)]


def lower_beta2(context: RuleContext) -> list[Suggestion]:
    """Lower β2, so that the second moment averages a tenth of the steps. Large batches only."""
    beta2, samples = context.betas[1], context.run.samples_per_step
    if beta2 <= 0.95 or math.isnan(samples) or samples < SMALL_BATCH:
        return []
    return change_beta2(context, round(1 - min(10 * (1 - beta2), 0.05), 6))


def clip_gradients(context: RuleContext) -> list[Suggestion]:
    """Clip gradients at twice their usual norm, if the trainer does not clip yet."""
    run = context.run
    if run.is_manual_optimization or run.is_clipped:
        return []
    usual = context.history.smoothed("grad_norm")
    if not (math.isfinite(usual) and usual > 0):
        return []
    path = run.trainer_path / "gradient_clip_val"
    return [Suggestion((path.unquoted_override(round_to_one_digit(2 * usual)),), is_lead=True)]


def use_mixed_precision(context: RuleContext) -> list[Suggestion]:
    """Use mixed precision, which keeps parameters and state in float32."""
    precisions = [MIXED[each] for each in sorted(context.run.dtypes & MIXED.keys())]
    path = context.run.trainer_path / "precision"
    hint = "parameters and Adam's state in float32"
    return [Suggestion((path.unquoted_override(each),), hint) for each in precisions[:1]]


def reduce_eps(context: RuleContext) -> list[Suggestion]:
    """Lower eps to a power of ten that is below a twentieth of 99 % of the denominators.

    An eps of a tenth of the denominator still removes a sixth of the energy of the update.
    """
    if "float16" in context.run.dtypes:
        return use_mixed_precision(context)
    low = context.low_denominator()
    if low is not None and low > LOWEST_EPS:
        eps = float(f"1e{math.floor(math.log10(low / 20))}")
        if eps < context.setting("eps"):
            return [Suggestion(context.overrides(eps=eps))]
    return [
        Suggestion(hint="multiply the loss by a constant, such as 1e6", is_lead=True),
        Suggestion(hint="use Adam-atan2, which has no eps (arXiv 2407.05872)", is_lead=True),
    ]


def make_eps_representable(context: RuleContext) -> list[Suggestion]:
    """Use a parameter dtype that can represent eps, or an eps that the dtype can represent."""
    larger = Suggestion(
        context.overrides(eps=1e-4), "small gradients still underflow", is_lead=True
    )
    return [*use_mixed_precision(context), larger]


def prevent_underflow(context: RuleContext) -> list[Suggestion]:
    """Keep the second moment in a dtype that can hold the squared gradients."""
    # An eps that was chosen for half precision is too large in float32.
    eps = context.overrides(eps=1e-8) if context.setting("eps") > 1e-8 else ()
    precise = [
        Suggestion((*each.overrides, *eps), each.hint, is_lead=True)
        for each in use_mixed_precision(context)
    ]
    scaled = Suggestion(hint="multiply the loss by a constant, such as 1e6", is_lead=True)
    return precise or [scaled]


def let_state_decay(context: RuleContext) -> list[Suggestion]:
    """Use a dtype or a β2 with which the second moment can decay."""
    return [*use_mixed_precision(context), *lower_beta2(context)]


def keep_updates(context: RuleContext) -> list[Suggestion]:
    """Keep parameters in float32, or use an optimizer that compensates for rounding."""
    kahan = "use Kahan summation (torch-optimi) or stochastic rounding (torchao)"
    precise = use_mixed_precision(context)
    sweep = [] if precise else try_larger_lr(context)
    return [*precise, *sweep, Suggestion(hint=kahan, is_lead=True)]


def absorb_jump(context: RuleContext) -> list[Suggestion]:
    """Clip gradients, or lower β2 so that the second moment follows the gradient faster."""
    return [*clip_gradients(context), *lower_beta2(context)]


def inspect_batch(context: RuleContext) -> list[Suggestion]:
    """Inspect the data of the step, and clip gradients."""
    hint = "inspect the batches of this step; resume from a checkpoint before it to skip them"
    return [Suggestion(hint=hint, is_lead=True), *clip_gradients(context)]


def decorrelate_steps(context: RuleContext) -> list[Suggestion]:
    """Lower the learning rate or β2, or shuffle the data better."""
    large = context.values.get("update_to_weight", 0.0) > 1e-3
    sweep = [sweep_learning_rate(context, 0.1, 0.3, 1)] if large else []
    shuffled = Suggestion(hint="shuffle the data more thoroughly", is_lead=True)
    return [*sweep, *lower_beta2(context), shuffled]


def disable_amsgrad(context: RuleContext) -> list[Suggestion]:
    """Disable AMSGrad, so that the denominator can decrease."""
    return [Suggestion(context.overrides(amsgrad=False))]


def weaken_decay(context: RuleContext) -> list[Suggestion]:
    """Lower the weight decay to a tenth of the step."""
    factor = 0.1 / context.values["decay_to_update"]
    weight_decay = round_to_one_digit(context.setting("weight_decay") * factor)
    if not weight_decay < context.setting("weight_decay"):
        return []
    return [Suggestion(context.overrides(weight_decay=weight_decay))]


def decouple_decay(context: RuleContext) -> list[Suggestion]:
    """Use AdamW with its default weight decay."""
    path = context.run.optimizer_path / "decoupled_weight_decay"
    overrides = (path.unquoted_override(True), *context.overrides(weight_decay=0.01))
    return [Suggestion(overrides, "AdamW", is_lead=True)]


def add_weight_decay(context: RuleContext) -> list[Suggestion]:
    """Use weight decay, or an explicit schedule."""
    hint = "use AdamW with weight decay on matrices, or let the schedule alone reduce the steps"
    return [Suggestion(hint=hint, is_lead=True)]


def restore_state(context: RuleContext) -> list[Suggestion]:
    """Restore the complete optimizer state."""
    return [Suggestion(hint="resume with ckpt_path, which restores the optimizer's state")]


def locate_nonfinite(context: RuleContext) -> list[Suggestion]:
    """Locate the operation that produced the value, or use a precision with a wider range."""
    path = context.run.trainer_path / "detect_anomaly"
    located = Suggestion(
        (path.unquoted_override(True),),
        "prints the operation; resume from a checkpoint before this step",
        is_lead=True,
    )
    is_float16 = "float16" in context.run.dtypes
    return [*(use_mixed_precision(context) if is_float16 else []), located]


def match_schedule_length(context: RuleContext) -> list[Suggestion]:
    """Make the schedule as long as the run."""
    run = context.run
    if "total_steps" not in (run.schedule or {}):
        return []
    total = int(run.total_steps) if math.isfinite(run.total_steps) else None
    return [Suggestion(((run.scheduler_path / "total_steps").unquoted_override(total),))]


def no_suggestion(context: RuleContext) -> list[Suggestion]:
    """Returns no suggestion."""
    return []
