"""Writes files of runs, and reads them with W&B's reader for comparison."""

import math
import struct
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger
from wandb.proto import wandb_internal_pb2

from lightning_adam.reports.runs import Run, Series, read_runs
from tests.support.commands import GLOBAL_STEP, history, records

OWN = ("_step", "_runtime", "_timestamp", "epoch", GLOBAL_STEP)
"""The keys that a logger adds to a row."""
KEY = "adam_update/update_norm"
LAYER_KEY = "adam_update/layer/{}/update_norm"
BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
IDENTIFIER = b":W&B\xe1\xbe\0"
Values = dict[str, dict[int, float | str]]
"""Numbers by key and step, with NaN as text because it is not equal to itself."""


def write_wandb(
    folder: Path,
    rows: Iterable[Mapping[str, Any]],
    *,
    run_id: str = "run",
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    updates: Iterable[Mapping[str, Any]] = (),
) -> Path:
    """Writes an offline run with W&B's client, and returns its .wandb file.

    Parts of a resumed run share their id. `updates` are later changes of the config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    quick = wandb.Settings(
        silent=True, x_disable_stats=True, x_disable_meta=True, console="off", save_code=False
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WANDB_DATA_DIR", str(folder))
        run = wandb.init(
            mode="offline",
            dir=folder,
            project="tests",
            id=run_id,
            name=name,
            config=dict(config or {}),
            settings=quick,
        )
        for update in updates:
            run.config.update(dict(update), allow_val_change=True)  # type: ignore[no-untyped-call]
        for row in rows:
            run.log(dict(row))
        run.finish()
    file = Path(run.dir).parent / f"run-{run_id}.wandb"
    wait_for_end(file)
    return file


def write_csv(
    folder: Path,
    rows: Iterable[tuple[int, Mapping[str, float]]],
    hparams: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a run with Lightning's CSVLogger, and returns its metrics.csv."""
    logger = CSVLogger(folder)
    logger.log_hyperparams(dict(hparams or {}))
    for step, row in rows:
        logger.log_metrics(dict(row), step)
    logger.save()
    return Path(logger.log_dir) / "metrics.csv"


def only(*paths: Path) -> Run:
    (run,) = read_runs(paths)
    return run


def to_dict(run: Run) -> Values:
    return {
        key: dict(zip(series.steps.tolist(), map(comparable, series.values.tolist()), strict=True))
        for key, series in run.series.items()
    }


def values_in(rows: Iterable[Mapping[str, Any]]) -> Values:
    """Returns the numbers in rows of W&B's reader."""
    found: Values = {}
    for row in rows:
        numbers = {key: float(value) for key, value in row.items() if _is_number(value)}
        step = int(numbers.get(GLOBAL_STEP, numbers["_step"]))
        for key in numbers.keys() - set(OWN):
            found.setdefault(key, {})[step] = comparable(numbers[key])
    return found


def wandb_values(file: Path) -> Values:
    return values_in(history(file.parent))


def comparable(value: float) -> float | str:
    return "nan" if math.isnan(value) else value


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number or value in ("NaN", "Infinity", "-Infinity")


def histogram(counts: Sequence[int], edges: Sequence[float]) -> wandb.Histogram:
    return wandb.Histogram(np_histogram=(np.asarray(counts), np.asarray(edges)))


class Chunk(NamedTuple):
    """A chunk of a .wandb file: a header of 7 bytes, and its data."""

    start: int
    end: int
    kind: int


def chunks_of(content: bytes) -> list[Chunk]:
    """Returns the chunks of a .wandb file. The last one may be incomplete."""
    found = []
    place = 7
    while place + 7 <= len(content):
        left = BLOCK - place % BLOCK
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        found.append(Chunk(place, place + 7 + length, kind))
        place += 7 + length
    return found


def wandb_content(
    rows: Sequence[Mapping[str, str]], config: Mapping[tuple[str, ...], str] | None = None
) -> bytes:
    """Returns the content of a .wandb file with only a config and rows of JSON values."""
    content = bytearray(IDENTIFIER)
    entries = [wandb_internal_pb2.Record() for _ in rows]  # type: ignore[attr-defined]
    for record, row in zip(entries, rows, strict=True):
        for key, value in row.items():
            record.history.item.add(nested_key=[key], value_json=value)
    if config:
        entries.append(wandb_internal_pb2.Record())  # type: ignore[attr-defined]
        for names, value in config.items():
            entries[-1].config.update.add(nested_key=names, value_json=value)
    for record in entries:
        data, kind = record.SerializeToString(), FIRST
        while kind in (FIRST, MIDDLE):
            left = BLOCK - len(content) % BLOCK
            if left < 7:
                content += bytes(left)
                left = BLOCK
            part, data = data[: left - 7], data[left - 7 :]
            if not data:
                kind = FULL if kind == FIRST else LAST
            typed = bytes([kind]) + part
            content += struct.pack("<IH", zlib.crc32(typed), len(part)) + typed
            kind = MIDDLE if kind == FIRST else kind
    return bytes(content)


def has_ended(file: Path) -> bool:
    content = file.read_bytes()
    (*_, parts) = _parts_by_record(content)
    data = b"".join(content[start + 7 : end] for start, end, _ in parts)
    if not parts or parts[-1].kind not in (FULL, LAST) or parts[-1].end != len(content):
        return False
    record = wandb_internal_pb2.Record.FromString(data)  # type: ignore[attr-defined]
    return bool(record.HasField("exit"))


def wait_for_end(file: Path) -> None:
    """Waits until the client has written the file, some milliseconds after the end of a run."""
    deadline = time.monotonic() + 60
    while not has_ended(file):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _parts_by_record(content: bytes) -> list[list[Chunk]]:
    found: list[list[Chunk]] = [[]]
    for chunk in chunks_of(content):
        if chunk.kind in (FULL, FIRST):
            found.append([])
        found[-1].append(chunk)
    return found[1:] or found


class Record(NamedTuple):
    """An entry of a run in W&B's reader, and its chunks."""

    entry: dict[str, Any]
    chunks: list[Chunk]


def records_of(file: Path) -> list[Record]:
    pairs = zip(records(file.parent), _parts_by_record(file.read_bytes()), strict=True)
    return [Record(*pair) for pair in pairs]


def rows_of(found: Sequence[Record]) -> list[dict[str, Any]]:
    return [entry["history"]["item"] for entry, _ in found if "history" in entry]


def run_of(
    series: Mapping[str, Mapping[int, float]],
    name: str = "run",
    config: dict[str, Any] | None = None,
) -> Run:
    """Returns a run in memory."""
    return Run(name, Path(name), config or {}, {k: series_of(v) for k, v in series.items()}, {}, [])


def series_of(values: Mapping[int, float]) -> Series:
    steps = sorted(values)
    return Series(
        np.array(steps, dtype=np.int64),
        np.array([values[step] for step in steps], dtype=np.float64),
    )
