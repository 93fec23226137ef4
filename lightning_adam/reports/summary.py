"""The summary of a run at the top of a report: verdict, metrics, facts and findings."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lightning_adam.config.errors import format_value
from lightning_adam.config.monitor import Scope, Severity
from lightning_adam.findings import RULES
from lightning_adam.findings.finding import Finding, Suggestion
from lightning_adam.reports.charts import LOSS, VALIDATION
from lightning_adam.reports.runs import Run, Series
from lightning_adam.statistics.catalogue import STATISTICS

MAIN_SETTINGS = ("class", "lr", "betas", "eps", "weight_decay", "amsgrad")
"""The settings of an optimizer to show, in order."""
CHECKPOINT = "checkpoint"
"""The source of a run that was read from a checkpoint."""
LOWER_IS_BETTER = {"loss", "error", "err", "perplexity", "ppl", "nll", "cer", "wer"}
LOWER_IS_BETTER |= {"mse", "mae", "mape", "rmse", "bpc"}
HIGHER_IS_BETTER = {"acc", "accuracy", "f1", "auc", "auroc", "precision", "recall", "score", "r2"}
HIGHER_IS_BETTER |= {"iou", "miou", "map", "dice", "bleu", "rouge", "psnr", "ssim"}
"""Words in the name of a metric that indicate its direction, if AdamMonitor has not recorded it."""


class Fact(NamedTuple):
    """A named value of a run."""

    name: str
    value: str
    note: str = ""


class Metric(NamedTuple):
    """A metric of a run."""

    name: str
    final: float
    best: float | None
    """None if it is unknown whether higher is better."""
    best_step: int | None


@dataclass(frozen=True)
class Issue:
    """All findings with the same code and optimizer."""

    findings: Sequence[Finding]
    """Sorted by step."""

    @property
    def worst(self) -> Finding:
        """The first of the most severe findings."""
        return max(self.findings, key=lambda each: each.rank)

    @property
    def scopes(self) -> list[str]:
        """The scopes, widest first."""
        kinds = [each.value for each in Scope]
        scopes = dict.fromkeys(each.scope for each in self.findings)
        return sorted(scopes, key=lambda scope: kinds.index(scope.partition("/")[0]))

    @property
    def start(self) -> int:
        """The step at which it was first raised; 0 for a preflight notice."""
        return self.findings[0].step

    @property
    def end(self) -> int | None:
        """The step at which the last finding was closed; None while one is open."""
        ends = [each.closed for each in self.findings]
        return None if None in ends else max(each for each in ends if each is not None)

    @property
    def suggestions(self) -> Sequence[Suggestion]:
        """The suggestions of the last open finding, which take all of them into account."""
        findings = [each for each in self.findings if each.is_open] or self.findings
        return findings[-1].suggestions

    @property
    def statistic(self) -> str:
        """The statistic of the chart that shows it; empty if there is none."""
        rule = RULES.get(self.worst.code)
        names = [*rule.limits, *rule.statistics] if rule else [*self.worst.evidence]
        return next((name for name in names if name in STATISTICS), "")


def issues_of(findings: Iterable[Finding]) -> list[Issue]:
    """Returns findings grouped by code and optimizer, most severe and then earliest first.

    Example:
        >>> def finding(scope, step):
        ...     text, source = "eps removes 60% of the update.", ""
        ...     error = Severity.error
        ...     return Finding("eps_dominates", error, scope, step, text, {}, {}, (), source)
        >>> (issue,) = issues_of([finding("layer/net.0", 40), finding("layer/net.1", 30)])
        >>> issue.scopes, issue.start, issue.end, issue.statistic
        (['layer/net.1', 'layer/net.0'], 30, None, 'eps_energy_loss')
    """
    groups: dict[tuple[str, str], list[Finding]] = {}
    for each in sorted(findings, key=lambda finding: finding.step):
        groups.setdefault((each.optimizer, each.code), []).append(each)
    issues = [Issue(group) for group in groups.values()]
    return sorted(issues, key=lambda each: (-each.worst.rank, each.start))


class Verdict(NamedTuple):
    """Whether a run is healthy."""

    level: str
    """`error`, `warning`, `healthy`, or `unknown` if the run was not judged."""
    text: str
    note: str


def verdict_of(run: Run) -> Verdict:
    """Returns whether a run is healthy.

    Example:
        >>> from pathlib import Path
        >>> run = Run("run", Path(), {}, {}, {}, [], findings=[], measurements=51)
        >>> verdict_of(run)
        Verdict(level='healthy', text='Healthy', note='no issues found in 51 measurements')
    """
    if run.findings is None:
        return Verdict("unknown", "Not judged", "the run has no record of findings")
    issues = [each for each in issues_of(run.findings) if each.worst.is_above_info]
    is_checkpoint, number = run.source == CHECKPOINT, run.measurements
    judged = "" if number is None else f"{number:,} measurement{'' if number == 1 else 's'}"
    if is_checkpoint:
        judged = "the last step, without its gradient"
    if not issues:
        return Verdict("healthy", "Healthy", " in ".join(filter(None, ["no issues found", judged])))
    severities = [each.worst.severity for each in issues]
    counts = {each.value: severities.count(each) for each in (Severity.error, Severity.warning)}
    text = ", ".join(
        f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items() if count
    )
    is_open = sum(each.end is None for each in issues)
    note = f"{is_open} open at the end" if is_open else "all resolved"
    note = f"judged by {judged}" if is_checkpoint else ", ".join(filter(None, [note, judged]))
    return Verdict(severities[0].value, text, note)


def metrics_of(run: Run) -> list[Metric]:
    """Returns the monitored metric and the training loss of a run, if they are logged.

    The training loss has no best value, as the smallest one is that of an easy batch.
    """
    recorded = mapping(facts_of(run).get("metric"))
    name = recorded.get("name")
    validation = [key for key in run.series if VALIDATION.draws(key)]
    # Without a recorded metric, prefer a loss.
    names = [name] if name in run.series else sorted(validation, key=lambda key: "loss" not in key)
    training = [key for key in run.series if LOSS.draws(key) and key not in names[:1]]
    metrics = [_metric(run.series[each], each, str(recorded.get("mode", ""))) for each in names[:1]]
    finals = {each: float(run.series[each].values[-1]) for each in training[:1]}
    return metrics + [Metric(each, final, None, None) for each, final in finals.items()]


def _metric(series: Series, key: str, mode: str) -> Metric:
    steps, values = series
    words = {*re.split("[^a-z0-9]+", key.lower())}
    mode = mode or ("min" if words & LOWER_IS_BETTER else "max" if words & HIGHER_IS_BETTER else "")
    if not mode or not np.isfinite(values).any():
        return Metric(key, float(values[-1]), None, None)
    place = int(np.nanargmin(values) if mode == "min" else np.nanargmax(values))
    return Metric(key, float(values[-1]), float(values[place]), int(steps[place]))


def key_facts(run: Run) -> list[Fact]:
    """Returns the key facts of a run: metrics, last step, wall time, parameters, device.

    Example:
        >>> from pathlib import Path
        >>> facts = {"parameters": 124_439_808, "device": "NVIDIA H200", "precision": "bf16-mixed"}
        >>> config = {"lightning_adam": {"run": facts}}
        >>> shown = key_facts(Run("run", Path(), config, {}, {}, [], seconds=4000.0))
        >>> [fact.value for fact in shown]
        ['1 h 6 min', '124.4 M', 'NVIDIA H200']
    """
    facts = []
    for metric in metrics_of(run):
        if metric.best is None:
            facts.append(Fact(metric.name, f"{metric.final:.4g}", "final"))
        else:
            note = f"best, at step {metric.best_step:,}; final {metric.final:.4g}"
            facts.append(Fact(metric.name, f"{metric.best:.4g}", note))
    recorded = facts_of(run)
    last = max((int(each.steps[-1]) for each in run.series.values() if len(each.steps)), default=-1)
    if last >= 0:
        facts.append(Fact("Last step", f"{last:,}"))
    if run.seconds is not None:
        facts.append(Fact("Wall time", format_duration(run.seconds)))
    if recorded.get("parameters"):
        facts.append(Fact("Parameters", format_count(int(recorded["parameters"]))))
    if recorded.get("device"):
        facts.append(Fact("Device", str(recorded["device"]), str(recorded.get("precision", ""))))
    return facts


def settings_of(run: Run) -> list[str]:
    """Returns the settings of optimizer and schedule as text, one for each optimizer.

    Example:
        >>> from pathlib import Path
        >>> adam = {"optimizer": {"class": "AdamW", "lr": 0.001, "eps": 1e-8}}
        >>> settings_of(Run("run", Path(), {"lightning_adam": adam}, {}, {}, []))
        ['AdamW lr=0.001 eps=1e-08']
    """
    optimizers = optimizers_of(run)
    schedulers = mapping(monitor_config(run).get("scheduler"))
    if [*optimizers] == [""]:
        schedulers = {"": schedulers}
    texts = []
    for name, optimizer in optimizers.items():
        schedule = mapping(schedulers.get(name))
        parts = [
            _format_settings(optimizer, "class", MAIN_SETTINGS),
            _format_settings(schedule, "name", schedule),
        ]
        texts.append(": ".join(filter(None, [name, "; ".join(filter(None, parts))])))
    return [*filter(None, texts)]


def _format_settings(settings: Mapping[str, Any], title: str, names: Iterable[str]) -> str:
    shown = [f"{name}={format_value(settings[name])}" for name in names if name in settings]
    return " ".join(shown).replace(f"{title}=", "", 1)


def monitor_config(run: Run) -> dict[str, Any]:
    """Returns the settings that AdamMonitor has logged to the config of a run."""
    return mapping(run.config.get("lightning_adam"))


def facts_of(run: Run) -> dict[str, Any]:
    """Returns the facts of a run that AdamMonitor has logged."""
    return mapping(monitor_config(run).get("run"))


def optimizers_of(run: Run) -> dict[str, dict[str, Any]]:
    """Returns the settings of each optimizer by name, which is empty for a single one."""
    found = mapping(monitor_config(run).get("optimizer"))
    if "class" in found:
        return {"": found}
    return {name: mapping(each) for name, each in found.items() if isinstance(each, dict)}


def mapping(value: object) -> dict[str, Any]:
    """Returns a dict, or an empty one for any other value in a config."""
    return value if isinstance(value, dict) else {}


def format_duration(seconds: float) -> str:
    """Returns a duration in its two largest units.

    Example:
        >>> format_duration(2.34), format_duration(75), format_duration(90_000)
        ('2.3 s', '1 min 15 s', '1 d 1 h')
    """
    if seconds < 60:
        return f"{seconds:.2g} s"
    units = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))
    first = next(place for place, (_, size) in enumerate(units) if seconds >= size)
    (name, size), (smaller, part) = units[first], units[first + 1]
    return f"{seconds // size:.0f} {name} {seconds % size // part:.0f} {smaller}"


def format_count(number: int) -> str:
    """Returns a large number in millions or billions.

    Example:
        >>> format_count(1234), format_count(124_439_808), format_count(7_000_000_000)
        ('1,234', '124.4 M', '7 B')
    """
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.4g} {letter}"
    return f"{number:,}"
