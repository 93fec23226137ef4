"""Searches in this process, with functions in the place of training runs."""

import math
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import OmegaConf

from lightning_adam.config.tune import Direction, TuneConfig
from lightning_adam.tune.archive import Archive
from lightning_adam.tune.plan import Plan, read_plan
from lightning_adam.tune.point import Point
from lightning_adam.tune.search import Begun, Search
from lightning_adam.tune.story import Step, Trial
from tests.support.commands import REPOSITORY

DEFAULT = Point(
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.01,
    decoupled_weight_decay=True,
    amsgrad=False,
    warmup_ratio=0.0,
)
LR = {"lr": {"space": {"lr": {"low": 1e-5, "high": 1e-1}}}}

Objective = Callable[[Point, int], float]
"""Returns the metric of a point and a seed, or raises."""


def shipped_stages() -> dict[str, Any]:
    """Returns the stages as they are in the wheel."""
    file = REPOSITORY / "conf/lightning_adam/tune/default.yaml"
    return OmegaConf.to_container(OmegaConf.load(file))  # type: ignore[return-value]


def plan_of(stages: Mapping[str, Any] | None = None, **changes: Any) -> Plan:
    """Makes a plan of these stages, by default of those in the wheel."""
    config = TuneConfig(direction=Direction.minimize, study_name="search")
    stages = shipped_stages() if stages is None else stages
    return read_plan({**vars(config), "stages": stages, **changes})


def search_of(plan: Plan, start: Point = DEFAULT, archive: Archive | None = None) -> Search:
    archive = archive or archive_of(plan)
    return Search(plan, start, archive, range(plan.n_seeds))


def archive_of(plan: Plan) -> Archive:
    return Archive(f"journal:{uuid.uuid4()}.journal", plan.study_name, plan.direction)


def run_out(search: Search, objective: Objective) -> list[list[Begun]]:
    """Runs a search to its end, and returns its batches."""
    batches = []
    while batch := search.next_batch():
        for begun in batch:
            end(search.archive, begun, objective)
        batches.append(batch)
    return batches


def end(archive: Archive, begun: Begun, objective: Objective) -> None:
    assert begun.seed is not None
    try:
        value = objective(begun.point, begun.seed)
    except RuntimeError as error:
        archive.fail(begun.stage, begun.number, str(error), seconds=1.0)
    else:
        archive.finish(begun.stage, begun.number, value, seconds=1.0)


def steps_of(search: Search) -> list[Step]:
    way, _ = search.look()
    return [each.step for each in way.stages]


def trials_of(search: Search) -> list[Trial]:
    _, trials = search.look()
    return trials


def skipped(search: Search) -> dict[str, str]:
    """Returns the stages that were skipped, and why."""
    way, _ = search.look()
    return way.skipped


def bowl(point: Point, seed: int) -> float:
    """Returns a metric that is smallest at lr 3e-3, betas 0.8 and 0.99, and weight_decay 0.1."""
    assert point.betas is not None
    assert point.weight_decay is not None
    beta1, beta2 = point.betas
    return (
        math.log10(point.lr / 3e-3) ** 2
        + 0.3 * math.log10((1 - beta1) / 0.2) ** 2
        + 0.2 * math.log10((1 - beta2) / 0.01) ** 2
        + 0.1 * math.log10(max(point.lr * point.weight_decay, 1e-12) / 3e-4) ** 2
        + 0.1 * ((point.warmup_ratio or 0.0) - 0.1) ** 2
        + 0.05 * bool(point.amsgrad)
        + 1e-9 * seed
    )
