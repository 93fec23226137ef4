"""What can be known before a step is spent."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_adam.config.monitor import Severity
from lightning_adam.findings import remedies
from lightning_adam.findings.finding import Finding
from lightning_adam.findings.rule import Case, Cure, Rule, Training, rule


class PlannedGroup(NamedTuple):
    """A group of parameters as it is about to be trained."""

    name: str
    settings: Mapping[str, Any]
    """`lr` at its peak, `betas`, `eps`, `weight_decay` and so on."""
    dtypes: Mapping[str, float]
    """What eps is in each dtype of the parameters, which is that of the state."""
    resolutions: Mapping[str, float]
    """The distance from 1 to the next number in each of them."""


@dataclass(frozen=True)
class Plan:
    """What is about to be trained."""

    training: Training
    groups: Sequence[PlannedGroup]
    schedule: Mapping[str, Any]
    """What a schedule resolved to: `total_steps`, `warmup_steps`; empty without one."""
    left_out: Sequence[str] = ()
    """Parameters that ask for a gradient and are in no group."""


class Foreseen(NamedTuple):
    """What a plan leads to."""

    told: Mapping[str, Any]
    """What the sentence says."""
    scope: str = "model"
    sentence: str = ""
    """In place of the rule's own."""
    severity: Severity | None = None
    """In place of the rule's own."""
    cures: tuple[Cure, ...] | None = None
    """In place of the rule's own."""


Check = Callable[[Plan], Iterator[Foreseen]]


@rule(
    severity=Severity.error,
    sentence="eps={eps:g} is 0 in {dtype}, the dtype of parameters and state.",
    remedy=remedies.representable_eps,
    source="pytorch/pytorch issue 147437",
)
def eps_vanishes(plan: Plan) -> Iterator[Foreseen]:
    """Adam's state has the parameters' dtype, in which eps rounds to 0: 0/0 is NaN.

    A fused step shows no NaN: its second moment is 0 and its steps are huge.
    """
    for group in plan.groups:
        for dtype, eps in group.dtypes.items():
            if eps == 0:
                told = {"eps": group.settings["eps"], "dtype": dtype}
                yield Foreseen(told, f"group/{group.name}")


@rule(
    severity=Severity.warning,
    sentence="{count} parameters ask for a gradient and are in no group, such as {first}: they"
    " never train.",
    remedy=remedies.trained_or_frozen,
    source="arithmetic",
)
def parameters_left_out(plan: Plan) -> Iterator[Foreseen]:
    """The model has parameters that no optimizer was given."""
    if plan.left_out:
        yield Foreseen({"count": len(plan.left_out), "first": plan.left_out[0]})


@rule(
    severity=Severity.info,
    sentence="The learning rate warms up for {warmup:.0f} steps; the second moment remembers"
    " {memory:.0f}.",
    remedy=remedies.longer_warmup,
    source="Ma & Yarats 2021, arXiv 1910.04209: 2/(1-β2) steps",
)
def warmup_short(plan: Plan, *, threshold: float = 0.1) -> Iterator[Foreseen]:
    """The warm-up ends long before the second moment is an average of many gradients.

    That is, before `threshold` times 2/(1-β2) steps, or a tenth of a shorter run.
    """
    if not plan.groups:
        return
    warmup = plan.schedule.get("warmup_steps") or 0
    memory = 2 / (1 - max(float(each.settings["betas"][1]) for each in plan.groups))
    if warmup < threshold * min(memory, plan.training.total_steps):
        yield Foreseen({"warmup": warmup, "memory": memory})


@rule(
    severity=Severity.info,
    sentence="Weight decay of {weight_decay:g} at a learning rate of {lr:g} forgets a weight in"
    " {timescale:,.0f} steps; {beside}.",
    remedy=remedies.decay_within_the_run,
    source="Wang & Aitchison 2024, arXiv 2405.13698: 1 to 10 epochs",
)
def decay_timescale(plan: Plan) -> Iterator[Foreseen]:
    """Decoupled decay averages weights over 1/(ηλ) steps: more than the run, and it does nothing.

    Less than a tenth of an epoch, and the weights forget most of the data.
    """
    training = plan.training
    for group in plan.groups:
        rate = float(group.settings["lr"]) * float(group.settings["weight_decay"])
        if not (group.settings.get("decoupled_weight_decay") and rate > 0):
            continue
        told = {name: float(group.settings[name]) for name in ("lr", "weight_decay")}
        told["timescale"] = 1 / rate
        beside = ""
        if 1 / rate > training.total_steps:
            beside = f"the run takes {training.total_steps:,.0f}"
        elif 1 / rate < 0.1 * training.steps_per_epoch:
            beside = f"an epoch takes {training.steps_per_epoch:,.0f}"
        if beside:
            yield Foreseen({**told, "beside": beside}, f"group/{group.name}")


def _schedule_exhausted(plan: Plan) -> Iterator[Foreseen]:
    planned, steps = plan.schedule.get("total_steps"), plan.training.total_steps
    if planned is None or not math.isfinite(steps) or abs(planned - steps) <= 0.01 * steps:
        return
    outcome = "the rest is trained at its lowest rate" if planned < steps else "it does not end"
    yield Foreseen(
        {},
        sentence=f"The schedule takes {planned:,} steps, the training {steps:,.0f}: {outcome}.",
        severity=Severity.warning,
    )


def _exp_avg_sq_stalled(plan: Plan) -> Iterator[Foreseen]:
    for group in plan.groups:
        beta2 = float(group.settings["betas"][1])
        for dtype, resolution in group.resolutions.items():
            # Half an ulp of v is a quarter to a half of this, as v stands in its octave.
            if 1 - beta2 < resolution / 4:
                yield Foreseen(
                    {},
                    f"group/{group.name}",
                    f"With β2={beta2:g} the second moment cannot fall in {dtype}, the dtype of the"
                    " state: it matters if gradients get smaller.",
                    Severity.info,
                )


def _exp_avg_sq_lags(plan: Plan) -> Iterator[Foreseen]:
    seldom = plan.training.every_n_steps
    if seldom > 1:
        yield Foreseen(
            {},
            sentence=f"It is measured every {seldom} steps: a gradient that jumps for a step or two"
            " is not seen in between.",
            severity=Severity.info,
            cures=(Cure(("adam_monitor.every_n_steps=1",)),),
        )


EARLY: dict[str, Check] = {
    "exp_avg_sq_lags": _exp_avg_sq_lags,
    "schedule_exhausted": _schedule_exhausted,
    "exp_avg_sq_stalled": _exp_avg_sq_stalled,
}
"""What leads to the findings of other rules."""


def preflight(plan: Plan, rules: Mapping[str, Rule]) -> list[Finding]:
    """What a plan leads to.

    Args:
        plan: What is about to be trained.
        rules: The rules that are on, by code.

    Example:
        >>> from lightning_adam.findings import RULES
        >>> settings = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        >>> group = PlannedGroup("group_0", settings, {"float16": 0.0}, {"float16": 2.0**-10})
        >>> plan = Plan(Training(defaults=settings, dtypes=frozenset({"float16"})), [group], {})
        >>> for finding in preflight(plan, RULES):
        ...     print(finding.code, finding.remedy)
        eps_vanishes ('trainer.precision=16-mixed',)
        warmup_short ('scheduler.warmup_steps=2000',)
    """
    checks = {code: each.condition for code, each in rules.items() if each.is_foreseen} | EARLY
    findings = []
    for code, check in checks.items():
        if code not in rules:
            continue
        thresholds = rules[code].thresholds if rules[code].is_foreseen else {}
        for foreseen in check(plan, **thresholds):
            findings.append(_finding(rules[code], foreseen, plan))
    return findings


def _finding(rule: Rule, foreseen: Foreseen, plan: Plan) -> Finding:
    cures = foreseen.cures
    numbers = {name: value for name, value in foreseen.told.items() if isinstance(value, float)}
    return Finding(
        code=rule.code,
        severity=foreseen.severity or rule.severity,
        scope=foreseen.scope,
        step=0,
        sentence=(foreseen.sentence or rule.sentence.format_map(dict(foreseen.told))),
        evidence=numbers,
        worst={},
        cures=tuple(rule.remedy(Case(numbers, plan.training))) if cures is None else cures,
        source=rule.source,
    )
