"""The report of a search: `tune.md`, `tune.html` and `optimization_results.yaml`."""

import json
import logging
import math
import os
import re
import shlex
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from omegaconf import OmegaConf

from lightning_adam.config.errors import format_value
from lightning_adam.config.tune import PATH, TuneConfig
from lightning_adam.reports.report import page_templates, plotly_bundle
from lightning_adam.reports.summary import format_duration
from lightning_adam.tune.configuration import ConfigPaths, Configuration
from lightning_adam.tune.runs import Outcome, Run
from lightning_adam.tune.strategy import CONFIDENCE, Decision, Strategy
from lightning_adam.version import __version__

log = logging.getLogger(__name__)
_logged: set[str] = set()
"""Warnings that were logged already."""
MAX_LISTED = 4
"""Configurations to list per failure or finding."""
FILES = ("tune.md", "tune.html")


@dataclass(frozen=True)
class Table:
    """A table of a report."""

    title: str
    note: str
    """A sentence below the title; may be empty."""
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Report:
    """The contents of a report.

    Attributes:
        settings: The sweeper's config.
        runs: The runs in the order in which they were added, without those that are started again.
        strategy: The strategy of the search.
        decision: The result of the search so far.
        paths: Paths of the optimizer and the schedule in the app's config.
        arguments: The overrides that all runs share.
        is_seeded: Whether the runs are seeded.
    """

    settings: TuneConfig
    runs: Sequence[Run]
    strategy: Strategy
    decision: Decision
    paths: ConfigPaths
    arguments: Sequence[str]
    is_seeded: bool

    @property
    def line(self) -> str:
        """The overrides to use, quoted for a shell; empty if there are none."""
        return shlex.join([*self.arguments, *self._overrides(self.decision.chosen)])

    def best_value(self) -> str:
        """Returns the metric of the chosen configuration."""
        return self._metric(self._chosen_losses)

    def summary_lines(self, folder: str) -> list[str]:
        """Returns the lines to print at the end of a search."""
        before = self._metric(self.decision.start)
        files = [f"report: {shlex.quote(f'{folder}/{name}')}" for name in FILES]
        return [
            f"adam_tune: {before} -> {self.best_value()} in {self._budget_text()}",
            *files,
            f"overrides: {self.line}" if self.line else "overrides: none, the app's are kept",
        ]

    def sentences(self) -> list[str]:
        """Returns the result in sentences."""
        decision = self.decision
        seconds = format_duration(sum(each.seconds for each in self.runs))
        state = "is complete" if decision.is_over else "is in progress"
        name = self.settings.study_name
        sentences = [f"The search {name} {state}: {self._budget_text()}, {seconds} of training."]
        before, after = (self._metric(each) for each in (decision.start, decision.best))
        if decision.start:
            sentences.append(f"The configuration of the app has a metric of {before}.")
        if decision.best and decision.confidence is not None:
            fresh = [each for each in decision.best if each > 0]
            seeds = f" (mean of {len(fresh)} fresh seeds)" if fresh else " (one seed)"
            gain = self._gain()
            is_used = decision.chosen != self.strategy.start
            sentences.append(
                f"The best other configuration has {after}{seeds}{gain}, and is better with a"
                f" probability of {decision.confidence:.2f}: it is"
                f" {'used' if is_used else f'not used, as that is below {CONFIDENCE}'}."
            )
        first = self.runs[0] if self.runs else None
        if first and first.outcome is not Outcome.running and self._fixed_length_reason():
            sentences.append(f"All runs have the full length: {self._fixed_length_reason()}.")
        if not self.is_seeded:
            sentences.append("The runs are not seeded: the app's config has no seed.")
        space = self.strategy.space_of(self.runs)
        for dimension, end in space.at_an_end(self.decision.chosen) if decision.is_over else []:
            override = f"{PATH}.space.{dimension}.{end}=VALUE"
            sentences.append(
                f"{dimension} is at the {end} end of its range. To widen it, set {override}."
            )
        return sentences

    def tables(self) -> list[Table]:
        """Returns the tables of the report that have rows."""
        tables = [self._contributions(), self._runs(), self._failures(), self._findings()]
        return [each for each in tables if each.rows]

    def results(self) -> dict[str, Any]:
        """Returns the result as values; the first keys are those of hydra-optuna-sweeper."""
        decision = self.decision
        changed = self.paths.values(self.strategy.start, decision.chosen)
        return {
            "name": "optuna",
            "best_params": {
                path: list(value) if isinstance(value, tuple) else value
                for path, value in changed.items()
            },
            "best_value": self._mean(self._chosen_losses),
            "start_value": self._mean(decision.start),
            "gain": decision.gain,
            "standard_error": decision.standard_error,
            "confidence": decision.confidence,
            "is_complete": decision.is_over,
        }

    def _contributions(self) -> Table:
        start, chosen = self.strategy.start, self.decision.chosen
        space = self.strategy.space_of(self.runs)
        known = {
            name: f"{gain:.0%} ± {deviation:.0%}"
            for name, gain, deviation in self.strategy.contributions(self.runs)
        }
        rows = []
        for dimension in space.dimensions:
            values = [dimension.read(each, space.steps) for each in (start, chosen)]
            shown = ["none" if math.isinf(each) else f"{each:.4g}" for each in values]
            if dimension.name in known:
                rows.append((dimension.name, *shown, known[dimension.name]))
        if start.amsgrad != chosen.amsgrad:
            rows.append(("amsgrad", str(start.amsgrad), str(chosen.amsgrad), ""))
        note = (
            "The contribution of each change to the gain, as the Gaussian process estimates it for"
            " one change after the other, on a scale that compresses large losses. decay_timescale"
            " is 1 / (lr * weight_decay) in lengths of the run."
        )
        head = ("hyperparameter", "app", "chosen", "share of the gain")
        return Table("Hyperparameters", note, head, rows)

    def _runs(self) -> Table:
        rows = [
            (
                str(each.number),
                each.request.stage.value,
                f"{each.request.length:.3g}",
                self._changes(each.request.configuration),
                "" if each.seed is None else str(each.seed),
                "" if each.value is None else f"{each.value:.5g}",
                each.outcome.value,
                format_duration(each.seconds),
            )
            for each in self.runs
        ]
        head = ("run", "stage", "length", "configuration", "seed", "metric", "outcome", "time")
        note = "A length of 0.125 is an eighth of the steps, with a schedule of that length."
        return Table("Runs", note, head, rows)

    def _failures(self) -> Table:
        rows = self._grouped((each.error, each) for each in self.runs if each.error)
        return Table("Failures", "", ("error", "runs", "configurations"), rows)

    def _findings(self) -> Table:
        rows = self._grouped((code, each) for each in self.runs for code in each.findings)
        note = "Findings of AdamMonitor in the runs; see `lightning-adam explain`."
        return Table("Findings", note, ("finding", "runs", "configurations"), rows)

    def _grouped(self, pairs: Iterable[tuple[str, Run]]) -> list[Sequence[str]]:
        groups: dict[str, list[Run]] = {}
        for key, run in pairs:
            groups.setdefault(key, []).append(run)
        rows: list[Sequence[str]] = []
        for key, runs in groups.items():
            named = dict.fromkeys(self._changes(each.request.configuration) for each in runs)
            more = f"; and {len(named) - MAX_LISTED} more" if len(named) > MAX_LISTED else ""
            rows.append((key, str(len(runs)), "; ".join([*named][:MAX_LISTED]) + more))
        return rows

    def _changes(self, configuration: Configuration) -> str:
        changed = self.strategy.start.changes(configuration)
        changes = " ".join(
            f"{name}={format_value(value)}" for name, value in changed.items() if value is not None
        )
        return changes or "as configured"

    def _overrides(self, configuration: Configuration) -> list[str]:
        return self.paths.overrides(self.strategy.start, configuration)

    def _budget_text(self) -> str:
        over = [each for each in self.runs if each.outcome is not Outcome.running]
        used = sum(each.request.length for each in over)
        return f"{len(over)} runs, worth {used:.3g} of {self.settings.n_trials} full runs"

    def _gain(self) -> str:
        decision = self.decision
        if decision.gain is None or decision.standard_error is None:
            return ""
        return f", a gain of {decision.gain:.3g} ± {decision.standard_error:.2g}"

    def _fixed_length_reason(self) -> str:
        first = self.runs[0]
        if first.steps is None and not first.fixed_length:
            return "no Lightning Trainer of the app trains the tuned optimizer"
        return first.fixed_length

    @property
    def _chosen_losses(self) -> dict[int, float]:
        decision = self.decision
        return decision.start if decision.chosen == self.strategy.start else decision.best

    def _mean(self, losses_by_seed: dict[int, float]) -> float | None:
        """Returns the mean metric over the fresh seeds, or that of the first seed."""
        losses = [loss for seed, loss in losses_by_seed.items() if seed > 0]
        losses = losses or [*losses_by_seed.values()]
        mean = math.fsum(losses) / len(losses) if losses else math.inf
        return self.strategy.sign * mean if math.isfinite(mean) else None

    def _metric(self, losses_by_seed: dict[int, float]) -> str:
        mean = self._mean(losses_by_seed)
        return "no finite metric" if mean is None else f"{mean:.5g}"


def write_report(report: Report, folder: Path) -> None:
    """Writes the files of a report; each replaces the previous one atomically.

    An error is logged once and does not stop the search.

    Args:
        report: The report.
        folder: The folder of the search.
    """
    pages: dict[str, Callable[[], str]] = {
        "tune.md": lambda: markdown(report),
        "tune.html": lambda: html(report),
        "optimization_results.yaml": lambda: OmegaConf.to_yaml(report.results()),
    }
    for name, page in pages.items():
        # Two processes may write to the same folder.
        partial = folder / f".{name}.{uuid.uuid4().hex}"
        try:
            # A path may contain bytes that are not UTF-8.
            partial.write_bytes(page().encode("utf-8", errors="backslashreplace"))
            os.replace(partial, folder / name)
        except Exception as error:
            partial.unlink(missing_ok=True)
            message = f"adam_tune: {name} was not written ({type(error).__name__}: {error})"
            if message not in _logged:
                _logged.add(message)
                log.warning(message)


def markdown(report: Report) -> str:
    """Returns the report as Markdown. Its last line is the overrides to use."""
    parts = [f"# Adam tuning report: {_escape_markdown(report.settings.study_name)}"]
    parts.append(_escape_markdown(" ".join(report.sentences())))
    for table in report.tables():
        parts += [f"## {table.title}", *([table.note] if table.note else [])]
        lines = [table.head, ["---"] * len(table.head)]
        lines += [[_escape_markdown(cell) for cell in row] for row in table.rows]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    # Scripts read the last line, so nothing may follow it.
    parts += ["## Overrides", report.line or "none"]
    return "\n\n".join(parts) + "\n"


def html(report: Report) -> str:
    """Returns the report as a standalone HTML page with Optuna's figures."""
    return (
        page_templates("lightning_adam.tune")
        .get_template("tune.html")
        .render(
            report=report, version=__version__, figures=_figures(report), plotly=plotly_bundle()
        )
    )


def _figures(report: Report) -> list[Any]:
    """Returns Optuna's figures of the full runs as Plotly JSON; shorter runs are not comparable."""
    complete = [each for each in report.runs if each.value is not None and each.request.length == 1]
    if len(complete) < 2:
        return []
    space = report.strategy.space_of(report.runs)
    study = optuna.create_study(direction="minimize" if report.strategy.sign > 0 else "maximize")
    for run in complete:
        params, ranges = space.params(run.request.configuration, 1.0)
        del params["length"], ranges["length"]
        study.add_trial(optuna.create_trial(value=run.value, params=params, distributions=ranges))
    plots = optuna.visualization.plot_optimization_history, optuna.visualization.plot_slice
    return [json.loads(plot(study).to_json()) for plot in plots]


def _escape_markdown(text: str) -> str:
    """Escapes a text so that Markdown shows it unchanged, also in a table."""
    line = " ".join(text.split())
    line = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)
    # An underscore within a word, and brackets without a parenthesis, need no escape.
    return re.sub(r"[\\`*<>|~&]|_(?!\w)|(?<!\w)_|(?<=\])\(", r"\\\g<0>", line)
