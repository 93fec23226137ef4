"""`RunPart`: the content of one log file; a resumed run may have several."""

import csv
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lightning_adam.findings.finding import Finding
from lightning_adam.monitor.log_keys import FINDINGS, FLIGHT_RECORDER, TENSOR, X_AXIS
from lightning_adam.reports.keys import read_key
from lightning_adam.reports.runs.run import Event, Run, Series
from lightning_adam.statistics.catalogue import STATISTICS, key_part
from lightning_adam.statistics.histograms import Histogram

TIME = "_timestamp"
"""The key of the Unix time of a row."""
UNREADABLE = (OSError, ValueError, LookupError, TypeError, csv.Error, yaml.YAMLError)
"""Errors of reading a damaged file."""


class RunPart:
    """The content of one log file.

    Args:
        file: The file of a logger.
        source: The name of the logger.
    """

    def __init__(self, file: Path, source: str) -> None:
        self.file = file
        self.source = source
        self.identity = str(file.parent)
        """The same for all parts of a run."""
        self.name = "/".join(file.parent.parts[-2:])
        self.folder = file.parent
        """The folder with the files of the monitor."""
        self.config: dict[str, Any] = {}
        self.keys: dict[str, int] = {}
        """Numbers the keys in order of appearance."""
        self.numbers, self.steps, self.values = array("q"), array("q"), array("d")
        """For each value: the number of its key, the step and the value."""
        self.histograms: dict[str, dict[int, Histogram]] = {}
        self.tensors: dict[str, dict[int, str]] = {}
        self.notes: list[str] = []
        self.has_end: bool | None = None
        """Whether the file is complete; None if the format has no end marker."""

    def add(self, step: int, row: Mapping[str, float]) -> None:
        """Adds the numbers of a row by key."""
        self.numbers.extend([self.keys.setdefault(key, len(self.keys)) for key in row])
        self.values.extend(row.values())
        self.steps.extend(array("q", [step]) * len(row))

    def add_tensor(self, step: int, key: str, name: str) -> None:
        """Adds the name of the tensor with one of the largest values."""
        self.tensors.setdefault(key.removesuffix(TENSOR), {})[step] = name

    def add_histogram(self, step: int, key: str, histogram: Histogram) -> None:
        """Adds a histogram."""
        self.histograms.setdefault(key, {})[step] = histogram

    def seconds(self) -> float:
        """Returns the time from the first to the last row; 0 if times are not logged."""
        if TIME not in self.keys:
            return 0.0
        return float(np.ptp(np.asarray(self.values)[np.asarray(self.numbers) == self.keys[TIME]]))


def join(parts: Sequence[RunPart]) -> Run:
    """Joins the parts of a run in order. The later of two rows for the same step is used."""
    first, last = parts[0], parts[-1]
    config: dict[str, Any] = {}
    histograms: dict[str, dict[int, Histogram]] = {}
    tensors: dict[str, dict[int, str]] = {}
    notes = [note for part in parts for note in part.notes]
    stored: list[dict[str, Any]] = []
    events: list[Event] = []
    for folder in dict.fromkeys(part.folder for part in parts):
        merge(config, _read_hparams(folder, first.name, notes))
        stored.append(_read_findings(folder, first.name, notes))
        events += _read_events(folder, first.name, notes)
    for part in parts:
        merge(config, part.config)
        merge(histograms, part.histograms)
        merge(tensors, part.tensors)
    series = series_of(parts)
    times = series.pop(TIME, None)
    has_ended = last.has_end or stored[-1].get("has_ended", last.has_end is None)
    if last.has_end is False or not has_ended:
        rows = f"shown up to step {max(last.steps):,}" if last.steps else "it has no rows yet"
        notes.append(f"{first.name} is still running, or was interrupted: {rows}.")
    timed = sum(part.seconds() for part in parts)
    return Run(
        name=first.name,
        path=first.file.parent,
        config=config,
        series=series,
        histograms=histograms,
        notes=notes,
        events=sorted(events, key=lambda event: event.step),
        findings=_join_findings([each["findings"] for each in stored if each]),
        tensors=tensors,
        source=first.source,
        times=times,
        seconds=max(timed, sum(each.get("seconds", 0.0) for each in stored)) or None,
        measurements=max(
            _count_measurements(series), sum(each.get("measurements", 0) for each in stored)
        )
        or None,
        has_ended=has_ended,
    )


def series_of(parts: Sequence[RunPart]) -> dict[str, Series]:
    """Returns the values of each key sorted by step."""
    keys: dict[str, int] = {}
    renumbered = []
    for part in parts:
        new = np.array([keys.setdefault(key, len(keys)) for key in part.keys], dtype=np.int64)
        renumbered.append(new[np.asarray(part.numbers)])
    numbers = np.concatenate(renumbered)
    steps = np.concatenate([np.asarray(part.steps) for part in parts])
    order = np.lexsort((steps, numbers))
    values = np.concatenate([np.asarray(part.values) for part in parts])[order]
    numbers, steps = numbers[order], steps[order]
    is_last = np.append((np.diff(numbers) != 0) | (np.diff(steps) != 0), True)[: len(order)]
    numbers, steps, values = numbers[is_last], steps[is_last], values[is_last]
    bounds = np.searchsorted(numbers, range(1, len(keys)))
    pieces = zip(np.split(steps, bounds), np.split(values, bounds), strict=True)
    return {key: Series(*piece) for key, piece in zip(keys, pieces, strict=False)}


def values_by_key(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a layer table's row by key. A row without a layer is the model."""
    scope = f"optimizer/{key_part(row['optimizer'])}/" if row.get("optimizer") else ""
    scope += f"layer/{key_part(row['layer'])}/" if row["layer"] else ""
    return {
        STATISTICS[name].key_of(scope): float(value)
        for name, value in row.items()
        if name in STATISTICS and value not in (None, "")
    }


def merge(target: dict[Any, Any], update: Mapping[Any, Any]) -> None:
    """Updates nested dicts. Lists and values are replaced."""
    for key, value in update.items():
        if isinstance(value, dict):
            target[key] = target[key] if isinstance(target.get(key), dict) else {}
            merge(target[key], value)
        else:
            target[key] = value


def _join_findings(parts: Sequence[Sequence[Finding]]) -> list[Finding] | None:
    """Returns the findings of all parts. A later part replaces the same finding of earlier ones."""
    found = {
        (each.step, each.code, each.scope, each.optimizer): each for part in parts for each in part
    }
    return [*sorted(found.values(), key=lambda each: each.step)] if parts else None


def _count_measurements(series: Mapping[str, Series]) -> int:
    """Returns the number of steps with logged statistics, summed over optimizers."""
    found: dict[str, int] = {}
    for key, each in series.items():
        _, statistic, scope = read_key(key)
        if statistic is not None:
            found[scope.optimizer] = max(found.get(scope.optimizer, 0), len(each.steps))
    return sum(found.values())


class _PlainLoader(yaml.SafeLoader):
    """Loads objects of any class as plain values."""


def _construct_plain(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    # A class or a function has only a name.
    return node.value or suffix.rpartition(":")[2]


_PlainLoader.add_multi_constructor("", _construct_plain)


def _read_hparams(folder: Path, name: str, notes: list[str]) -> dict[Any, Any]:
    file = folder / "hparams.yaml"
    try:
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        hparams = yaml.load(text, _PlainLoader)
    except UNREADABLE:
        notes.append(f"{name}: its {file.name} could not be read, so it has no config.")
        return {}
    return hparams if isinstance(hparams, dict) else {}


def _read_findings(folder: Path, name: str, notes: list[str]) -> dict[str, Any]:
    """Returns the content of the findings file; empty if there is none."""
    file = folder / f"{FINDINGS}.json"
    try:
        if not file.exists():
            return {}
        stored = json.loads(file.read_text(encoding="utf-8"))
        return {**stored, "findings": [Finding.of_row(row) for row in stored["findings"]]}
    except UNREADABLE:
        notes.append(f"{name}: its {file.name} could not be read.")
        return {}


def _read_events(folder: Path, name: str, notes: list[str]) -> Iterable[Event]:
    for file in sorted(folder.glob(f"{FLIGHT_RECORDER}/step_*.csv")):
        try:
            yield _event(file)
        except UNREADABLE:
            notes.append(f"{name}: the flight recorder's {file.name} could not be read.")


def _event(file: Path) -> Event:
    _, step, reason = file.stem.split("_", 2)
    rows = RunPart(file, "")
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            rows.add(int(row[X_AXIS]), values_by_key(row))
    return Event(int(step), reason, series_of([rows]))
