"""What one measurement costs on inputs that are not healthy, relative to a healthy one."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.monitor_cost.results import HEALTHY
from benchmarks.monitor_cost.timing import Work, seconds
from benchmarks.quiet import progress
from lightning_adam import AdamStatistics

ELEMENTS = 1_000_000
Change = Callable[[nn.Parameter, dict[str, Any]], None]


def _keep(weight: nn.Parameter, state: dict[str, Any]) -> None:
    """A healthy state."""


def _no_gradient(weight: nn.Parameter, state: dict[str, Any]) -> None:
    """As after hundreds of steps without a gradient: m sticks at the smallest number."""
    state["exp_avg"].fill_(2.0**-149)
    weight.grad = torch.zeros_like(weight)


def _nan(weight: nn.Parameter, state: dict[str, Any]) -> None:
    weight.grad.view(-1)[0] = torch.nan  # type: ignore[union-attr]


def _zero_start(weight: nn.Parameter, state: dict[str, Any]) -> None:
    weight.data.zero_()


INPUTS: dict[str, tuple[Change, torch.dtype, dict[str, Any]]] = {
    HEALTHY: (_keep, torch.float32, {}),
    "no gradient for a while": (_no_gradient, torch.float32, {}),
    "one NaN": (_nan, torch.float32, {}),
    "eps 1e-16": (_keep, torch.float32, {"eps": 1e-16}),
    "weights of zero": (_zero_start, torch.float32, {}),
    "float64": (_keep, torch.float64, {}),
    "bfloat16": (_keep, torch.bfloat16, {}),
    "amsgrad": (_keep, torch.float32, {"amsgrad": True}),
}


def measure_inputs(device: str, rounds: int) -> dict[str, list[float]]:
    """Returns the ratios to the healthy input of the same round."""
    work = {name: _measurement(*case, device=device) for name, case in INPUTS.items()}
    for each in progress(work.values(), "inputs: compiling, warming up"):
        each()
        each()
    chance = random.Random(0)
    ratios: dict[str, list[float]] = {name: [] for name in work}
    for _ in progress(range(rounds), "inputs: rounds"):
        order = list(work)
        chance.shuffle(order)
        here = {name: seconds(work[name], device) for name in order}
        for name, value in here.items():
            ratios[name].append(value / here[HEALTHY])
    return ratios


def _measurement(change: Change, dtype: torch.dtype, settings: dict[str, Any], device: str) -> Work:
    weight = nn.Parameter(0.02 * torch.randn(1000, ELEMENTS // 1000, dtype=dtype, device=device))
    adam = torch.optim.AdamW([weight], fused=True, **settings)
    for _ in range(3):
        weight.grad = 1e-3 * torch.randn_like(weight)
        adam.step()
    change(weight, adam.state[weight])
    statistics = AdamStatistics()

    def work() -> None:
        statistics.update(adam)
        statistics.compute()

    return work
