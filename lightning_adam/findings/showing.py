"""Findings in words: in the console, and behind `lightning-adam explain`."""

import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from lightning_adam.config.errors import format_value
from lightning_adam.config.monitor import Severity
from lightning_adam.findings.finding import Finding
from lightning_adam.findings.rule import Cure, Rule
from lightning_adam.statistics.catalogue import STATISTICS

WIDTH = 98
NAMED = 3
"""The layers that are named of those in which the same is wrong."""


def typed(cure: Cure) -> str:
    """A cure as it is typed, each override one word of a shell, and what has to be said of it.

    Example:
        >>> typed(Cure(("optimizer.betas=[0.9,0.95]",), "or less"))
        "'optimizer.betas=[0.9,0.95]'  (or less)"
    """
    overrides = " ".join(map(shlex.quote, cure.overrides))
    return f"{overrides}  ({cure.hint})" if overrides and cure.hint else overrides or cure.hint


def raised(findings: Sequence[Finding]) -> str:
    """What is wrong since a step, one block a pathology.

    Args:
        findings: Findings of one optimizer that were raised at the same step.
    """
    by_code: dict[str, list[Finding]] = {}
    for finding in findings:
        by_code.setdefault(finding.code, []).append(finding)
    return "\n".join(_block(each) for each in by_code.values())


def _block(alike: Sequence[Finding]) -> str:
    finding = alike[0]
    scopes = [each.scope for each in alike]
    where = ", ".join(scopes[:NAMED])
    if len(scopes) > NAMED:
        where += f" and {len(scopes) - NAMED} more"
    of = f" of {finding.optimizer}" if finding.optimizer else ""
    when = f"at step {finding.step}" if finding.step else "before the first step"
    title = f"AdamMonitor: {finding.code} ({finding.severity}) {when}, in {where}{of}"
    return "\n".join([title, *described(finding)])


def described(finding: Finding) -> list[str]:
    """What a finding says, the numbers that prove it, and what to type, line by line."""
    lines = _wrapped(finding.sentence)
    if finding.step and finding.evidence:
        lines += _wrapped(numbers(finding.evidence))
    if finding.worst:
        lines += _wrapped(f"most in {numbers(finding.worst)}")
    lines += to_type(finding.cures)
    lines.append(f"  more:    lightning-adam explain {finding.code}")
    return lines


def to_type(cures: Iterable[Cure]) -> list[str]:
    """What can be typed first, then what has to be done, a line each.

    Example:
        >>> to_type([Cure((), "wait"), Cure(("optimizer.eps=1e-13",))])
        ['  type:    optimizer.eps=1e-13', '  or do:   wait']
    """
    lines: list[str] = []
    for cure in sorted(cures, key=lambda each: not each.overrides):
        word = "type:" if cure.overrides else "do:"
        lines.append(f"  {f'or {word}' if lines else word:<9}{typed(cure)}")
    return lines


def numbers(values: Mapping[str, float]) -> str:
    """Numbers by name, in a line.

    Example:
        >>> numbers({"eps_energy_loss": 0.62345, "eps": 1e-8})
        'eps_energy_loss 0.623, eps 1e-08'
    """
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


def closed(findings: Iterable[Finding]) -> str:
    """What has ceased, a line each."""
    return "\n".join(
        f"AdamMonitor: {each.code} has ceased at step {each.closed}, in {each.scope}; it was"
        f" raised at step {each.step}."
        for each in findings
    )


def summary(findings: Sequence[Finding], measurements: int) -> str:
    """What is said at the end of a training.

    Args:
        findings: All of them, those that have ceased too.
        measurements: How often was measured.

    Example:
        >>> summary([], 63)
        'AdamMonitor has found nothing wrong in 63 measurements.'
    """
    shown = [each for each in findings if each.severity is not Severity.info]
    if not shown:
        return f"AdamMonitor has found nothing wrong in {measurements} measurements."
    lines = [f"AdamMonitor's findings in {measurements} measurements:"]
    by_code: dict[str, list[Finding]] = {}
    for finding in shown:
        by_code.setdefault(finding.code, []).append(finding)
    for code, alike in by_code.items():
        first, latest = alike[0], alike[-1]
        since = f"from step {first.step}" if first.step else "from the start"
        ends = [each.closed for each in alike]
        until = "to the end" if None in ends else f"to step {max(filter(None, ends))}"
        lines.append(f"  {code} ({first.severity}), {since} {until}")
        lines += to_type(latest.cures)[:1]
    return "\n".join(lines)


def explained(rule: Rule, place: str = "adam_monitor") -> str:
    """A rule's meaning, its condition, what can be set of it, and its source."""
    title = f"{rule.code} (a finding: {rule.severity}, {judged(rule)})"
    lines = [*_wrapped(title, 0), *_wrapped(rule.meaning, 4)]
    lines += textwrap.indent(rule.definition, " " * 6).splitlines()
    for name in rule.statistics:
        lines += _wrapped(f"{name} = {STATISTICS[name].formula}", 4)
    lines += _wrapped(f"Remedy: {remedy(rule)}", 4) if remedy(rule) else []
    lines += [f"    {override}" for override in settings_typed(rule, place)]
    if rule.explained_by:
        lines += _wrapped(
            f"Not raised while one of these holds: {', '.join(rule.explained_by)}.", 4
        )
    lines += _wrapped(f"Source: {rule.source}", 4)
    return "\n".join(lines)


def judged(rule: Rule) -> str:
    """When and of what a rule is judged, and how long it has to hold.

    Example:
        >>> from lightning_adam.findings import RULES
        >>> judged(RULES["not_finite"])
        'judged from the first step, for model; raised when it has held for 1 measurement'
    """
    if rule.is_foreseen:
        return "judged before the first step"
    is_at_once = rule.warmup.value == "none"
    when = "from the first step" if is_at_once else f"after {rule.warmup.value}"
    scopes = " and ".join(each.value for each in rule.scopes)
    rows = "1 measurement" if rule.persistence == 1 else f"{rule.persistence} measurements"
    return f"judged {when}, for {scopes}; raised when it has held for {rows}"


def remedy(rule: Rule) -> str:
    """What a rule's remedy is, in words; empty where nothing is said of it."""
    return " ".join((rule.remedy.__doc__ or "").split())


def settings_typed(rule: Rule, place: str = "adam_monitor") -> list[str]:
    """What can be set of a rule, at its defaults, as it is typed.

    Example:
        >>> from lightning_adam.findings import RULES
        >>> settings_typed(RULES["eps_vanishes"])[-1]
        'adam_monitor.findings.eps_vanishes.severity=error'
    """
    return [
        f"{place}.findings.{rule.code}.{name}={format_value(value)}"
        for name, value in rule.settings.items()
    ]


def _wrapped(text: str, indent: int = 2) -> list[str]:
    space = " " * indent
    return textwrap.wrap(text, WIDTH, initial_indent=space, subsequent_indent=space)
