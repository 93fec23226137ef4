"""Preflight notices: what the settings of a run show before its first step.

A notice never suppresses a finding and never stops a run.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_adam.config.monitor import Severity
from lightning_adam.findings import suggestions
from lightning_adam.findings.context import GroupFacts, RuleContext, RunFacts
from lightning_adam.findings.finding import Finding, Suggestion
from lightning_adam.findings.rule import check_name, summary_of


class PreflightNotice(NamedTuple):
    """Where a notice applies, and the numbers of its sentence."""

    values: Mapping[str, Any]
    group: str = ""
    """The parameter group; empty for the model."""


Check = Callable[..., Iterator[PreflightNotice]]


@dataclass(frozen=True)
class Notice:
    """One check of the settings."""

    code: str
    severity: Severity
    meaning: str
    sentence: str
    """What is reported, with the values of the notice in braces."""
    source: str
    suggest: Callable[[RuleContext], list[Suggestion]]
    condition: Check

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of `adam_monitor.findings.<code>`, at their defaults."""
        return {"severity": self.severity.value}


NOTICES: dict[str, Notice] = {}
"""The notices, by code, in the order in which they are shown."""


def notice(
    *,
    severity: Severity,
    sentence: str,
    source: str,
    suggest: Callable[[RuleContext], list[Suggestion]] = suggestions.nothing,
) -> Callable[[Check], Check]:
    """Makes a generator of `PreflightNotice` a check: its name is the code.

    It takes the `RunFacts`.

    Args:
        severity: `info` (stored, not printed), `warning` or `error`.
        sentence: What is reported.
        source: The paper it comes from, or `arithmetic`.
        suggest: Returns suggestions (default: none).
    """

    def register(check: Check) -> Check:
        code = check.__name__
        check_name(code, check, NOTICES)
        meaning = summary_of(check)
        NOTICES[code] = Notice(code, severity, meaning, sentence, source, suggest, check)
        return check

    return register


def preflight(
    run: RunFacts, settings: Mapping[str, Mapping[str, Any]] | None = None, optimizer: str = ""
) -> list[Finding]:
    """Returns the notices of a run, as findings at step 0.

    Args:
        run: Facts of the run.
        settings: The `severity` of notices, by code (default: none).
        optimizer: The optimizer's name, if there are several (default: empty).

    Example:
        >>> settings = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        >>> group = GroupFacts("group_0", settings, eps_by_dtype={"float16": 0.0})
        >>> run = RunFacts(settings, [group], dtypes=frozenset({"float16"}))
        >>> [(each.code, each.remedy) for each in preflight(run) if each.is_above_info]
        [('eps_vanishes', ('trainer.precision=16-mixed',))]
    """
    found = []
    for code, each in NOTICES.items():
        severity = Severity((settings or {}).get(code, {}).get("severity", each.severity))
        if severity is Severity.off:
            continue
        for values, group in each.condition(run):
            groups = [group] if group else []
            numbers = {key: value for key, value in values.items() if isinstance(value, float)}
            found.append(
                Finding(
                    code=code,
                    severity=severity,
                    scope=f"group/{group}" if group else "model",
                    step=0,
                    sentence=each.sentence.format_map(dict(values)),
                    evidence=numbers,
                    worst={},
                    suggestions=tuple(each.suggest(RuleContext(numbers, run, groups=groups))),
                    source=each.source,
                    optimizer=optimizer,
                )
            )
    return found


def _long_warmup(context: RuleContext) -> list[Suggestion]:
    """A warm-up of 2/(1-β2) steps, or of a tenth of a short run, where the schedule has one."""
    run = context.run
    if "warmup_steps" not in (run.schedule or {}):
        return []
    steps = math.ceil(min(2 / (1 - context.betas[1]), run.total_steps / 10))
    path = run.scheduler_path / "warmup_steps"
    return [Suggestion((path.unquoted_override(steps),), is_lead=True)]


def _each_step(context: RuleContext) -> list[Suggestion]:
    """A measurement at each step."""
    path = context.run.monitor_path / "every_n_steps"
    return [Suggestion((path.unquoted_override(1),))]


def _grouped_or_frozen(context: RuleContext) -> list[Suggestion]:
    """All parameters in a group, or without a gradient."""
    hint = "pass them to the optimizer, or freeze them with requires_grad_(False)"
    return [Suggestion(hint=hint)]


def _long_memory(context: RuleContext) -> list[Suggestion]:
    """A β2 whose half-life is a few hundred samples."""
    beta2 = round(0.5 ** (context.run.samples_per_step / HALF_LIFE_SAMPLES), 4)
    return suggestions.other_beta2(context, min(beta2, 0.9999))


HALF_LIFE_SAMPLES = 1000.0
"""Samples below which the half-life of the second moment is short for a small batch."""
SMALL_BATCH = 16
"""Samples a step that make a batch small."""


@notice(
    severity=Severity.error,
    sentence="eps={eps:g} is 0 in {dtype}, the dtype of parameters and state.",
    suggest=suggestions.representable_eps,
    source="pytorch/pytorch issue 147437",
)
def eps_vanishes(run: RunFacts) -> Iterator[PreflightNotice]:
    """Adam's state has the parameters' dtype, in which eps rounds to 0: 0/0 is NaN.

    A fused step shows no NaN: its second moment is 0 and its steps are huge.
    """
    for group in run.groups:
        for dtype, eps in group.eps_by_dtype.items():
            if eps == 0:
                yield PreflightNotice({"eps": group.settings["eps"], "dtype": dtype}, group.name)


@notice(
    severity=Severity.warning,
    sentence="{count} parameters require a gradient and are in no group, such as {first}: they"
    " never train.",
    suggest=_grouped_or_frozen,
    source="arithmetic",
)
def parameters_left_out(run: RunFacts) -> Iterator[PreflightNotice]:
    """The model has parameters that no optimizer was given."""
    if run.left_out:
        yield PreflightNotice({"count": len(run.left_out), "first": run.left_out[0]})


@notice(
    severity=Severity.warning,
    sentence="The schedule takes {planned:,} steps, the run {steps:,.0f}: {outcome}.",
    suggest=suggestions.whole_schedule,
    source="arithmetic",
)
def schedule_length(run: RunFacts) -> Iterator[PreflightNotice]:
    """The schedule is shorter or longer than the run, by more than 1 %."""
    planned, steps = (run.schedule or {}).get("total_steps"), run.total_steps
    if planned is None or not math.isfinite(steps) or abs(planned - steps) <= 0.01 * steps:
        return
    outcome = "the rest trains at its lowest rate" if planned < steps else "it does not end"
    yield PreflightNotice({"planned": planned, "steps": steps, "outcome": outcome})


@notice(
    severity=Severity.info,
    sentence="The learning rate warms up for {warmup:.0f} steps; the second moment remembers"
    " {memory:.0f}.",
    suggest=_long_warmup,
    source="Ma & Yarats 2021, arXiv 1910.04209: linear warm-up over 2/(1-β2) steps",
)
def warmup_short(run: RunFacts) -> Iterator[PreflightNotice]:
    """The warm-up ends long before the second moment is an average of many gradients.

    That is, before a tenth of 2/(1-β2) steps, or a tenth of a shorter run.
    """
    if not run.groups:
        return
    memory = 2 / (1 - max(_beta(each, 1) for each in run.groups))
    if run.warmup_steps < 0.1 * min(memory, run.total_steps):
        yield PreflightNotice({"warmup": run.warmup_steps, "memory": memory})


@notice(
    severity=Severity.info,
    sentence="Weight decay of {weight_decay:g} at a learning rate of {lr:g} shrinks a weight to 1/e"
    " in {timescale:,.0f} steps; {beside}.",
    source="Wang & Aitchison 2024, arXiv 2405.13698, on the timescale 1/(ηλ)",
)
def decay_timescale(run: RunFacts) -> Iterator[PreflightNotice]:
    """Decoupled decay averages weights over 1/(ηλ) steps: longer than the run, and it does nothing.

    Shorter than a tenth of an epoch, and the weights forget most of the data. Decay that does
    nothing does no harm, so that no stronger decay is suggested.
    """
    for group in run.groups:
        rate = float(group.settings["lr"]) * float(group.settings["weight_decay"])
        if not (group.settings.get("decoupled_weight_decay") and rate > 0):
            continue
        values = {name: float(group.settings[name]) for name in ("lr", "weight_decay")}
        beside = ""
        if 1 / rate > run.total_steps:
            beside = f"the run takes {run.total_steps:,.0f}"
        elif 1 / rate < 0.1 * run.steps_per_epoch:
            beside = f"an epoch takes {run.steps_per_epoch:,.0f}"
        if beside:
            values["timescale"] = 1 / rate
            yield PreflightNotice({**values, "beside": beside}, group.name)


@notice(
    severity=Severity.info,
    sentence="With β2={beta2:g} the second moment cannot decay in {dtype}, the dtype of the state:"
    " steps stay small when gradients shrink.",
    suggest=suggestions.state_that_decays,
    source="derived: (1-β2)v is at most half a unit in the last place of v",
)
def exp_avg_sq_cannot_decay(run: RunFacts) -> Iterator[PreflightNotice]:
    """β2·v rounds to v in the dtype of the state, as in bfloat16 with β2 = 0.999."""
    for group in run.groups:
        beta2 = _beta(group, 1)
        for dtype, resolution in group.resolution_by_dtype.items():
            # Half an ulp of v is a quarter to a half of this, as v lies in its octave.
            if 1 - beta2 < resolution / 4:
                yield PreflightNotice({"beta2": beta2, "dtype": dtype}, group.name)


@notice(
    severity=Severity.info,
    sentence="β1={beta1:g} is above √β2={root:.3g}: Adam may not converge.",
    source="Zhang et al. 2022, arXiv 2208.09632: convergence needs β1 < √β2, and a large β2",
)
def beta1_above_root_beta2(run: RunFacts) -> Iterator[PreflightNotice]:
    """With β1 above √β2, the first moment remembers gradients that the second has forgotten."""
    for group in run.groups:
        beta1, beta2 = _beta(group, 0), _beta(group, 1)
        if beta1 > math.sqrt(beta2):
            yield PreflightNotice({"beta1": beta1, "root": math.sqrt(beta2)}, group.name)


@notice(
    severity=Severity.info,
    sentence="At {samples:.0f} samples a step, β2={beta2:g} remembers {half_life:,.0f} samples"
    " (half-life).",
    suggest=_long_memory,
    source="Marek et al. 2025, arXiv 2507.07101: keep the half-life of β2 in samples when the batch"
    " shrinks, 0.9999 at batch size 1; the limits of 16 samples a step and of 1,000 are ours",
)
def beta2_short_memory(run: RunFacts) -> Iterator[PreflightNotice]:
    """At 16 samples a step or fewer, β2 has a half-life below 1,000 samples: v is not steady."""
    samples = run.samples_per_step
    for group in run.groups:
        beta2 = _beta(group, 1)
        half_life = samples * math.log(0.5) / math.log(beta2) if 0 < beta2 < 1 else 0.0
        if samples <= SMALL_BATCH and half_life < HALF_LIFE_SAMPLES:
            values = {"samples": samples, "beta2": beta2, "half_life": half_life}
            yield PreflightNotice(values, group.name)


@notice(
    severity=Severity.info,
    sentence="The last step of each epoch accumulates {left:.0f} of {window} batches, and divides"
    " their gradients by {window} all the same: Adam takes a full step with {share:.0%} of the"
    " gradient.",
    source="Lightning-AI/pytorch-lightning issue 19987",
)
def partial_accumulation(run: RunFacts) -> Iterator[PreflightNotice]:
    """The batches of an epoch are not a multiple of accumulate_grad_batches.

    Lightning steps at the end of an epoch whatever is accumulated, and divides the loss by the
    whole window.
    """
    window, batches = run.accumulate_grad_batches, run.batches_per_epoch
    if window > 1 and math.isfinite(batches) and batches % window:
        left = batches % window
        yield PreflightNotice({"left": left, "window": window, "share": left / window})


@notice(
    severity=Severity.info,
    sentence="Every {every} steps are measured: a gradient that jumps for a step or two is not seen"
    " in between.",
    suggest=_each_step,
    source="Wortsman et al. 2023, arXiv 2304.13013: a jump lasts one or two steps",
)
def measured_rarely(run: RunFacts) -> Iterator[PreflightNotice]:
    """`exp_avg_sq_lags`, `grad_spike` and `loss_spike` see the measured steps alone."""
    if run.every_n_steps > 1:
        yield PreflightNotice({"every": run.every_n_steps})


def _beta(group: GroupFacts, index: int) -> float:
    return float(group.settings["betas"][index])
