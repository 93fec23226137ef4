"""The methods that are compared, all over the search space of the package.

Each is given its budget in full training runs, begins with the configuration of the app, and
returns the configuration that it chooses.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import optuna
import torch
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler

from lightning_adam.config.tune import SpaceConfig
from lightning_adam.tune.configuration import Configuration
from lightning_adam.tune.runs import Outcome, Request, Run
from lightning_adam.tune.space import Space
from lightning_adam.tune.strategy import Strategy

MAX_LOSS = 10.0
"""Larger losses and those of runs that diverged count as this; untrained apps are below it."""

PRIOR = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "decay_timescale": 3.0, "warmup_ratio": 0.1}
"""The center of PriorBand's prior."""


@dataclass(frozen=True)
class Problem:
    """What is tuned.

    Attributes:
        start: The configuration of the app.
        steps: Steps of a full run.
        train: The validation loss of a configuration, a replicate and a share of the steps.
    """

    start: Configuration
    steps: int
    train: Callable[[Configuration, int, float], float]

    @property
    def space(self) -> Space:
        return Space(self.start, SpaceConfig(), self.steps, search_eps=False)


Method = Callable[[Problem, int, int], Configuration]
"""The chosen configuration of a problem, a budget and a seed."""


def lightning_adam(problem: Problem, budget: int, seed: int) -> Configuration:
    """The search of `hydra/sweeper=adam_tune`, with its defaults."""
    strategy, runs = Strategy(problem.start, budget, SpaceConfig(), seed=seed), list[Run]()
    while (request := strategy.next_request(runs)) is not None:
        runs.append(_run(problem, request, len(runs)))
    return strategy.decide(runs).chosen


def _run(problem: Problem, request: Request, number: int) -> Run:
    loss = problem.train(request.configuration, request.replicate, request.length)
    if not math.isfinite(loss):
        return Run(request, number, Outcome.failed, steps=problem.steps)
    return Run(request, number, Outcome.complete, loss, steps=problem.steps)


def with_optuna(create_sampler: Callable[[int], BaseSampler]) -> Method:
    """A sampler of Optuna with its default options."""

    def method(problem: Problem, budget: int, seed: int) -> Configuration:
        space = problem.space
        names = [each.name for each in space.dimensions]
        distributions = {
            name: FloatDistribution(low, high)
            for name, low, high in zip(names, space.low, space.high, strict=True)
        }
        study = optuna.create_study(sampler=create_sampler(seed))
        x = space.coordinates(problem.start).tolist()
        study.enqueue_trial(dict(zip(names, x, strict=True)))
        configurations = []
        for number in range(budget):
            trial = study.ask(distributions)  # type: ignore[arg-type]
            sampled = np.array([trial.params[name] for name in names])
            configurations.append(space.configuration(sampled, 1.0) if number else problem.start)
            study.tell(trial, capped(problem.train(configurations[-1], 0, 1.0)))
        return configurations[study.best_trial.number]

    return method


def priorband(problem: Problem, budget: int, seed: int) -> Configuration:
    """PriorBand of NePS with its default options.

    Its shares are 1, 1/3 and 1/9. The configuration of the app takes the place of the first run,
    which is outside of all brackets.
    """
    try:
        neps = import_module("neps")
    except ImportError as error:
        hint = "priorband needs NePS: pip install neural-pipeline-search==0.17.0"
        raise ImportError(hint) from error
    space = problem.space
    names = [each.name for each in space.dimensions]
    attributes: dict[str, Any] = {}
    for each, low, high in zip(space.dimensions, space.low, space.high, strict=True):
        attributes[each.name] = neps.Float(
            float(low),
            float(high),
            prior=each.coordinate(PRIOR[each.name]),
            prior_confidence="medium",
        )
    attributes["share"] = neps.FloatFidelity(1 / 9.001, 1.0)
    pipeline_space = type("AdamSpace", (neps.PipelineSpace,), attributes)()
    np.random.seed(seed)
    torch.manual_seed(seed)
    algorithm = neps.algorithms.priorband(pipeline_space, sample_prior_first="highest_fidelity")
    search = neps.AskAndTell(algorithm)
    loss = capped(problem.train(problem.start, 0, 1.0))
    x = space.coordinates(problem.start).tolist()
    first = {**dict(zip(names, x, strict=True)), "share": 1.0}
    search.tell_custom(config_id="1_rung_2", config=first, result=loss)
    full, used = [(loss, problem.start)], 1.0
    while True:
        trial = search.ask()
        share = float(trial.config["share"])
        used += share
        if used > budget + 1e-6:
            return min(full, key=lambda each: each[0])[1]
        sampled = np.array([trial.config[name] for name in names])
        configuration = space.configuration(sampled, 1.0)
        # The timescale of the decay is in lengths of the run.
        shorter = replace(configuration, weight_decay=(configuration.weight_decay or 0.0) / share)
        loss = capped(problem.train(shorter, 0, share))
        search.tell(trial, loss)
        if share == 1.0:
            full.append((loss, configuration))


def capped(loss: float) -> float:
    """The loss, at most `MAX_LOSS`."""
    return loss if loss < MAX_LOSS else MAX_LOSS


METHODS: dict[str, Method] = {
    "lightning_adam": lightning_adam,
    "random": with_optuna(lambda seed: RandomSampler(seed)),
    "tpe": with_optuna(lambda seed: TPESampler(seed=seed)),
    "gp": with_optuna(lambda seed: GPSampler(seed=seed)),
    "priorband": priorband,
}
"""The methods by name."""
