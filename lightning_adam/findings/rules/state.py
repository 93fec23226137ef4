"""Rules on the optimizer's state after a resume, and on the end of the schedule."""

import math

from lightning_adam.config.monitor import Severity
from lightning_adam.findings import suggestions
from lightning_adam.findings.context import History, RunFacts
from lightning_adam.findings.rule import Warmup, rule


@rule(
    severity=Severity.error,
    sentence="The step does not fit the moments: the update is {normalized_update_rms:.2f} times"
    " the learning rate, {normalized_update_rms_before:.2f} before. Part of the optimizer's state"
    " was lost.",
    when="normalized_update_rms after a resume is above {larger:g} or below {smaller:.2g} times its"
    " previous value, the first moment consists of a single gradient, or the step is 1 with older"
    " moments. It is also raised whenever the step of the state does not advance",
    suggest=suggestions.restore_state,
    source="derived from the effect of losing moments or steps",
    patience=1,
    warmup=Warmup.NONE,
    waits_for_peak=False,
    suppressed_by=("not_finite",),
    evidence=("step",),
)
def state_mismatch(
    normalized_update_rms: float,
    exp_avg_carryover: float,
    step: float,
    history: History,
    run: RunFacts,
    *,
    larger: float = 2.5,
    smaller: float = 1 / 3,
) -> bool:
    """After a resume, the moments do not fit the step: part of the optimizer's state was lost.

    Without its history, the first moment is that of a single gradient. If only the step count
    restarts, steps have the wrong size.
    """
    is_out_of_step = (
        normalized_update_rms > larger
        or normalized_update_rms < smaller * history.last("normalized_update_rms")
    )
    is_of_one_gradient = exp_avg_carryover < 0.05
    is_exp_avg_lost = step > 3 and is_of_one_gradient and history.last("exp_avg_carryover") > 0.05
    # At the first step of a run, the first moment consists of one gradient.
    is_step_too_small = step == 1 and not is_of_one_gradient
    is_lost = run.is_resumed and (is_out_of_step or is_exp_avg_lost or is_step_too_small)
    return is_lost or step == history.last("step")


@rule(
    severity=Severity.error,
    sentence="The learning rate is 0, but {steps_left:.0f} steps remain.",
    when="lr is 0 after it was positive, and more than 1 % of the steps of the run remain",
    suggest=suggestions.match_schedule_length,
    source="arithmetic",
    patience=2,
    warmup=Warmup.NONE,
    waits_for_peak=False,
    evidence=("lr",),
)
def schedule_exhausted(lr: float, step: float, history: History, run: RunFacts) -> bool:
    """The schedule is shorter than the run: the remaining steps have no effect."""
    has_steps_left = run.total_steps - step > 0.01 * run.total_steps
    is_over = lr == 0 and history.largest("lr") > 0
    return is_over and math.isfinite(run.total_steps) and has_steps_left
