"""A flight recorder's file: the steps before a training blew up, and which layer went first."""

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
"""What a row tells: of the model or of a layer at one step."""
ALONE = 30.0
"""How many times as much as the others' a layer's gradient has grown if it is said to have moved
first. Calibrated: on healthy runs of CNNs, MLPs and a GPT layers stay below it."""

EVIDENCE = ("scope", "optimizer", STEP, "layer", "nonfinite_count", "grad_rms")
"""What tells which layer went first."""

Row = dict[str, str | float | None]


class Step(NamedTuple):
    """One step of an optimizer."""

    x: int
    """On the x-axis of what is logged."""
    number: int
    optimizer: str
    """Empty if it is the only one."""
    loss: float | None
    measurement: Measurement


def write(file: Path, steps: Sequence[Step]) -> list[Row]:
    """Writes a row of the model and one of each layer for every step, and never a part of a file.

    A statistic that is undefined is left empty; NaN and infinities stand as `nan` and `inf`. The
    column `optimizer` is there only if there are several.

    Args:
        file: Where to; its folder is made.
        steps: The steps, in their order.

    Returns:
        Of each row what `went_first` has to know.
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
    # What is derived of another is let go with it.
    measurement = step.measurement.renewed()
    for scope in (Scope.model, Scope.layer):
        for told in measurement.table(scope):
            row: Row = {X_AXIS: step.x, STEP: step.number, "optimizer": step.optimizer}
            row |= {"loss": step.loss, "scope": scope.value}
            row.update(told)
            yield row


def went_first(rows: Iterable[Row], modules: Sequence[str]) -> str:
    """The layer that went first, as a sentence; empty where it cannot be told.

    Of layers in which something is not finite, those of the first step that has any count; of
    several the one nearest to the output, for gradients flow back from there. If that are all, or
    none, it is the layer whose gradient is the first to outgrow those of the others.

    Args:
        rows: What `write` returned.
        modules: The paths of the modules, those of the input first.

    Example:
        >>> rows = [
        ...     {"scope": "layer", "optimizer": "", STEP: 7, "layer": name, "nonfinite_count": bad}
        ...     for name, bad in (("0", 0.0), ("1", 4.0))
        ... ]
        >>> went_first(rows, ["", "0", "1"])
        'layer 1 went first: nonfinite_count=4 at step 7'
    """
    steps = [_Layers.of(rows) for rows in _by_step(rows)]
    order = {name: place for place, name in enumerate(modules)}
    for index, layers in enumerate(steps):
        broken = [name for name, row in layers.rows.items() if row.get("nonfinite_count")]
        if len(broken) == len(layers.rows) and broken:
            # All at once: what tells is before.
            steps = steps[:index]
            break
        if broken:
            last = max(broken, key=lambda name: order.get(name, -1))
            count = layers.rows[last]["nonfinite_count"]
            return f"layer {last} went first: nonfinite_count={count:.0f} at {layers.step}"
    return _moved_first(steps)


class _Layers(NamedTuple):
    """What the layers did at a step of an optimizer."""

    step: str
    optimizer: object
    rows: dict[str, Row]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "_Layers":
        named = {str(row["layer"]): row for row in rows if row["scope"] == "layer"}
        of = f" of {rows[0]['optimizer']}" if rows[0]["optimizer"] else ""
        return cls(f"step {rows[0][STEP]}{of}", rows[0]["optimizer"], named)

    def grad_rms(self) -> dict[str, float]:
        """Of the layers that have one, and not of 0."""
        told = {name: row.get("grad_rms") for name, row in self.rows.items()}
        return {name: float(value) for name, value in told.items() if value}


def _by_step(rows: Iterable[Row]) -> Iterator[list[Row]]:
    for _, each in itertools.groupby(rows, key=lambda row: (row["optimizer"], row[STEP])):
        yield list(each)


def _moved_first(steps: Sequence[_Layers]) -> str:
    grads = [each.grad_rms() for each in steps]
    usual: dict[tuple[object, str], list[float]] = {}
    for layers, grad_rms in zip(steps, grads, strict=True):
        for name, value in grad_rms.items():
            usual.setdefault((layers.optimizer, name), []).append(value)
    medians = {key: median(values) for key, values in usual.items()}
    for layers, grad_rms in zip(steps, grads, strict=True):
        grown = {name: value / medians[layers.optimizer, name] for name, value in grad_rms.items()}
        if len(grown) > 1:
            first = max(grown, key=grown.__getitem__)
            others = median(value for name, value in grown.items() if name != first)
            if grown[first] > ALONE * max(others, 1.0):
                times = f"{grown[first]:.3g} times its median"
                moved = f"layer {first} moved first: grad_rms={grad_rms[first]:.3g}"
                return f"{moved}, {times}, at {layers.step}"
    return ""
