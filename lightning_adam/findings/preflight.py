"""Preflight notices: checks of the settings before the first step.

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
    """The parameter group that a notice is about, and the values of its sentence."""

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
    """The message, with the names of the notice's values in braces."""
    source: str
    suggest: Callable[[RuleContext], list[Suggestion]]
    condition: Check

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of `adam_monitor.findings.<code>`, at their defaults."""
        return {"severity": self.severity.value}


NOTICES: dict[str, Notice] = {}
"""The notices by code, in display order."""


def notice(
    *,
    severity: Severity,
    sentence: str,
    source: str,
    suggest: Callable[[RuleContext], list[Suggestion]] = suggestions.no_suggestion,
) -> Callable[[Check], Check]:
    """Registers a function as a preflight check; the function's name is the code.

    The function takes the `RunFacts` and yields a `PreflightNotice` for each problem.

    Args:
        severity: `info` (stored, not printed), `warning` or `error`.
        sentence: The message, with the names of the notice's values in braces.
        source: The paper that the check is based on, or `arithmetic`.
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


def _lengthen_warmup(context: RuleContext) -> list[Suggestion]:
    """Warm up for 2/(1-β2) steps, but at most a tenth of the run."""
    run = context.run
    if "warmup_steps" not in (run.schedule or {}):
        return []
    steps = math.ceil(min(2 / (1 - context.betas[1]), run.total_steps / 10))
    path = run.scheduler_path / "warmup_steps"
    return [Suggestion((path.unquoted_override(steps),), is_lead=True)]


def _measure_every_step(context: RuleContext) -> list[Suggestion]:
    """Measure every step."""
    path = context.run.monitor_path / "every_n_steps"
    return [Suggestion((path.unquoted_override(1),))]


def _add_or_freeze(context: RuleContext) -> list[Suggestion]:
    """Add the parameters to a group, or freeze them."""
    hint = "pass them to the optimizer, or freeze them with requires_grad_(False)"
    return [Suggestion(hint=hint)]


def _raise_beta2(context: RuleContext) -> list[Suggestion]:
    """Raise β2 to a half-life of 1,000 samples."""
    beta2 = round(0.5 ** (context.run.samples_per_step / HALF_LIFE_SAMPLES), 4)
    return suggestions.change_beta2(context, min(beta2, 0.9999))


HALF_LIFE_SAMPLES = 1000.0
"""Half-life of β2, in samples, below which it is too short for small batches."""
SMALL_BATCH = 16
"""Largest number of samples per step that counts as a small batch."""


@notice(
    severity=Severity.error,
    sentence="eps={eps:g} rounds to 0 in {dtype}, the dtype of the parameters and the state.",
    suggest=suggestions.make_eps_representable,
    source="pytorch/pytorch issue 147437",
)
def eps_vanishes(run: RunFacts) -> Iterator[PreflightNotice]:
    """Adam's state has the dtype of the parameters, in which eps rounds to 0: 0/0 is NaN.

    The fused implementation produces no NaN, but huge steps where the second moment is 0.
    """
    for group in run.groups:
        for dtype, eps in group.eps_by_dtype.items():
            if eps == 0:
                yield PreflightNotice({"eps": group.settings["eps"], "dtype": dtype}, group.name)


@notice(
    severity=Severity.warning,
    sentence="Parameters that require a gradient but are in no parameter group are never trained:"
    " {names}.",
    suggest=_add_or_freeze,
    source="arithmetic",
)
def parameters_left_out(run: RunFacts) -> Iterator[PreflightNotice]:
    """The model has trainable parameters that are in no optimizer."""
    first, *others = run.ungrouped_parameters or [""]
    if first:
        names = f"{first} and {len(others)} more" if others else first
        yield PreflightNotice({"names": names})


@notice(
    severity=Severity.warning,
    sentence="The schedule takes {planned:,} steps, the run {steps:,.0f}: {outcome}.",
    suggest=suggestions.match_schedule_length,
    source="arithmetic",
)
def schedule_length(run: RunFacts) -> Iterator[PreflightNotice]:
    """The schedule is shorter or longer than the run, by more than 1 %."""
    planned, steps = (run.schedule or {}).get("total_steps"), run.total_steps
    if planned is None or not math.isfinite(steps) or abs(planned - steps) <= 0.01 * steps:
        return
    outcome = (
        "the remaining steps use the final learning rate"
        if planned < steps
        else "the run stops before the schedule ends"
    )
    yield PreflightNotice({"planned": planned, "steps": steps, "outcome": outcome})


@notice(
    severity=Severity.info,
    sentence="The learning rate warms up for {warmup:.0f} steps, but the second moment averages"
    " about {memory:.0f} steps.",
    suggest=_lengthen_warmup,
    source="Ma & Yarats 2021, arXiv 1910.04209: linear warm-up over 2/(1-β2) steps",
)
def warmup_short(run: RunFacts) -> Iterator[PreflightNotice]:
    """The warm-up ends before the second moment averages enough gradients.

    It is shorter than a tenth of 2/(1-β2) steps, and than a tenth of the run.
    """
    if not run.groups:
        return
    memory = 2 / (1 - max(_beta(each, 1) for each in run.groups))
    if run.warmup_steps < 0.1 * min(memory, run.total_steps):
        yield PreflightNotice({"warmup": run.warmup_steps, "memory": memory})


@notice(
    severity=Severity.info,
    sentence="Weight decay {weight_decay:g} at learning rate {lr:g} shrinks a weight to 1/e in"
    " {timescale:,.0f} steps; {comparison}.",
    source="Wang & Aitchison 2024, arXiv 2405.13698, on the timescale 1/(ηλ)",
)
def decay_timescale(run: RunFacts) -> Iterator[PreflightNotice]:
    """The timescale of decoupled decay, 1/(ηλ) steps, is too long or too short.

    Longer than the run, decay has no effect; that is harmless, so no stronger decay is suggested.
    Shorter than a tenth of an epoch, the weights forget most of the data.
    """
    for group in run.groups:
        rate = float(group.settings["lr"]) * float(group.settings["weight_decay"])
        if not (group.settings.get("decoupled_weight_decay") and rate > 0):
            continue
        values = {name: float(group.settings[name]) for name in ("lr", "weight_decay")}
        comparison = ""
        if 1 / rate > run.total_steps:
            comparison = f"the run takes {run.total_steps:,.0f}"
        elif 1 / rate < 0.1 * run.steps_per_epoch:
            comparison = f"an epoch takes {run.steps_per_epoch:,.0f}"
        if comparison:
            values["timescale"] = 1 / rate
            yield PreflightNotice({**values, "comparison": comparison}, group.name)


@notice(
    severity=Severity.info,
    sentence="With β2={beta2:g}, the second moment cannot decay in {dtype}, the dtype of the state:"
    " steps stay small when gradients shrink.",
    suggest=suggestions.let_state_decay,
    source="derived: (1-β2)v is at most half a unit in the last place of v",
)
def exp_avg_sq_cannot_decay(run: RunFacts) -> Iterator[PreflightNotice]:
    """β2·v rounds to v in the dtype of the state, as in bfloat16 with β2 = 0.999."""
    for group in run.groups:
        beta2 = _beta(group, 1)
        for dtype, resolution in group.resolution_by_dtype.items():
            # Half an ulp of v is between resolution*v/4 and resolution*v/2.
            if 1 - beta2 < resolution / 4:
                yield PreflightNotice({"beta2": beta2, "dtype": dtype}, group.name)


@notice(
    severity=Severity.info,
    sentence="β1={beta1:g} is above √β2={root:.3g}: Adam may not converge.",
    source="Zhang et al. 2022, arXiv 2208.09632: convergence needs β1 < √β2, and a large β2",
)
def beta1_above_root_beta2(run: RunFacts) -> Iterator[PreflightNotice]:
    """With β1 above √β2, the first moment averages over more steps than the second moment."""
    for group in run.groups:
        beta1, beta2 = _beta(group, 0), _beta(group, 1)
        if beta1 > math.sqrt(beta2):
            yield PreflightNotice({"beta1": beta1, "root": math.sqrt(beta2)}, group.name)


@notice(
    severity=Severity.info,
    sentence="At {samples:.0f} samples per step, β2={beta2:g} has a half-life of {half_life:,.0f}"
    " samples.",
    suggest=_raise_beta2,
    source="Marek et al. 2025, arXiv 2507.07101: keep the half-life of β2 in samples when the batch"
    " shrinks, 0.9999 at batch size 1; the limits of 16 samples per step and 1,000 samples were"
    " chosen for this notice",
)
def beta2_short_memory(run: RunFacts) -> Iterator[PreflightNotice]:
    """With at most 16 samples per step, β2 has a half-life below 1,000 samples: v is noisy."""
    samples = run.samples_per_step
    for group in run.groups:
        beta2 = _beta(group, 1)
        half_life = samples * math.log(0.5) / math.log(beta2) if 0 < beta2 < 1 else 0.0
        if samples <= SMALL_BATCH and half_life < HALF_LIFE_SAMPLES:
            values = {"samples": samples, "beta2": beta2, "half_life": half_life}
            yield PreflightNotice(values, group.name)


@notice(
    severity=Severity.info,
    sentence="The last step of each epoch accumulates {left:.0f} of {window} batches but divides"
    " their gradients by {window}: Adam takes a full step with {share:.0%} of the gradient.",
    source="Lightning-AI/pytorch-lightning issue 19987",
)
def partial_accumulation(run: RunFacts) -> Iterator[PreflightNotice]:
    """The number of batches per epoch is not a multiple of accumulate_grad_batches.

    Lightning takes a step at the end of the epoch in any case, and always divides the loss by
    accumulate_grad_batches.
    """
    window, batches = run.accumulate_grad_batches, run.batches_per_epoch
    if window > 1 and math.isfinite(batches) and batches % window:
        left = batches % window
        yield PreflightNotice({"left": left, "window": window, "share": left / window})


@notice(
    severity=Severity.info,
    sentence="Only one in {every} steps is measured: a gradient that jumps for one or two steps may"
    " be missed.",
    suggest=_measure_every_step,
    source="Wortsman et al. 2023, arXiv 2304.13013: a jump lasts one or two steps",
)
def measured_rarely(run: RunFacts) -> Iterator[PreflightNotice]:
    """`exp_avg_sq_lags`, `grad_spike` and `loss_spike` only see measured steps."""
    if run.every_n_steps > 1:
        yield PreflightNotice({"every": run.every_n_steps})


def _beta(group: GroupFacts, index: int) -> float:
    return float(group.settings["betas"][index])
