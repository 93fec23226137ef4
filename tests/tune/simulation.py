"""Searches with a function instead of training runs."""

from collections.abc import Callable, Sequence
from typing import Any

from lightning_adam.config.tune import TuneConfig
from lightning_adam.tune.configuration import ConfigPaths, Configuration
from lightning_adam.tune.report import Report
from lightning_adam.tune.runs import Outcome, Request, Run, Stage
from lightning_adam.tune.strategy import Strategy

START = Configuration(1e-3, (0.9, 0.999), 1e-8, 0.01, True, False, 0.0)
STEPS = 1000

Objective = Callable[[Request], float]


def ended(request: Request, number: int, value: float | None, **facts: Any) -> Run:
    """Returns a completed run, or a failed run without a value."""
    outcome = Outcome.failed if value is None else Outcome.complete
    return Run(request, number, outcome, value, **{"steps": STEPS, **facts})


def search(
    strategy: Strategy,
    objective: Objective,
    runs: Sequence[Run] = (),
    n_jobs: int = 1,
    **facts: Any,
) -> tuple[list[Run], int]:
    """Runs a search to its end, and returns its runs and the number of batches."""
    found, batches = list(runs), 0
    while True:
        first = len(found)
        while len(found) < first + n_jobs:
            request = strategy.next_request(found)
            if request is None:
                break
            found.append(Run(request, len(found), Outcome.running))
        if len(found) == first:
            return found, batches
        found[first:] = [
            ended(each.request, each.number, objective(each.request), **facts)
            for each in found[first:]
        ]
        batches += 1


def used(runs: Sequence[Run]) -> float:
    """Returns the cost of the runs, in full runs."""
    return sum(each.request.length for each in runs)


def of(runs: Sequence[Run], stage: Stage) -> list[Run]:
    return [each for each in runs if each.request.stage is stage]


def report_of(strategy: Strategy, runs: Sequence[Run], name: str = "mnist", **facts: Any) -> Report:
    """Returns the report of a search with the override `data=small one`."""
    given: dict[str, Any] = {"arguments": ["data=small one"], "is_seeded": True, **facts}
    return Report(
        settings=TuneConfig(study_name=name, n_trials=strategy.budget),
        runs=runs,
        strategy=strategy,
        decision=strategy.decide(runs),
        paths=ConfigPaths("optimizer", "scheduler"),
        **given,
    )
