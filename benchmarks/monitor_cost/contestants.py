"""The arms of the part `step`: torch's own step, the plain read, our measurements, the peers."""

from dataclasses import dataclass

import torch
import wandb

from benchmarks.monitor_cost.peers import Weights, composer, olmo
from benchmarks.monitor_cost.plain_read import plain_read
from benchmarks.monitor_cost.results import (
    ALL,
    COMPOSER,
    EAGER,
    HEADLINE,
    HISTOGRAMS,
    OLMO,
    OURS,
    READ,
    STEP,
    STEP_AGAIN,
    WATCH,
)
from benchmarks.monitor_cost.tensors import Named
from benchmarks.monitor_cost.timing import Work
from lightning_adam import AdamStatistics

WATCHED_AT_MOST = 500_000_000
"""Elements: `wandb.watch` takes seconds for each hundred million, and has no arm beyond."""


@dataclass
class Timed:
    """Something to time."""

    work: Work
    without: Work | None = None
    """What is taken off: the same without what the arm is about."""
    start: Work | None = None
    """The same without waiting for the device."""


def arms_of(named: Named, optimizer: torch.optim.AdamW) -> dict[str, Timed]:
    statistics = {
        HEADLINE: AdamStatistics("headline"),
        ALL: AdamStatistics("all"),
        HISTOGRAMS: AdamStatistics("all"),
        EAGER: AdamStatistics("all", kernel="eager"),
    }

    def measure(name: str) -> Work:
        def work() -> None:
            statistics[name].update(optimizer, histograms=name == HISTOGRAMS)
            statistics[name].compute()
            if name == HISTOGRAMS:
                statistics[name].compute_exponents()

        return work

    def start(name: str) -> Work:
        return lambda: statistics[name].update(optimizer, histograms=name == HISTOGRAMS)

    arms = {
        READ: Timed(plain_read(optimizer)),
        STEP: Timed(optimizer.step),
        STEP_AGAIN: Timed(optimizer.step),
        **{name: Timed(measure(name), start=start(name)) for name in OURS},
        COMPOSER: Timed(lambda: composer(named, optimizer)),
        OLMO: Timed(lambda: olmo(named, optimizer)),
    }
    if sum(parameter.numel() for _, parameter in named) <= WATCHED_AT_MOST:
        watched, plain = (Weights(parameter for _, parameter in named) for _ in range(2))
        wandb.watch(watched, log="all", log_freq=1)
        arms[WATCH] = Timed(watched.train_once, plain.train_once)
    return arms
