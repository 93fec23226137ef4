"""Searches and their training runs, kept in files so that none is repeated."""

import hashlib
import json
import logging
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import optuna

from benchmarks.tuning.apps import APPS, DEFAULT, STARTS, train
from benchmarks.tuning.methods import METHODS, Problem, capped
from benchmarks.tuning.results import Losses
from lightning_adam.config.tune import SpaceConfig
from lightning_adam.tune import gaussian_process, space, strategy
from lightning_adam.tune.configuration import Configuration

FRESH_SEEDS = (1000, 1001, 1002, 1003)
"""Seeds that no search uses."""
REPLICATES = 10
"""A search with seed s uses 10 s and the nine seeds after it."""
CODE = b"".join(
    Path(str(each.__file__)).read_bytes() for each in (gaussian_process, space, strategy)
)
DIGEST = hashlib.sha256(CODE + repr(SpaceConfig()).encode()).hexdigest()[:12]
"""Of the package's search, which is repeated when it changes."""


class Store:
    """Values by key in a file of JSON lines that several processes append to.

    Args:
        file: Created if it does not exist. Lines that were cut are ignored.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._values: dict[str, Any] = {}
        self._offset = 0

    def compute(self, key: Sequence[Any], function: Callable[[], Any]) -> Any:
        """The value of a key, computed if the file has none."""
        if (name := json.dumps(key)) not in self._values:
            self._read()
        if name not in self._values:
            self._values[name] = function()
            # The line before may have been cut. One write is not mixed with another process's.
            line = f"\n{json.dumps({'key': name, 'value': self._values[name]})}\n"
            with self.file.open("ab", buffering=0) as file:
                file.write(line.encode())
        return self._values[name]

    def get(self, key: Sequence[Any]) -> Any:
        """The value of a key; None if there is none."""
        if not self._offset:
            self._read()
        return self._values.get(json.dumps(key))

    def _read(self) -> None:
        if not self.file.exists():
            return
        with self.file.open("rb") as file:
            file.seek(self._offset)
            complete, _, _ = file.read().rpartition(b"\n")
        self._offset += len(complete)
        for line in complete.splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            self._values[row["key"]] = row["value"]


@dataclass(frozen=True)
class Task:
    """One search."""

    app: str
    start: str
    method: str
    budget: int
    seed: int

    @property
    def key(self) -> list[Any]:
        """What the result depends on."""
        code = DIGEST if self.method == "lightning_adam" else ""
        return [*astuple(self), APPS[self.app].steps, asdict(STARTS[self.start]), code]


open_store = cache(Store)


def search(task: Task, folder: Path) -> dict[str, Any]:
    """Runs a search, and trains what it chose with fresh seeds."""
    runs, steps = open_store(folder / "runs.jsonl"), APPS[task.app].steps

    def loss(configuration: Configuration, seed: int, share: float = 1.0) -> float:
        key = [task.app, steps, asdict(configuration), seed, share]
        return float(runs.compute(key, lambda: train(task.app, configuration, seed, share)))

    def judge(configuration: Configuration) -> float:
        return statistics.fmean(capped(loss(configuration, seed)) for seed in FRESH_SEEDS)

    def replicate_loss(configuration: Configuration, replicate: int, share: float) -> float:
        return loss(configuration, REPLICATES * task.seed + replicate, share)

    def choose() -> dict[str, Any]:
        problem = Problem(STARTS[task.start], steps, replicate_loss)
        sampler_seed = len(STARTS) * task.seed + list(STARTS).index(task.start)
        chosen = METHODS[task.method](problem, task.budget, sampler_seed)
        return {"chosen": asdict(chosen), "loss": judge(chosen), "default": judge(DEFAULT)}

    found: dict[str, Any] = open_store(folder / "searches.jsonl").compute(task.key, choose)
    return found


def collect(tasks: Sequence[Task], folder: Path) -> tuple[Losses, dict[str, float]]:
    """The losses of the searches that are complete, and those of the defaults."""
    store, defaults = open_store(folder / "searches.jsonl"), dict[str, float]()
    losses: Losses = {}
    for task in sorted(tasks, key=lambda each: each.seed):
        found = store.get(task.key)
        row = losses.setdefault(task.app, {}).setdefault(task.start, {})
        cell = row.setdefault(f"{task.method} {task.budget}", [])
        cell.append(None if found is None else round(found["loss"], 6))
        if found is not None:
            defaults[task.app] = round(found["default"], 6)
    return losses, defaults


def quieten() -> None:
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("neps").setLevel(logging.ERROR)
