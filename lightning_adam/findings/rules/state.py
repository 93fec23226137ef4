"""Rules on the optimizer's state after a resume, and on the end of the schedule."""

import math

from lightning_adam.config.monitor import Severity
from lightning_adam.findings import suggestions
from lightning_adam.findings.context import History, RunFacts
from lightning_adam.findings.rule import Warmup, rule


@rule(
    severity=Severity.error,
    sentence="The step does not fit the moments: its size is {normalized_update_rms:.2f} learning"
    " rates, and was {normalized_update_rms_before:.2f}; part of the optimizer's state was lost.",
    when="normalized_update_rms after a resume is above {larger:g} or below {smaller:.2g} times its"
    " previous value, the first moment then holds a single gradient, or the step is 1 beside older"
    " moments. It is also raised whenever the step of the state does not advance",
    suggest=suggestions.restored_state,
    source="derived: thresholds of what is seen after moments or steps are lost",
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
    """After a resume, the moments do not belong to the step: part of the state was lost.

    Moments without their history point where one gradient does. A step that restarts beside old
    moments makes steps too small.
    """
    is_out_of_step = (
        normalized_update_rms > larger
        or normalized_update_rms < smaller * history.last("normalized_update_rms")
    )
    is_of_one_gradient = exp_avg_carryover < 0.05
    is_forgetful = step > 3 and is_of_one_gradient and history.last("exp_avg_carryover") > 0.05
    # At the first step of all the first moment is of one gradient.
    is_too_old = step == 1 and not is_of_one_gradient
    is_lost = run.is_resumed and (is_out_of_step or is_forgetful or is_too_old)
    return is_lost or step == history.last("step")


@rule(
    severity=Severity.error,
    sentence="The learning rate is 0 with {steps_left:.0f} steps to go.",
    when="lr is 0 after it was positive, and more than 1 % of the steps of the run remain",
    suggest=suggestions.whole_schedule,
    source="arithmetic",
    patience=2,
    warmup=Warmup.NONE,
    waits_for_peak=False,
    evidence=("lr",),
)
def schedule_exhausted(lr: float, step: float, history: History, run: RunFacts) -> bool:
    """The schedule is shorter than the run: what is left of it changes nothing."""
    has_steps_left = run.total_steps - step > 0.01 * run.total_steps
    is_over = lr == 0 and history.largest("lr") > 0
    return is_over and math.isfinite(run.total_steps) and has_steps_left
