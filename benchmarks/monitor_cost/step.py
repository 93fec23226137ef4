"""The part `step`: measurements, in turns with torch's fused step on the same tensors."""

import gc
import random
import tempfile
import time
from collections.abc import Mapping
from itertools import product

import torch
import wandb

from benchmarks.monitor_cost.contestants import Timed, arms_of
from benchmarks.monitor_cost.results import ALL, MATRICES, READ, READ_AGAIN, STEP, Arm, Size
from benchmarks.monitor_cost.tensors import SHAPES, build
from benchmarks.monitor_cost.timing import extra_mb, host_ms, on_device, seconds
from benchmarks.quiet import progress, silence

LONG_S = 1.0
"""An arm that takes so long takes part in every second round only, one that takes twice as long in
every third, and so on."""
LEAST_ROUNDS = 3
"""But in so many, if there are as many."""


def measure_size(size: str, device: str, rounds: int) -> Size:
    named, optimizer = build(SHAPES[size](), device)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, silence():
        wandb.init(dir=folder, project="benchmark")
        arms = arms_of(named, optimizer)
        compared = compare(size, arms, device, rounds)
        wandb.finish()
    return Size(
        elements=sum(parameter.numel() for _, parameter in named),
        tensors=len(named),
        arms=compared,
        after=following(size, arms, device, rounds),
    )


def compare(size: str, arms: Mapping[str, Timed], device: str, rounds: int) -> dict[str, Arm]:
    """Each arm once in a round, in another order each time."""
    chance = random.Random(0)
    every = {}
    for name, arm in progress(arms.items(), f"{size}: compiling, warming up"):
        # The first call compiles.
        seconds_of(arm, device)
        interval = 1 + int(seconds_of(arm, device) / LONG_S)
        every[name] = max(1, min(interval, rounds // LEAST_ROUNDS))
    taken: dict[str, list[float]] = {name: [] for name in arms}
    ratios: dict[str, list[float]] = {name: [] for name in arms}
    for number in progress(range(rounds), f"{size}: rounds"):
        order = [name for name in arms if number % every[name] == 0]
        chance.shuffle(order)
        here = {name: seconds_of(arms[name], device) for name in order}
        for name, value in here.items():
            taken[name].append(1e3 * value)
            ratios[name].append(value / here[STEP])
    gc.collect()
    compared = {}
    for name, arm in progress(arms.items(), f"{size}: memory"):
        launches, device_ms = on_device(arm.work) if device == "cuda" else (None, None)
        compared[name] = Arm(
            milliseconds=taken[name],
            ratios=ratios[name],
            extra_mb=extra_mb(arm.work, device),
            launches=launches,
            device_ms=device_ms,
            host_ms=host_ms(arm.start) if arm.start and device == "cuda" else None,
        )
    return compared


def seconds_of(arm: Timed, device: str) -> float:
    taken = seconds(arm.work, device)
    if arm.without is None:
        return taken
    # wandb's process goes on with what the hooks have handed over, on a core that the next needs.
    time.sleep(taken)
    return taken - seconds(arm.without, device)


def following(
    size: str, arms: Mapping[str, Timed], device: str, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Whether a measurement makes what follows it slower than a plain read of the same memory does.

    That read leaves the caches alike; threads that a measurement has left waiting would show.
    """
    side = 16 if size == "tiny" else 1024
    inputs, weights = (torch.randn(side, side, device=device, requires_grad=True) for _ in range(2))

    def multiply() -> None:
        torch.autograd.grad((inputs @ weights).sum(), [inputs, weights])

    before = {READ: arms[READ], READ_AGAIN: arms[READ], ALL: arms[ALL]}
    after = {STEP: arms[STEP].work, MATRICES: multiply}
    chance = random.Random(0)
    ratios: dict[str, dict[str, list[float]]] = {name: {READ_AGAIN: [], ALL: []} for name in after}
    for _ in progress(range(rounds), f"{size}: the step after"):
        order = [*product(before, after)]
        chance.shuffle(order)
        here = {}
        for first, second in order:
            before[first].work()
            here[first, second] = seconds(after[second], device)
        for name, of in ratios.items():
            for first, values in of.items():
                values.append(here[first, name] / here[READ, name])
    return ratios
