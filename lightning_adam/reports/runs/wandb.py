"""Reads the .wandb file of an offline W&B run."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning_adam._compat.wandb import ConfigRecord, HistoryItem, is_log, records
from lightning_adam.monitor.log_keys import LAYERS, X_AXIS
from lightning_adam.reports.keys import is_tensor
from lightning_adam.reports.runs.part import TIME, UNREADABLE, RunPart, merge, values_by_key
from lightning_adam.statistics.histograms import Histogram


def read(file: Path, has_read: Callable[[int], object]) -> RunPart:
    """Reads a .wandb file up to the point where it is cut.

    Args:
        file: The file.
        has_read: Called with the number of bytes read since the last call.
    """
    part = RunPart(file, "W&B")
    part.identity, part.name, part.folder = str(file), file.stem, file.parent / "files"
    if not is_log(file):
        part.notes.append(f"{file}: nothing could be read; it is empty, or not a run of W&B.")
        return part
    damaged = 0
    part.has_end = False
    for record in records(file, has_read):
        if record is None:
            damaged += 1
        elif record.HasField("history"):
            _read_row(part, record.history.item)
        elif record.HasField("run"):
            run = record.run
            part.identity = f"{run.entity}/{run.project}/{run.run_id}"
            part.name = run.display_name or run.run_id
            _read_config(part, run.config)
        elif record.HasField("config"):
            _read_config(part, record.config)
        elif record.HasField("exit"):
            part.has_end = True
    part.config.pop("_wandb", None)
    if damaged:
        places = "one place" if damaged == 1 else f"{damaged} places"
        part.notes.append(f"{part.name}: its file is damaged in {places}; the rest is shown.")
    return part


def _read_config(part: RunPart, config: ConfigRecord) -> None:
    for item in config.update:
        value = json.loads(item.value_json)
        for name in reversed([item.key] if item.key else item.nested_key):
            value = {name: value}
        merge(part.config, value)


def _read_row(part: RunPart, items: Iterable[HistoryItem]) -> None:
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
    if X_AXIS not in row:
        row.pop(TIME, None)
    step = int(row.pop(X_AXIS, row.get("_step", 0)))
    for own in ("_step", "_runtime", "epoch"):
        row.pop(own, None)
    part.add(step, row)
    for key, name in tensors.items():
        part.add_tensor(step, key, name)
    for key, fields in others.items():
        if fields.get("_type") == "histogram":
            part.add_histogram(step, key, Histogram(fields["values"], fields["bins"]))
        elif fields.get("_type") == "table-file" and key == LAYERS:
            _read_layers(part, part.folder / fields["path"])


def _read_layers(part: RunPart, file: Path) -> None:
    """Reads a layer table into the keys of the layers."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        rows = [dict(zip(table["columns"], cells, strict=True)) for cells in table["data"]]
        for step, numbers in [(int(row[X_AXIS]), values_by_key(row)) for row in rows]:
            part.add(step, numbers)
    except UNREADABLE:
        part.notes.append(f"{part.name}: a table of layers could not be read: {file.name}.")
