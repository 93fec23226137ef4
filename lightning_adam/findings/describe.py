"""Findings as text: in the console, and in `lightning-adam explain`."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from lightning_adam.config.errors import format_value
from lightning_adam.findings.context import RuleContext, RunFacts
from lightning_adam.findings.finding import Finding, Suggestion
from lightning_adam.findings.preflight import Notice
from lightning_adam.findings.rule import Rule, summary_of
from lightning_adam.statistics.catalogue import STATISTICS

WIDTH = 98
NAMED = 3
"""Scopes and rules that are named of many."""


def describe_raised(findings: Sequence[Finding]) -> str:
    """Returns findings of one step as text, one block a code and optimizer."""
    return "\n".join(map(_block, _alike(findings)))


def _block(alike: Sequence[Finding]) -> str:
    finding = alike[0]
    where = _some([each.scope for each in alike])
    of = f" of {finding.optimizer}" if finding.optimizer else ""
    when = "before the first step" if finding.is_notice else f"at step {finding.step}"
    title = f"AdamMonitor: {finding.code} ({finding.severity}) {when}, in {where}{of}"
    # The latest suggestion serves all scopes.
    body = describe_finding(finding, alike[-1].suggestions)
    return "\n".join([title, *body])


def describe_finding(
    finding: Finding, suggestions: Iterable[Suggestion] | None = None
) -> list[str]:
    """Returns a finding's sentence, evidence and suggestions, line by line.

    Args:
        finding: The finding.
        suggestions: Suggestions in place of its own (default: None).
    """
    lines = _wrapped(finding.sentence)
    if not finding.is_notice and finding.evidence:
        lines += _wrapped(format_numbers(finding.evidence))
    if finding.worst:
        lines += _wrapped(f"most in {format_numbers(finding.worst)}")
    lines += describe_suggestions(finding.suggestions if suggestions is None else suggestions)
    lines.append(f"  more:    lightning-adam explain {finding.code}")
    return lines


def describe_suggestions(suggestions: Iterable[Suggestion]) -> list[str]:
    """Returns suggestions in their order, a line each.

    Example:
        >>> lead = Suggestion(("optimizer.betas=[0.9,0.95]",), is_lead=True)
        >>> for line in describe_suggestions([Suggestion(("optimizer.eps=1e-13",)), lead]):
        ...     print(line)
          type:    optimizer.eps=1e-13
          lead:    'optimizer.betas=[0.9,0.95]'
    """
    return [
        f"  {'lead:' if each.is_lead else 'type:' if each.overrides else 'do:':<9}{each}"
        for each in suggestions
    ]


def format_numbers(values: Mapping[str, float]) -> str:
    """Returns numbers by name, in one line.

    Example:
        >>> format_numbers({"eps_energy_loss": 0.62345, "eps": 1e-8})
        'eps_energy_loss 0.623, eps 1e-08'
    """
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


def describe_closed(findings: Iterable[Finding]) -> str:
    """Returns closed findings as text, a line each."""
    return "\n".join(
        f"AdamMonitor: {each.code} {_end(each)} at step {each.closed}, in {each.scope} (raised at"
        f" step {each.step})"
        for each in findings
    )


def _end(finding: Finding) -> str:
    by = finding.superseded_by
    return f"superseded by {by}" if by else "resolved"


def summarize(
    findings: Sequence[Finding],
    measurements: int,
    unjudged: Sequence[Rule] = (),
    run: RunFacts | None = None,
) -> str:
    """Returns the summary at the end of a run.

    Args:
        findings: Open and closed findings, without notices.
        measurements: Number of measurements.
        unjudged: Rules that could not be judged (default: none).
        run: Facts of the run, which say how to judge them (default: none are known).

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
    shown = _alike(each for each in findings if each.is_above_info)
    intervals = {rule.code: _interval(rule, run) for rule in unjudged}
    seldom = [code for code, interval in intervals.items() if 1 <= interval < run.every_n_steps]
    few = f"{number} {'is' if measurements == 1 else 'are'} too few to judge {_some(seldom)}"
    title = few if seldom else f"No issues found ({number})"
    if shown:
        title = f"{len(shown)} issue{'' if len(shown) == 1 else 's'} in {number}"
    lines = [f"AdamMonitor: {title}"]
    for alike in shown:
        first = alike[0]
        of = f" of {first.optimizer}" if first.optimizer else ""
        is_open = [each for each in alike if each.is_open]
        until = "to the end" if is_open else f"to step {max(each.closed or 0 for each in alike)}"
        lines.append(f"  {first.code} ({first.severity}){of}, from step {first.step} {until}")
        # The last that was raised serves all that are open.
        lines += describe_suggestions((is_open or alike)[-1].suggestions)[:1]
    if seldom:
        lines += [f"  {few}."] if shown else []
        interval = min(intervals[code] for code in seldom)
        setting = (run.monitor_path / "every_n_steps").override(interval)
        lines.append(f"  Use {setting} in a run of {run.total_steps:,.0f} steps.")
    elif unjudged:
        lines += _wrapped(f"Not judged, as the run is too short: {_some([*intervals])}.")
    return "\n".join(lines)


def _interval(rule: Rule, run: RunFacts) -> float:
    """The largest `every_n_steps` at which a run has enough measurements for a rule."""
    warmup, number = rule.warmup.steps(*RuleContext({}, run).betas), rule.patience
    if rule.waits_for_peak and run.warmup_steps:
        # The learning rate of the first measurement after its warm-up is still a higher one.
        warmup, number = max(warmup, run.warmup_steps), number + 1
    interval = (run.total_steps - math.floor(warmup)) / number
    return interval if math.isinf(interval) else math.floor(interval)


def explain_rule(rule: Rule | Notice, place: str = "adam_monitor") -> str:
    """Returns the meaning, the condition, the settings and the source of a rule or a notice."""
    kind = "a preflight notice" if isinstance(rule, Notice) else "a finding"
    title = f"{rule.code} ({kind}: {rule.severity}, {when_judged(rule)})"
    lines = [*_wrapped(title, 0), *_wrapped(rule.meaning, 4)]
    if isinstance(rule, Rule):
        lines += _wrapped(f"Raised when {format_condition(rule)}", 4)
        for name in rule.statistics:
            lines += _wrapped(f"{name} = {STATISTICS[name].formula}", 4)
    suggested = suggestion_summary(rule)
    lines += _wrapped(f"Suggestion: {suggested}", 4) if suggested else []
    lines += [f"    {override}" for override in format_settings(rule, place)]
    if isinstance(rule, Rule) and rule.suppressed_by:
        lines += _wrapped(f"Suppressed by {', '.join(rule.suppressed_by)}.", 4)
    lines += _wrapped(f"Source: {rule.source}", 4)
    return "\n".join(lines)


def format_condition(rule: Rule) -> str:
    """Returns the condition of a rule in words, with the values of its thresholds.

    Example:
        >>> from lightning_adam.findings import RULES
        >>> format_condition(RULES["amsgrad_frozen"])
        'amsgrad_gap, times the smoothed grad_norm relative to its maximum, is above 2.'
    """
    return f"{rule.when.format(**rule.thresholds)}."


def when_judged(rule: Rule | Notice) -> str:
    """Returns when and where a rule is judged, and how long it has to hold.

    Example:
        >>> from lightning_adam.findings import RULES
        >>> when_judged(RULES["not_finite"])
        'judged from the first step, for model; raised after 1 measurement'
    """
    if isinstance(rule, Notice):
        return "judged before the first step"
    waits = [] if rule.warmup.value == "none" else [f"after {rule.warmup.value}"]
    waits += ["after the learning-rate warm-up"] * rule.waits_for_peak
    when = " and ".join(waits) or "from the first step"
    scopes = " and ".join(each.value for each in rule.scopes)
    scopes += " and the monitor's scopes" if rule.is_local else ""
    rows = "1 measurement" if rule.patience == 1 else f"{rule.patience} measurements in a row"
    return f"judged {when}, for {scopes}; raised after {rows}"


def suggestion_summary(rule: Rule | Notice) -> str:
    """Returns what a rule suggests, in words; empty if nothing."""
    text = summary_of(rule.suggest)
    return "" if text == "None." else text


def format_settings(rule: Rule | Notice, place: str = "adam_monitor") -> list[str]:
    """Returns the settings of a rule as overrides, at their defaults.

    Example:
        >>> from lightning_adam.findings.preflight import NOTICES
        >>> format_settings(NOTICES["eps_vanishes"])
        ['adam_monitor.findings.eps_vanishes.severity=error']
    """
    return [
        f"{place}.findings.{rule.code}.{name}={format_value(value)}"
        for name, value in rule.settings.items()
    ]


def _alike(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Findings of the same code and optimizer together."""
    alike: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        alike.setdefault((finding.code, finding.optimizer), []).append(finding)
    return [*alike.values()]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _wrapped(text: str, indent: int = 2) -> list[str]:
    space = " " * indent
    return textwrap.wrap(text, WIDTH, initial_indent=space, subsequent_indent=space)
