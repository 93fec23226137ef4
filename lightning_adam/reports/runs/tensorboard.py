"""Reads an event file of TensorBoard.

Each number is an event. The events of a key differ only in time, step and value, so one event is
decoded for each key and for each step, and the others are recognized by their bytes. This halves
the time of a long run.
"""

import struct
from collections.abc import Callable
from pathlib import Path

from lightning_adam._compat.tensorboard import (
    TEXT,
    TIME_BYTES,
    DecodeError,
    Event,
    event_class,
    records,
    step_bytes,
)
from lightning_adam.config.errors import ConfigError
from lightning_adam.reports.keys import is_tensor
from lightning_adam.reports.runs.part import TIME, RunPart
from lightning_adam.statistics.histograms import Histogram

FLOAT = struct.Struct("<f")
VALUE = b"\x15"
"""The byte before the value, at the end of an event with one number."""


def read(file: Path, has_read: Callable[[int], object]) -> RunPart:
    """Reads an event file up to where it is cut.

    Args:
        file: The file.
        has_read: Called with the number of bytes that were read since the last call.

    Raises:
        ConfigError: If neither tensorboard nor tensorboardX is installed.
    """
    part = RunPart(file, "TensorBoard")
    kind = event_class()
    if kind is None:
        raise ConfigError(
            f"{file} cannot be read: neither tensorboard nor tensorboardX is installed",
            "Run pip install tensorboard",
        )
    decode = kind.FromString
    known: dict[bytes, int] = {}
    """The number of a key by the bytes between step and value."""
    step, before, start = 0, VALUE, 0
    damaged = False
    for record in records(file, has_read):
        if record is None:
            part.has_end = False
            break
        try:
            if not record.startswith(before, TIME_BYTES):
                event = decode(record)
                if event.WhichOneof("what") != "summary":
                    continue
                step, before = event.step, step_bytes(event.step)
                start = TIME_BYTES + len(before)
                part.add(step, {TIME: event.wall_time})
            middle = record[start : -FLOAT.size]
            number = known.get(middle)
            if number is None:
                key = _read_values(part, decode(record), record)
                if key:
                    known[middle] = part.keys[key]
                continue
        except (DecodeError, LookupError, OverflowError, ValueError):
            damaged = True
            continue
        part.numbers.append(number)
        part.steps.append(step)
        part.values.append(FLOAT.unpack(record[-FLOAT.size :])[0])
    if damaged:
        part.notes.append(f"{part.name}: {file.name} is damaged; the rest is shown.")
    return part


def _read_values(part: RunPart, event: Event, record: bytes) -> str | None:
    """Adds the values of an event, and returns its key if it is one number at the record's end."""
    values = event.summary.value
    for value in values:
        kind, key = value.WhichOneof("value"), value.tag
        if kind == "simple_value":
            # Lightning adds these two.
            if key == "epoch" or (key == "hp_metric" and value.simple_value == -1):
                continue
            part.add(event.step, {key: value.simple_value})
            if len(values) == 1 and record.endswith(VALUE + FLOAT.pack(value.simple_value)):
                return str(key)
        elif kind == "histo" and key.startswith("adam_histogram/"):
            counts, limits = map(int, value.histo.bucket), list(value.histo.bucket_limit)
            part.add_histogram(event.step, key, Histogram([*counts], [limits[0] - 1, *limits]))
        elif kind == "tensor" and key.endswith(TEXT) and is_tensor(key.removesuffix(TEXT)):
            name = value.tensor.string_val[0].decode(errors="replace")
            part.add_tensor(event.step, key.removesuffix(TEXT), name)
    return None
