"""Converts an inspection to a run with a single step, for the report page."""

from typing import Any

import numpy as np

from lightning_adam.optim.param_groups import peak_lr
from lightning_adam.reports.inspection.inspection import InspectedOptimizer, Inspection
from lightning_adam.reports.inspection.measurements import UNDERFLOWED
from lightning_adam.reports.runs import Run, Series
from lightning_adam.reports.summary import CHECKPOINT
from lightning_adam.statistics.histograms import fold, percentiles
from lightning_adam.statistics.names import group_names


def run_of(inspection: Inspection) -> Run:
    """Returns a run with one step, with the keys and the config of AdamMonitor."""
    checkpoint, optimizers = inspection.checkpoint, inspection.optimizers
    step = checkpoint.step
    if step is None:
        step = max((step for each in optimizers for step in each.steps), default=0)
    values: dict[str, float] = {}
    counts: dict[str, list[int]] = {}
    for optimizer in optimizers:
        measurement = optimizer.last_step.measurement
        values |= measurement.values()
        counts |= measurement.exponent_counts()
    counts = {key: each for key, each in counts.items() if not key.endswith("/grad")}
    values |= percentiles(counts)
    settings = {each.saved.name: _settings(each) for each in optimizers}
    elements = [each.numel() for one in optimizers for each in one.last_step.states.parameter]
    return Run(
        name=checkpoint.path.name,
        path=checkpoint.path,
        config={
            "lightning_adam": {
                "optimizer": settings.get("", settings),
                "run": {"parameters": sum(elements)},
            }
        },
        series={
            key: Series(np.array([step], dtype=np.int64), np.array([value], dtype=np.float64))
            for key, value in values.items()
            if not key.endswith(UNDERFLOWED.name)
        },
        histograms={key: {step: fold(each)} for key, each in counts.items()},
        notes=[f"Not inspected: {each}." for each in inspection.not_inspected]
        + [
            f"Optimizer {each.saved.name}: {note}" if each.saved.name else note
            for each in optimizers
            for note in each.saved.notes
        ],
        findings=[finding for each in optimizers for finding in each.findings],
        source=CHECKPOINT,
        measurements=1,
    )


def _settings(optimizer: InspectedOptimizer) -> dict[str, Any]:
    saved = optimizer.saved
    groups = {
        name: {key: _plain(group[key]) for key in saved.optimizer.defaults if key in group}
        | {"lr": float(peak_lr(group))}
        for name, group in zip(group_names(saved.groups), saved.groups, strict=True)
    }
    first = next(iter(groups.values()))
    return {"class": saved.class_name, **first, "param_groups": groups}


def _plain(value: Any) -> Any:
    """Returns a setting as AdamMonitor logs it, with tensors converted to numbers."""
    if isinstance(value, list | tuple):
        return [*map(_plain, value)]
    return value.item() if hasattr(value, "item") else value
