"""Reads an event file of TensorBoard."""

from collections.abc import Callable
from pathlib import Path

from lightning_adam._compat.tensorboard import TEXT, DecodeError, Event, event_class, records
from lightning_adam.config.errors import ConfigError
from lightning_adam.reports.keys import is_tensor
from lightning_adam.reports.runs.part import TIME, RunPart
from lightning_adam.statistics.histograms import Histogram


def read(file: Path, has_read: Callable[[int], object]) -> RunPart:
    """Reads an event file up to the point where it is cut.

    Args:
        file: The file.
        has_read: Called with the number of bytes read since the last call.

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
    damaged = False
    for record in records(file, has_read):
        if record is None:
            part.has_end = False
            break
        try:
            _read_event(part, kind.FromString(record))
        except (DecodeError, LookupError, OverflowError, ValueError):
            damaged = True
    if damaged:
        part.notes.append(f"{part.name}: {file.name} is damaged; the rest is shown.")
    return part


def _read_event(part: RunPart, event: Event) -> None:
    row = {}
    for value in event.summary.value:
        kind, key = value.WhichOneof("value"), value.tag
        # Lightning logs these two itself.
        is_own = key == "epoch" or (key == "hp_metric" and value.simple_value == -1)
        if kind == "simple_value" and not is_own:
            row[key] = value.simple_value
        elif kind == "histo" and key.startswith("adam_histogram/"):
            counts, limits = map(int, value.histo.bucket), list(value.histo.bucket_limit)
            part.add_histogram(event.step, key, Histogram([*counts], [limits[0] - 1, *limits]))
        elif kind == "tensor" and key.endswith(TEXT) and is_tensor(key.removesuffix(TEXT)):
            name = value.tensor.string_val[0].decode(errors="replace")
            part.add_tensor(event.step, key.removesuffix(TEXT), name)
    if row and part.steps[-1:].tolist() != [event.step]:
        row[TIME] = event.wall_time
    part.add(event.step, row)
