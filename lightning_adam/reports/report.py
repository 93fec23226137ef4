"""The report: a single HTML page with the summary and the charts of runs, which works offline."""

import base64
import gzip
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_adam.config.errors import ConfigError, format_value
from lightning_adam.findings import RULES
from lightning_adam.findings.describe import format_numbers
from lightning_adam.reports.charts import (
    LOSS,
    SECTIONS,
    VALIDATION,
    Chart,
    ChartKind,
    Settings,
    is_logarithmic,
    thresholds,
)
from lightning_adam.reports.comparison import TOLERANCE, config_differences, first_difference
from lightning_adam.reports.downsampling import (
    BUCKETS,
    COLUMNS,
    downsample_minmax,
    grid,
    octave_shares,
    pack,
)
from lightning_adam.reports.keys import BASES, Scope, read_key
from lightning_adam.reports.runs import Run, Series
from lightning_adam.reports.summary import (
    CHECKPOINT,
    MAIN_SETTINGS,
    Issue,
    issues_of,
    key_facts,
    mapping,
    metrics_of,
    monitor_config,
    optimizers_of,
    settings_of,
    verdict_of,
)
from lightning_adam.statistics.catalogue import STATISTICS, SYMBOLS, key_part
from lightning_adam.statistics.histograms import Histogram
from lightning_adam.version import __version__

MAX_CELLS = 300_000
"""Largest number of cells in all heat maps of layers together."""
MAX_TIMES = 500
"""Largest number of wall-clock times of a run."""
MAX_PINNED_METRICS = 3
"""Number of validation metrics that are always visible."""

Logged = TypeVar("Logged")
"""A series, or the histograms of a key."""


class IndexedRun(NamedTuple):
    """A run, with its series and histograms by key without scope."""

    run: Run
    series: dict[str, list[tuple[str, Scope, Series]]]
    histograms: dict[str, list[tuple[str, Scope, dict[int, Histogram]]]]


def write_report(runs: Sequence[Run], file: Path, refresh: float | None = None) -> None:
    """Writes the page of one or several runs.

    Args:
        runs: The runs, see `read_runs`. Several runs are compared with the first one.
        file: The file to write. An existing file is replaced.
        refresh: Seconds after which an open page reloads itself while a run is training (default:
            None, never).

    Raises:
        ConfigError: If no run has anything that AdamMonitor logs, or the file cannot be written.

    Example:
        >>> write_report([Run("baseline", Path("baseline"), {}, {}, {}, [])], Path("report.html"))
        ... # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        lightning_adam.config.errors.ConfigError: baseline: no run has keys ...
    """
    if not any(run.is_monitored for run in runs):
        notes = " ".join(note for run in runs for note in run.notes)
        raise ConfigError(
            f"{', '.join(str(run.path) for run in runs)}: no run has keys that begin with adam_",
            f"Train with callbacks=[AdamMonitor()]. {notes}".rstrip(" ."),
        )
    try:
        # Replaced at once, so that a browser never reads an incomplete page. Names may contain
        # invalid Unicode.
        unfinished = file.with_name(f".{file.name}.unfinished")
        unfinished.write_bytes(page(runs, refresh).encode("utf-8", errors="backslashreplace"))
        os.replace(unfinished, file)
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be written: {error.strerror}",
            "Use for example -o report.html",
        ) from error


def page(runs: Sequence[Run], refresh: float | None = None) -> str:
    """Returns the page of one or several runs as HTML."""
    names = labels(runs)
    monitored = {metric.name for run in runs for metric in metrics_of(run)}
    sections = {title: _charts(charts, runs, monitored) for title, charts in SECTIONS.items()}
    indexed = [IndexedRun(run, _by_base(run.series), _by_base(run.histograms)) for run in runs]
    overview = [chart.id for chart in sections["Overview"]]
    drawn = {
        chart.id: _chart_settings(chart, runs) | data | {"isOverview": chart.id in overview}
        for chart in itertools.chain.from_iterable(sections.values())
        if any((data := CHART_DATA[chart.kind](chart, indexed)).values())
    }
    issues = [issues_of(run.findings or []) for run in runs]
    return (
        page_templates("lightning_adam.reports")
        .get_template("page.html")
        .render(
            version=__version__,
            symbols=SYMBOLS,
            statistics=STATISTICS,
            tolerance=TOLERANCE,
            buckets=BUCKETS,
            columns=COLUMNS,
            runs=runs,
            labels=names,
            verdicts=[*map(verdict_of, runs)],
            facts=[*map(key_facts, runs)],
            settings=[*map(settings_of, runs)],
            issues=issues,
            chart_of=partial(_chart_of, drawn),
            differences=config_differences(runs),
            first_differences=_first_differences(runs),
            sections=sections,
            places={
                chart.id: place for place, chart in enumerate(itertools.chain(*sections.values()))
            },
            is_checkpoint=all(run.source == CHECKPOINT for run in runs),
            drawn=drawn,
            numbers=format_numbers,
            format_value=format_value,
            data={
                "runs": [
                    _times(run) | {"name": name} for name, run in zip(names, runs, strict=True)
                ],
                "charts": drawn,
                "findings": _intervals(issues),
                "events": [
                    {"run": place, "step": event.step, "reason": event.reason}
                    for place, run in enumerate(runs)
                    for event in run.events
                ],
                "refresh": refresh,
            },
            plotly=plotly_bundle(),
        )
    )


def page_templates(package: str) -> Environment:
    """Returns the templates in the folder `page` of a package, with autoescaping."""
    return Environment(
        loader=PackageLoader(package, "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def plotly_bundle() -> str:
    """Returns Plotly's bundle of Cartesian charts, compressed and in base64."""
    bundle = files("lightning_adam.reports") / "page" / "plotly-cartesian.min.js"
    return base64.b64encode(gzip.compress(bundle.read_bytes(), mtime=0)).decode("ascii")


def _charts(charts: Sequence[Chart], runs: Sequence[Run], monitored: Set[str]) -> list[Chart]:
    """Returns the charts of a section, with one for each loss and metric that the module logs.

    Monitored metrics come first.
    """
    logged = dict.fromkeys(key for run in runs for key in run.series)
    found = []
    for chart in charts:
        keys = [key for key in logged if chart is LOSS and LOSS.draws(key)]
        if chart is VALIDATION:
            # The monitored metric may have any name.
            others = {key for key in monitored if not LOSS.draws(key)}
            keys = [key for key in logged if chart.draws(key) or key in others]
        order = sorted(keys, key=lambda key: (key not in monitored, key))
        found += [chart.of_key(key) for key in order[:MAX_PINNED_METRICS]] or [chart]
        found += [chart.of_key(key, is_pinned=False) for key in order[MAX_PINNED_METRICS:]]
    return found


def _chart_settings(chart: Chart, runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the settings and reference lines of a chart for page.js."""
    fixed = [each for each in chart.references if not each.code]
    lines: dict[tuple[str, float], dict[str, Any]] = {}
    for place, run in enumerate(runs):
        own = monitor_config(run)
        settings = [Settings.of(each) for each in optimizers_of(run).values()] or [Settings()]
        rules = thresholds(chart.id, mapping(own.get("findings")))
        for each in [*fixed, *rules]:
            for value in {each.at(known) for known in settings}:
                if not math.isnan(value):
                    entry = {"label": each.label, "value": value, "code": each.code, "runs": []}
                    lines.setdefault((each.label, value), entry)["runs"].append(place)
    base = {"id": chart.id, "kind": chart.kind.value, "unit": chart.unit, "isLog": chart.is_log}
    return base | {"title": chart.title, "references": [*lines.values()]}


def _chart_of(drawn: Mapping[str, Any], issue: Issue) -> str:
    """Returns the id of the chart that shows an issue; empty if there is none."""
    is_inner = issue.worst.scope.startswith(("layer/", "tensor/"))
    statistics = {each["statistic"] for each in drawn.get("layers", {}).get("maps", [])}
    if is_inner and issue.statistic in statistics:
        return "layers"
    return issue.statistic if issue.statistic in drawn else ""


def _times(run: Run) -> dict[str, Any]:
    """Returns steps and seconds since the first one; None if times are not logged."""
    if run.times is None or len(run.times.steps) < 2:
        return {"times": None}
    every = -(-len(run.times.steps) // MAX_TIMES)
    # The last step is always included.
    steps = [*run.times.steps[:-1:every], run.times.steps[-1]]
    values = [*run.times.values[:-1:every], run.times.values[-1]]
    seconds = [round(float(each - values[0]), 3) for each in values]
    return {"times": {"steps": [*map(int, steps)], "seconds": seconds}}


def _intervals(issues: Sequence[Sequence[Issue]]) -> list[dict[str, Any]]:
    """Returns the interval in which each warning and error was open."""
    return [
        {
            "run": place,
            "code": each.code,
            "optimizer": each.optimizer,
            "severity": issue.worst.severity.value,
            "statistics": _statistics(issue),
            # The first optimizer step is logged at 0.
            "start": each.step - 1,
            "end": None if each.closed is None else each.closed - 1,
        }
        for place, of_run in enumerate(issues)
        for issue in of_run
        for each in issue.findings
        if each.is_above_info and not each.is_notice
    ]


def _statistics(issue: Issue) -> list[str]:
    """Returns the statistics with charts that show an issue."""
    rule = RULES.get(issue.worst.code)
    return [*dict.fromkeys(filter(None, [issue.statistic, *(rule.limits if rule else ())]))]


def labels(runs: Sequence[Run]) -> list[str]:
    """Returns distinct names of runs, with the main settings in which they differ.

    Example:
        >>> def run_of(lr):
        ...     config = {"lightning_adam": {"optimizer": {"class": "AdamW", "lr": lr}}}
        ...     return Run("run", Path(), config, {}, {}, [])
        >>> labels([run_of(0.1), run_of(0.2), run_of(0.2)])
        ['run (lr=0.1)', 'run (lr=0.2)', 'run (lr=0.2) #2']
    """
    optimizers = [mapping(monitor_config(run).get("optimizer")) for run in runs]
    differing = [
        name
        for name in MAIN_SETTINGS
        if any(each.get(name) != optimizers[0].get(name) for each in optimizers)
    ]
    found: list[str] = []
    for run, optimizer in zip(runs, optimizers, strict=True):
        shown = ", ".join(f"{name}={format_value(optimizer.get(name))}" for name in differing)
        label = f"{run.name} ({shown})" if shown else run.name
        numbered = (f"{label} #{number}" for number in itertools.count(2))
        found.append(next(each for each in itertools.chain([label], numbered) if each not in found))
    return found


def _first_differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns where each run first differs from the first run: at all, and notably."""
    return [
        {
            "exact": first_difference(runs[0], run, 0),
            "notable": first_difference(runs[0], run),
            "run": place,
        }
        for place, run in enumerate(runs[1:], start=1)
    ]


def _curves(chart: Chart, runs: Sequence[IndexedRun]) -> dict[str, Any]:
    """Returns a line for each run, key and scope."""
    lines = []
    for place, key, base, scope, series in _matching(chart, [each.series for each in runs]):
        if not scope.is_inner:
            shown = downsample_minmax(series)
            line: dict[str, Any] = {"run": place, "scope": str(scope) if base in BASES else None}
            # Percentiles of a quantity share a chart.
            line |= {"part": base.rpartition("_")[2] if "|" in chart.keys else ""}
            line |= {"steps": pack(shown.steps), "values": pack(shown.values)}
            if scope.kind == "worst":
                line["tensors"] = _tensors(runs[place].run, key, shown.steps.tolist())
            lines.append(line)
    return {"lines": lines}


def _tensors(run: Run, key: str, steps: Iterable[int]) -> dict[str, list[Any]]:
    """Returns the distinct tensors of a key's values, and the index of the tensor at each step."""
    by_step = run.tensors.get(key, {})
    names = [by_step.get(step, "") for step in steps]
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return {"names": [*places], "places": [places[name] for name in names]}


def _layers(chart: Chart, runs: Sequence[IndexedRun]) -> dict[str, Any]:
    """Returns the values by layer and step for each statistic and run."""
    maps = _layer_maps(chart, [each.series for each in runs])
    return {"maps": [{"run": place} | entry for place, entry in maps]}


def _events(chart: Chart, runs: Sequence[IndexedRun]) -> dict[str, Any]:
    """Returns the values by layer and step for each statistic and event."""
    events = [(place, event) for place, each in enumerate(runs) for event in each.run.events]
    maps = []
    for number, entry in _layer_maps(chart, [_by_base(event.series) for _, event in events]):
        place, event = events[number]
        maps.append({"run": place, "event": str(event)} | entry)
    return {"maps": sorted(maps, key=lambda entry: entry["run"])}


def _layer_maps(
    chart: Chart, logged: Sequence[Mapping[str, list[tuple[str, Scope, Series]]]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    found: dict[tuple[str, int, str], dict[str, Series]] = {}
    for place, _, base, scope, series in _matching(chart, logged):
        if scope.is_inner:
            found.setdefault((base, place, f"{scope.kind}s"), {})[str(scope)] = series
    columns = min(max(MAX_CELLS // max(sum(map(len, found.values())), 1), 20), COLUMNS)
    statistics = {each.key: each for each in STATISTICS.values()}
    order = [*statistics]
    for base, place, kind in sorted(found, key=lambda each: (order.index(each[0]), each[1:])):
        statistic, by_layer = statistics[base], found[base, place, kind]
        layers = sorted(by_layer, key=_natural_sort_key)
        steps, values = grid([by_layer[layer] for layer in layers], columns)
        entry: dict[str, Any] = {"statistic": statistic.name, "unit": statistic.unit, "scope": kind}
        entry |= {"meaning": statistic.meaning, "isLog": is_logarithmic(statistic)}
        yield place, entry | {"layers": layers, "steps": pack(steps), "values": pack(values)}


def _histograms(chart: Chart, runs: Sequence[IndexedRun]) -> dict[str, Any]:
    """Returns the fractions by octave and step for each quantity, scope and run."""
    maps = []
    for place, _, base, scope, by_step in _matching(chart, [each.histograms for each in runs]):
        steps, lowest, shares = octave_shares(by_step)
        entry = {"run": place, "scope": str(scope), "quantity": base.rpartition("/")[2]}
        entry |= {"eps": _eps_of(runs[place].run, scope), "lowest": lowest}
        entry |= {"steps": pack(steps), "shares": pack(shares)}
        maps.append(entry)
    return {"maps": maps}


def _eps_curves(chart: Chart, runs: Sequence[IndexedRun]) -> dict[str, Any]:
    """Returns the fraction of elements below each power of two at the last step of each run."""
    lines = []
    for place, _, _, scope, by_step in _matching(chart, [each.histograms for each in runs]):
        step = max(by_step)
        magnitudes = [2.0**edge for edge in by_step[step].log2_edges[1:]]
        shares = by_step[step].fractions_below(magnitudes)
        line = {"run": place, "scope": str(scope), "eps": _eps_of(runs[place].run, scope)}
        lines.append(line | {"step": step, "magnitudes": magnitudes, "shares": shares})
    return {"lines": lines}


CHART_DATA: dict[ChartKind, Callable[[Chart, Sequence[IndexedRun]], dict[str, Any]]] = {
    ChartKind.CURVES: _curves,
    ChartKind.LAYERS: _layers,
    ChartKind.EVENTS: _events,
    ChartKind.HISTOGRAM: _histograms,
    ChartKind.EPS_CURVE: _eps_curves,
}
"""Functions that return the data of a chart for page.js, by kind of chart."""


def _by_base(by_key: Mapping[str, Logged]) -> dict[str, list[tuple[str, Scope, Logged]]]:
    """Groups logged values by key without scope, sorted by scope."""
    found: dict[str, list[tuple[str, Scope, Logged]]] = {}
    for key, logged in by_key.items():
        base, _, scope = read_key(key)
        found.setdefault(base, []).append((key, scope, logged))
    for entries in found.values():
        entries.sort(key=lambda entry: [*map(_natural_sort_key, entry[1])])
    return found


def _matching(
    chart: Chart, logged: Iterable[Mapping[str, list[tuple[str, Scope, Logged]]]]
) -> Iterator[tuple[int, str, str, Scope, Logged]]:
    """Yields the values of a chart, with the index of the run, the key, its base and its scope."""
    for place, by_base in enumerate(logged):
        for base in sorted(filter(chart.draws, by_base)):
            for key, scope, values in by_base[base]:
                yield place, key, base, scope, values


def _natural_sort_key(key: str) -> list[tuple[int, str]]:
    """Returns a sort key that places net.2 before net.10."""
    return [
        (int(part or 0), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", key)
    ]


def _find_settings(settings: dict[str, Any], part: str) -> dict[str, Any]:
    """Returns the settings with a name, given as a part of a key."""
    found = (value for name, value in settings.items() if key_part(name) == part)
    return mapping(next(found, None))


def _eps_of(run: Run, scope: Scope) -> list[float]:
    """Returns the distinct eps of a scope in the config, without 0 because of the log axis."""
    optimizer = mapping(monitor_config(run).get("optimizer"))
    if scope.optimizer:
        optimizer = _find_settings(optimizer, scope.optimizer)
    groups = mapping(optimizer.get("param_groups"))
    chosen = [_find_settings(groups, scope.name)] if scope.kind == "group" else [*groups.values()]
    return sorted({float(group["eps"]) for group in chosen if group.get("eps")})
