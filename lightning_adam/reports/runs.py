"""A run read back: from an offline W&B run, or from the folder of Lightning's CSVLogger."""

import csv
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray
from tqdm import tqdm

from lightning_adam._compat.wandb import ConfigRecord, HistoryItem, is_log, records
from lightning_adam.config.errors import ConfigError
from lightning_adam.findings.finding import Finding
from lightning_adam.monitor.log_keys import FINDINGS, FLIGHT_RECORDER, LAYERS, TENSOR, X_AXIS
from lightning_adam.reports.keys import is_tensor
from lightning_adam.statistics.catalogue import STATISTICS, key_part
from lightning_adam.statistics.histograms import Histogram


class Series(NamedTuple):
    """A key's values over the steps, of which each stands once."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


class Event(NamedTuple):
    """What a flight recorder has written: the steps before a training blew up."""

    step: int
    """Of the optimizer."""
    reason: str
    series: dict[str, Series]
    """By key, of the model and of the layers."""

    def __str__(self) -> str:
        """How it is called in a choice of several.

        Example:
            >>> print(Event(1200, "loss_spike", {}))
            loss_spike at step 1,200
        """
        return f"{self.reason} at step {self.step:,}"


@dataclass(frozen=True)
class Run:
    """What a run has logged."""

    name: str
    path: Path
    config: dict[str, Any]
    series: dict[str, Series]
    """By key. The rows of layers' tables are here too, under the keys of their layers."""
    histograms: dict[str, dict[int, Histogram]]
    """By key and step."""
    notes: list[str]
    """What could not be read, a sentence each."""
    events: list[Event] = field(default_factory=list)
    """In the order of their steps."""
    findings: list[Finding] | None = None
    """In the order of their steps; None if nothing was looked for, or nothing kept."""
    tensors: dict[str, dict[int, str]] = field(default_factory=dict)
    """Names of the tensors with the largest values, by the values' key and step."""
    source: str = ""
    """The logger that has written it: `W&B`, `CSVLogger` or `TensorBoard`."""
    times: Series | None = None
    """Unix time in seconds by step; None if the logger stores none."""
    seconds: float | None = None
    """Wall time; None if it is not known."""
    measurements: int | None = None
    """How often AdamMonitor has measured; None if it is not known."""
    has_ended: bool = True
    """False while the run trains, or if it was killed."""

    @property
    def is_monitored(self) -> bool:
        """Whether AdamMonitor has logged anything."""
        logged = any(key.startswith("adam_") for key in [*self.series, *self.histograms])
        return logged or bool(self.events)


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Reads every run that is found at some places.

    Args:
        paths: Folders of runs, their .wandb or metrics.csv files, and folders with such below.

    Returns:
        The runs in the order of the paths; below a path, in that of their names. The parts of a W&B
        run that was resumed are one run, in which the later row of a step counts.

    Raises:
        ConfigError: If there is no run at one of the places.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> rows = ["step,train/loss", "0,0.5", "10,0.25", ""]
        >>> written = (folder / "metrics.csv").write_text(chr(10).join(rows))
        >>> (run,) = read_runs([folder])
        >>> [each.tolist() for each in run.series["train/loss"]]
        [[0, 10], [0.5, 0.25]]
    """
    files = dict.fromkeys(file for path in paths for file in _find(path))
    runs: dict[str, _Reading] = {}
    size = sum(file.stat().st_size for file in files)
    # None: only where somebody sits at a terminal.
    with tqdm(total=size, unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        for file in files:
            reading = _Reading(file, bar.update)
            (_read_csv if file.suffix == ".csv" else _read_wandb)(reading)
            runs.setdefault(reading.identity, reading).continue_with(reading)
    return [reading.run() for reading in runs.values()]


def _find(path: Path) -> list[Path]:
    if path.is_file() and (path.suffix == ".wandb" or path.name == "metrics.csv"):
        return [path.resolve()]
    if not path.exists():
        raise ConfigError(
            f"{path} does not exist",
            "Pass the folder that is printed when a run ends, such as wandb/offline-run-…, or a"
            " folder that contains runs",
        )
    # Resolved, so that a link, as W&B's latest-run, is not a second run.
    names = ("*.wandb", "metrics.csv")
    found = {each.resolve() for name in names for each in path.rglob(name) if each.is_file()}
    if not found:
        raise ConfigError(
            f"{path} contains no run: neither .wandb files of WandbLogger(offline=True) nor"
            " metrics.csv of CSVLogger",
            "Train with one of these loggers",
        )
    return sorted(found)


class _Reading:
    """A run while it is read."""

    def __init__(self, file: Path, has_read: Callable[[int], object]) -> None:
        self.file = file
        self.has_read = has_read
        """Is told how many more bytes are behind it."""
        self.identity = str(file)
        self.name = file.stem
        self.config: dict[str, Any] = {}
        self.keys: dict[str, int] = {}
        """Each key's number, in the order in which they came."""
        self.numbers, self.steps, self.values = array("q"), array("q"), array("d")
        """Of each value: its key's number, its step and itself."""
        self.histograms: dict[str, dict[int, Histogram]] = {}
        self.tensors: dict[str, dict[int, str]] = {}
        self.events: list[Event] = []
        self.findings: list[Finding] | None = None
        self.notes: list[str] = []
        self.has_ended = True

    def add(self, step: int, row: Mapping[str, float]) -> None:
        self.numbers.extend([self.keys.setdefault(key, len(self.keys)) for key in row])
        self.values.extend(row.values())
        self.steps.extend(array("q", [step]) * len(row))

    def add_tensor(self, step: int, key: str, name: str) -> None:
        self.tensors.setdefault(key.removesuffix(TENSOR), {})[step] = name

    def continue_with(self, other: "_Reading") -> None:
        if other is self:
            return
        _merge(self.config, other.config)
        renumbered = [self.keys.setdefault(key, len(self.keys)) for key in other.keys]
        self.numbers.extend([renumbered[number] for number in other.numbers])
        self.steps.extend(other.steps)
        self.values.extend(other.values)
        for key, histograms in other.histograms.items():
            self.histograms.setdefault(key, {}).update(histograms)
        for key, tensors in other.tensors.items():
            self.tensors.setdefault(key, {}).update(tensors)
        self.events += other.events
        # A training that is resumed goes on with the findings there were.
        self.findings = self.findings if other.findings is None else other.findings
        self.notes += other.notes
        self.has_ended = other.has_ended

    def run(self) -> Run:
        if not self.has_ended:
            rows = f"shown up to step {max(self.steps):,}" if self.steps else "it has no rows yet"
            self.notes.append(f"{self.name} has not ended, or was cut: {rows}.")
        return Run(
            name=self.name,
            path=self.file.parent,
            config=self.config,
            series=self.series(),
            histograms=self.histograms,
            notes=self.notes,
            events=sorted(self.events, key=lambda event: event.step),
            findings=self.findings,
            tensors=self.tensors,
        )

    def series(self) -> dict[str, Series]:
        """By key, in the order of the steps; of two values of a step the later counts."""
        numbers, steps = np.asarray(self.numbers), np.asarray(self.steps)
        order = np.lexsort((steps, numbers))
        numbers, steps, values = numbers[order], steps[order], np.asarray(self.values)[order]
        is_last = np.append((np.diff(numbers) != 0) | (np.diff(steps) != 0), True)[: len(order)]
        numbers, steps, values = numbers[is_last], steps[is_last], values[is_last]
        bounds = np.searchsorted(numbers, range(1, len(self.keys)))
        parts = zip(np.split(steps, bounds), np.split(values, bounds), strict=True)
        return {key: Series(*part) for key, part in zip(self.keys, parts, strict=False)}


def _merge(config: dict[str, Any], update: Mapping[str, Any]) -> None:
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            _merge(config[key], value)
        else:
            config[key] = value


def _read_wandb(reading: _Reading) -> None:
    """Reads a W&B run's file, as far as it goes."""
    if not is_log(reading.file):
        reading.notes.append(f"{reading.file}: nothing could be read; it is no W&B run, or empty.")
        return
    damaged = 0
    reading.has_ended = False
    for record in records(reading.file, reading.has_read):
        if record is None:
            damaged += 1
        elif record.HasField("history"):
            _read_row(reading, record.history.item)
        elif record.HasField("run"):
            run = record.run
            reading.identity = f"{run.entity}/{run.project}/{run.run_id}"
            reading.name = run.display_name or run.run_id
            _read_config(reading, run.config)
        elif record.HasField("config"):
            _read_config(reading, record.config)
        elif record.HasField("exit"):
            reading.has_ended = True
    reading.config.pop("_wandb", None)
    if damaged:
        where = "one place" if damaged == 1 else f"{damaged} places"
        reading.notes.append(f"{reading.name}: its file is damaged in {where}; the rest is shown.")
    _read_beside(reading, reading.file.parent / "files")


def _read_config(reading: _Reading, config: ConfigRecord) -> None:
    for item in config.update:
        value = json.loads(item.value_json)
        for name in reversed([item.key] if item.key else item.nested_key):
            value = {name: value}
        _merge(reading.config, value)


def _read_row(reading: _Reading, items: Iterable[HistoryItem]) -> None:
    row: dict[str, float] = {}
    tensors: dict[str, str] = {}
    others: dict[str, dict[str, Any]] = {}
    for item in items:
        names = [item.key] if item.key else item.nested_key
        if is_tensor(names[0]):
            tensors[names[0]] = str(json.loads(item.value_json))
            continue
        try:
            row[names[0] if len(names) == 1 else ".".join(names)] = float(item.value_json)
        except ValueError:
            others.setdefault(names[0], {})[names[-1]] = json.loads(item.value_json)
    step = int(row.pop(X_AXIS, row.get("_step", 0)))
    for own in ("_step", "_runtime", "_timestamp", "epoch"):
        row.pop(own, None)
    reading.add(step, row)
    for key, name in tensors.items():
        reading.add_tensor(step, key, name)
    for key, fields in others.items():
        if fields.get("_type") == "histogram":
            counted = Histogram(fields["values"], fields["bins"])
            reading.histograms.setdefault(key, {})[step] = counted
        elif fields.get("_type") == "table-file" and key == LAYERS:
            _read_layers(reading, reading.file.parent / "files" / fields["path"])


def _read_layers(reading: _Reading, file: Path) -> None:
    """Reads a piece of the layers' table into the keys of the layers."""
    try:
        rows = _layer_rows(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError):
        reading.notes.append(f"{reading.name}: a table of layers could not be read: {file.name}.")
        return
    for step, measured in rows:
        reading.add(step, measured)


def _layer_rows(table: dict[str, Any]) -> list[tuple[int, dict[str, float]]]:
    """The step and the numbers by key of every row."""
    rows = (dict(zip(table["columns"], cells, strict=True)) for cells in table["data"])
    return [(int(row[X_AXIS]), _measured(row)) for row in rows]


def _measured(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row, by key; one without a layer is of the whole model."""
    scope = f"optimizer/{key_part(row['optimizer'])}/" if row.get("optimizer") else ""
    scope += f"layer/{key_part(row['layer'])}/" if row["layer"] else ""
    return {
        STATISTICS[name].key_of(scope): float(value)
        for name, value in row.items()
        if name in STATISTICS and value not in (None, "")
    }


def _read_beside(reading: _Reading, folder: Path) -> None:
    """Reads the findings in a run's folder, and what a flight recorder has left there."""
    file = folder / f"{FINDINGS}.json"
    try:
        if file.exists():
            stored = json.loads(file.read_text(encoding="utf-8"))
            reading.findings = [Finding.of_row(row) for row in stored["findings"]]
    except (OSError, ValueError, LookupError, TypeError):
        reading.notes.append(f"{reading.name}: its {file.name} could not be read.")
    for file in sorted(folder.glob(f"{FLIGHT_RECORDER}/step_*.csv")):
        try:
            reading.events.append(_event(file))
        except (OSError, ValueError, LookupError, TypeError, csv.Error):
            reading.notes.append(
                f"{reading.name}: the flight recorder's {file.name} could not be read."
            )


def _event(file: Path) -> Event:
    _, step, reason = file.stem.split("_", 2)
    rows = _Reading(file, lambda size: None)
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            rows.add(int(row[X_AXIS]), _measured(row))
    return Event(int(step), reason, rows.series())


def _read_csv(reading: _Reading) -> None:
    """Reads the folder of a CSVLogger, as far as its lines are whole."""
    folder = reading.file.parent
    reading.name = "/".join(folder.parts[-2:])
    _read_hparams(reading, folder / "hparams.yaml")
    incomplete = 0
    with reading.file.open(encoding="utf-8", errors="replace", newline="") as lines:
        rows = map(_cells, _whole_lines(reading, lines))
        names = next(rows, [])
        if "step" not in names:
            reading.notes.append(f"{reading.file}: nothing could be read; it has no column step.")
            return
        for row in rows:
            step = row[names.index("step")] if len(row) == len(names) else ""
            if not re.fullmatch("[0-9]{1,18}", step):
                incomplete += 1
                continue
            numbers = {}
            for name, cell in zip(names, row, strict=True):
                if is_tensor(name) and cell:
                    reading.add_tensor(int(step), name, cell)
                elif name not in ("step", "epoch") and _is_number(cell):
                    numbers[name] = float(cell)
            reading.add(int(step), numbers)
    if incomplete or not _ends_a_line(reading.file):
        reading.notes.append(f"{reading.name}: its file has lines that are cut; the rest is shown.")
    _read_beside(reading, folder)


def _whole_lines(reading: _Reading, lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        reading.has_read(len(line))
        if line.endswith("\n"):
            yield line


def _cells(line: str) -> list[str]:
    """A line by itself: a quote that damage has left open ends with it."""
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _ends_a_line(file: Path) -> bool:
    with file.open("rb") as content:
        content.seek(-1, os.SEEK_END)
        return content.read() == b"\n"


def _read_hparams(reading: _Reading, file: Path) -> None:
    try:
        hparams = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (yaml.YAMLError, ValueError, OSError):
        reading.notes.append(f"{reading.name}: its {file.name} could not be read; no config then.")
        return
    reading.config = hparams if isinstance(hparams, dict) else {}
