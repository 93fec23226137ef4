"""Formats findings as text, for the console and `lightning-adam explain`."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from lightning_adam.config.errors import format_value
from lightning_adam.findings.context import RuleContext, RunFacts
from lightning_adam.findings.finding import Finding, Suggestion
from lightning_adam.findings.preflight import Notice
from lightning_adam.findings.rule import Rule, summary_of
from lightning_adam.findings.suggestions import no_suggestion
from lightning_adam.statistics.catalogue import STATISTICS

WIDTH = 98
MAX_NAMES = 3
"""Number of scopes or rules to list before 'and N more'."""


def describe_raised(findings: Sequence[Finding]) -> str:
    """Returns the findings of one step as text, one block for each code and optimizer."""
    return "\n".join(map(_describe_group, _by_code_and_optimizer(findings)))


def _describe_group(findings: Sequence[Finding]) -> str:
    finding = _most_severe(findings)
    where = _join_names([each.scope for each in findings])
    of = f" of {finding.optimizer}" if finding.optimizer else ""
    when = "before the first step" if finding.is_notice else f"at step {finding.step}"
    title = f"AdamMonitor: {finding.code} ({finding.severity}) {when}, in {where}{of}"
    # The last suggestion takes all scopes into account.
    body = describe_finding(finding, findings[-1].suggestions)
    return "\n".join([title, *body])


def describe_finding(
    finding: Finding, suggestions: Iterable[Suggestion] | None = None
) -> list[str]:
    """Returns a finding's sentence, evidence and suggestions, line by line.

    Args:
        finding: The finding.
        suggestions: Suggestions to show instead of those of the finding (default: None).
    """
    lines = _wrap(finding.sentence)
    if not finding.is_notice and finding.evidence:
        lines += _wrap(format_numbers(finding.evidence))
    if finding.worst:
        lines += _wrap(f"worst tensors: {format_numbers(finding.worst)}")
    lines += describe_suggestions(finding.suggestions if suggestions is None else suggestions)
    lines.append(f"  more:    lightning-adam explain {finding.code}")
    return lines


def describe_suggestions(suggestions: Iterable[Suggestion]) -> list[str]:
    """Returns one line for each suggestion.

    Example:
        >>> lead = Suggestion(("optimizer.betas=[0.9,0.95]",), is_lead=True)
        >>> for line in describe_suggestions([Suggestion(("optimizer.eps=1e-13",)), lead]):
        ...     print(line)
          use:     optimizer.eps=1e-13
          try:     'optimizer.betas=[0.9,0.95]'
    """
    return [
        f"  {'try:' if each.is_lead else 'use:' if each.overrides else 'do:':<9}{each}"
        for each in suggestions
    ]


def format_numbers(values: Mapping[str, float]) -> str:
    """Returns named numbers in one line.

    Example:
        >>> format_numbers({"eps_energy_loss": 0.62345, "eps": 1e-8})
        'eps_energy_loss 0.623, eps 1e-08'
    """
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


def describe_closed(findings: Iterable[Finding]) -> str:
    """Returns one line for each closed finding."""
    lines = []
    for each in findings:
        end = f"superseded by {each.superseded_by}" if each.superseded_by else "resolved"
        lines.append(
            f"AdamMonitor: {each.code} {end} at step {each.closed}, in {each.scope} (raised at step"
            f" {each.step})"
        )
    return "\n".join(lines)


def summarize(
    findings: Sequence[Finding],
    measurements: int,
    unjudged: Sequence[Rule] = (),
    run: RunFacts | None = None,
) -> str:
    """Returns the summary at the end of a run.

    Args:
        findings: Open and closed findings, without preflight notices.
        measurements: Number of measurements.
        unjudged: Rules for which there were too few measurements (default: none).
        run: Facts of the run, from which `every_n_steps` is suggested (default: unknown).

    Example:
        >>> summarize([], 63)
        'AdamMonitor: No issues found (63 measurements)'
        >>> from lightning_adam.findings import RULES
        >>> run = RunFacts(total_steps=48, every_n_steps=50)
        >>> print(summarize([], 1, [RULES["eps_dominates"]], run))
        AdamMonitor: 1 measurement is too few to judge eps_dominates
          Use adam_monitor.every_n_steps=6 in a run of 48 steps.
    """
    run = run or RunFacts()
    number = f"{measurements} measurement{'' if measurements == 1 else 's'}"
    shown = _by_code_and_optimizer(each for each in findings if each.is_above_info)
    intervals = {rule.code: _largest_interval(rule, run) for rule in unjudged}
    seldom = [code for code, interval in intervals.items() if 1 <= interval < run.every_n_steps]
    few = f"{number} {'is' if measurements == 1 else 'are'} too few to judge {_join_names(seldom)}"
    title = few if seldom else f"No issues found ({number})"
    if shown:
        title = f"{len(shown)} issue{'' if len(shown) == 1 else 's'} in {number}"
    lines = [f"AdamMonitor: {title}"]
    for group in shown:
        first, severity = group[0], _most_severe(group).severity
        of = f" of {first.optimizer}" if first.optimizer else ""
        is_open = [each for each in group if each.is_open]
        until = "to the end" if is_open else f"to step {max(each.closed or 0 for each in group)}"
        lines.append(f"  {first.code} ({severity}){of}, from step {first.step} {until}")
        # The last suggestion takes all open findings into account.
        lines += describe_suggestions((is_open or group)[-1].suggestions)[:1]
    if seldom:
        lines += [f"  {few}."] if shown else []
        interval = min(intervals[code] for code in seldom)
        setting = (run.monitor_path / "every_n_steps").override(interval)
        lines.append(f"  Use {setting} in a run of {run.total_steps:,.0f} steps.")
    elif unjudged:
        lines += _wrap(f"Not judged because the run is too short: {_join_names([*intervals])}.")
    return "\n".join(lines)


def _largest_interval(rule: Rule, run: RunFacts) -> float:
    """Returns the largest `every_n_steps` with enough measurements for a rule."""
    warmup, number = rule.warmup.steps(*RuleContext({}, run).betas), rule.patience
    if rule.waits_for_peak and run.warmup_steps:
        # At the first measurement after the warm-up, the learning rate has still risen.
        warmup, number = max(warmup, run.warmup_steps), number + 1
    interval = (run.total_steps - math.floor(warmup)) / number
    return interval if math.isinf(interval) else math.floor(interval)


def explain_rule(rule: Rule | Notice, place: str = "adam_monitor") -> str:
    """Returns the meaning, condition, settings and source of a rule or a notice."""
    kind = "a preflight notice" if isinstance(rule, Notice) else "a finding"
    title = f"{rule.code} ({kind}: {rule.severity}, {when_judged(rule)})"
    lines = [*_wrap(title, 0), *_wrap(rule.meaning, 4)]
    if isinstance(rule, Rule):
        lines += _wrap(f"Raised when {format_condition(rule)}", 4)
        for name in rule.statistics:
            lines += _wrap(f"{name} = {STATISTICS[name].formula}", 4)
    suggested = suggestion_summary(rule)
    lines += _wrap(f"Suggestion: {suggested}", 4) if suggested else []
    lines += [f"    {override}" for override in format_settings(rule, place)]
    if isinstance(rule, Rule) and rule.suppressed_by:
        lines += _wrap(f"Suppressed by {', '.join(rule.suppressed_by)}.", 4)
    lines += _wrap(f"Source: {rule.source}", 4)
    return "\n".join(lines)


def format_condition(rule: Rule) -> str:
    """Returns the condition of a rule in words, with its thresholds filled in.

    Example:
        >>> from lightning_adam.findings import RULES
        >>> format_condition(RULES["amsgrad_frozen"])
        'amsgrad_gap, times the smoothed grad_norm relative to its maximum, is above 2.'
    """
    return f"{rule.when.format(**rule.thresholds)}."


def when_judged(rule: Rule | Notice) -> str:
    """Returns when and where a rule is judged, and after how many measurements it is raised.

    Example:
        >>> from lightning_adam.findings import RULES
        >>> when_judged(RULES["not_finite"])
        'judged from the first step, for model; raised after 1 measurement'
    """
    if isinstance(rule, Notice):
        return "judged before the first step"
    waits = [] if rule.warmup.value == "none" else [rule.warmup.value]
    waits += ["the learning-rate warm-up"] * rule.waits_for_peak
    when = f"after {' and '.join(waits)}" if waits else "from the first step"
    scopes = [each.value for each in rule.scopes]
    scopes += ["adam_monitor.scopes"] * rule.is_local
    rows = "1 measurement" if rule.patience == 1 else f"{rule.patience} consecutive measurements"
    return f"judged {when}, for {', '.join(scopes)}; raised after {rows}"


def suggestion_summary(rule: Rule | Notice) -> str:
    """Returns what a rule suggests, in words; empty if it suggests nothing."""
    return "" if rule.suggest is no_suggestion else summary_of(rule.suggest)


def format_settings(rule: Rule | Notice, place: str = "adam_monitor") -> list[str]:
    """Returns the settings of a rule as overrides with their default values.

    Example:
        >>> from lightning_adam.findings.preflight import NOTICES
        >>> format_settings(NOTICES["eps_vanishes"])
        ['adam_monitor.findings.eps_vanishes.severity=error']
    """
    return [
        f"{place}.findings.{rule.code}.{name}={format_value(value)}"
        for name, value in rule.settings.items()
    ]


def _by_code_and_optimizer(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Groups findings by code and optimizer."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.code, finding.optimizer), []).append(finding)
    return [*groups.values()]


def _most_severe(findings: Iterable[Finding]) -> Finding:
    """Returns the first of the most severe findings."""
    return max(findings, key=lambda each: each.rank)


def _join_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def _wrap(text: str, indent: int = 2) -> list[str]:
    space = " " * indent
    return textwrap.wrap(text, WIDTH, initial_indent=space, subsequent_indent=space)
