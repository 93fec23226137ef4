"""Writes a file of the flight recorder, and finds the layer that diverged first."""

import csv
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from lightning_adam.config.monitor import Scope
from lightning_adam.monitor.log_keys import X_AXIS
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.statistics.measurement import Measurement

STEP = "optimizer_step"
COLUMNS = (X_AXIS, STEP, "optimizer", "loss", "scope", "layer", *STATISTICS)
"""The columns of a file. Each row describes the model or a layer at one step."""
MIN_GROWTH = 30.0
"""A layer diverged first if its gradient has grown this many times more than that of the others.
Calibrated: layers of CNNs, MLPs and a GPT stay below it in healthy runs."""

EVIDENCE = ("scope", "optimizer", STEP, "layer", "nonfinite_count", "grad_rms")
"""The columns that `first_diverging_layer` reads."""

Row = dict[str, str | float | None]


class Step(NamedTuple):
    """One step of an optimizer."""

    x: int
    """The logged step."""
    number: int
    optimizer: str
    """Empty if it is the only one."""
    loss: float | None
    measurement: Measurement


def write(file: Path, steps: Sequence[Step]) -> list[Row]:
    """Writes one row for the model and one for each layer at every step.

    The file is complete as soon as it exists. Undefined statistics are empty; NaN and infinities
    are `nan` and `inf`. The column `optimizer` is only written if there are several.

    Args:
        file: The file; its folder is created.
        steps: The steps in order.

    Returns:
        The `EVIDENCE` columns of each row.
    """
    has_names = any(step.optimizer for step in steps)
    columns = [each for each in COLUMNS if has_names or each != "optimizer"]
    evidence = []
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8", newline="") as lines:
            writer = csv.DictWriter(lines, columns, extrasaction="ignore")
            writer.writeheader()
            for row in itertools.chain.from_iterable(map(_rows, steps)):
                writer.writerow(row)
                evidence.append({name: row.get(name) for name in EVIDENCE})
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    return evidence


def _rows(step: Step) -> Iterator[Row]:
    # A copy, so that the derived statistics are freed after each step.
    measurement = step.measurement.copy()
    for scope in (Scope.model, Scope.layer):
        for statistics in measurement.table(scope):
            row: Row = {X_AXIS: step.x, STEP: step.number, "optimizer": step.optimizer}
            row |= {"loss": step.loss, "scope": scope.value}
            row.update(statistics)
            yield row


def first_diverging_layer(rows: Iterable[Row], modules: Sequence[str]) -> str:
    """Returns a sentence on the layer that diverged first; empty if there is none.

    This is the first layer with NaN or infinite elements. If several have them at the same step, it
    is the one nearest to the output, because gradients flow back from there. If all layers have
    them at once, or none, it is the first layer with a gradient that outgrows the others.

    Args:
        rows: The rows that `write` returned.
        modules: The paths of the modules, from input to output.

    Example:
        >>> rows = [
        ...     {"scope": "layer", "optimizer": "", STEP: 7, "layer": name, "nonfinite_count": bad}
        ...     for name, bad in (("0", 0.0), ("1", 4.0))
        ... ]
        >>> first_diverging_layer(rows, ["", "0", "1"])
        'layer 1 diverged first: nonfinite_count=4 at step 7'
    """
    steps = [_Layers.of(rows) for rows in _by_step(rows)]
    order = {name: place for place, name in enumerate(modules)}
    for index, layers in enumerate(steps):
        broken = [name for name, row in layers.rows.items() if row.get("nonfinite_count")]
        if len(broken) == len(layers.rows) and broken:
            # All layers at once: search the earlier steps.
            steps = steps[:index]
            break
        if broken:
            last = max(broken, key=lambda name: order.get(name, -1))
            count = layers.rows[last]["nonfinite_count"]
            return f"layer {last} diverged first: nonfinite_count={count:.0f} at {layers.step}"
    return _first_growing_layer(steps)


class _Layers(NamedTuple):
    """The layers at a step of an optimizer."""

    step: str
    optimizer: object
    rows: dict[str, Row]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "_Layers":
        named = {str(row["layer"]): row for row in rows if row["scope"] == "layer"}
        of = f" of {rows[0]['optimizer']}" if rows[0]["optimizer"] else ""
        return cls(f"step {rows[0][STEP]}{of}", rows[0]["optimizer"], named)

    def grad_rms(self) -> dict[str, float]:
        """The `grad_rms` of the layers in which it is not 0."""
        found = {name: row.get("grad_rms") for name, row in self.rows.items()}
        return {name: float(value) for name, value in found.items() if value}


def _by_step(rows: Iterable[Row]) -> Iterator[list[Row]]:
    for _, each in itertools.groupby(rows, key=lambda row: (row["optimizer"], row[STEP])):
        yield list(each)


def _first_growing_layer(steps: Sequence[_Layers]) -> str:
    grads = [each.grad_rms() for each in steps]
    by_layer: dict[tuple[object, str], list[float]] = {}
    for layers, grad_rms in zip(steps, grads, strict=True):
        for name, value in grad_rms.items():
            by_layer.setdefault((layers.optimizer, name), []).append(value)
    medians = {key: median(values) for key, values in by_layer.items()}
    for layers, grad_rms in zip(steps, grads, strict=True):
        grown = {name: value / medians[layers.optimizer, name] for name, value in grad_rms.items()}
        if len(grown) > 1:
            first = max(grown, key=grown.__getitem__)
            others = median(value for name, value in grown.items() if name != first)
            if grown[first] > MIN_GROWTH * max(others, 1.0):
                times = f"{grown[first]:.3g} times its median"
                grew = f"layer {first} grew first: grad_rms={grad_rms[first]:.3g}"
                return f"{grew}, {times}, at {layers.step}"
    return ""
