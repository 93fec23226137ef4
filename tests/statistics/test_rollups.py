"""The statistics of a model do not depend on its division into groups, chunks or ranks."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_adam import AdamStatistics
from tests.support.tables import each_row

SETTINGS: dict[str, Any] = {
    "lr": 0.01,
    "betas": (0.9, 0.99),
    "eps": 1e-4,
    "weight_decay": 0.1,
    "amsgrad": True,
}
SHAPES = [(40, 7), (13,), (1,), (5, 4, 3), (64, 3), (2,)]
State = dict[str, Tensor]


def stepped_optimizer(decoupled: bool) -> Optimizer:
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = Adam(parameters, decoupled_weight_decay=decoupled, **SETTINGS)
    for _ in range(4):
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape) * 10.0 ** (-2 * index)
        parameters[3].grad[1:3] = 0  # type: ignore[index]
        optimizer.step()
    return optimizer


def tensors_of(optimizer: Optimizer) -> list[tuple[Tensor, Tensor, State]]:
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    return [(each.detach(), each.grad, optimizer.state[each]) for each in parameters]


def rebuilt(groups: list[list[tuple[Tensor, Tensor, State]]], like: Optimizer) -> Optimizer:
    """Builds an optimizer in the same state with other groups."""
    settings = {key: value for key, value in like.param_groups[0].items() if key != "params"}
    param_groups = []
    state: dict[Tensor, State] = {}
    for index, group in enumerate(groups):
        parameters = []
        for values, grad, own in group:
            parameter = nn.Parameter(values.clone())
            parameter.grad = grad
            state[parameter] = own
            parameters.append(parameter)
        param_groups.append({**settings, "params": parameters, "name": f"part_{index}"})
    optimizer = Adam(param_groups)
    optimizer.state.update(state)
    return optimizer


def measured(optimizer: Optimizer) -> AdamStatistics:
    metric = AdamStatistics("all", scopes=["model"], kernel="eager")
    metric.update(optimizer, histograms=True)
    return metric


def model_histograms(metric: AdamStatistics) -> dict[str, list[int]]:
    return {key: counts for key, counts in metric.compute_exponents().items() if "group" not in key}


OF_TENSORS = ("rms_ratio_max", "update_to_weight_max")
"""Statistics that are maxima over tensors."""


def assert_same(other: AdamStatistics, whole: AdamStatistics, are_cut: bool = False) -> None:
    values, expected = dict(other.compute()), dict(whole.compute())
    if are_cut:
        for key in [key for key in expected if key.endswith(OF_TENSORS)]:
            assert values.pop(key) >= expected.pop(key) * (1 - 1e-12)
    assert set(values) == set(expected)
    for key, value in expected.items():
        assert values[key] == pytest.approx(value, rel=1e-12, abs=1e-15), key
        is_exact = key.endswith(("_fraction", "_count", "_max")) and "signal" not in key
        if is_exact and not key.endswith(OF_TENSORS):
            assert values[key] == value, key
    assert model_histograms(other) == model_histograms(whole)


each_decay = pytest.mark.parametrize("decoupled", [True, False], ids=["AdamW", "Adam"])


def random_cuts(tensor: tuple[Tensor, Tensor, State], parts: int, chance: random.Random) -> Any:
    """Splits a tensor into parts of random length; some are empty."""
    values, grad, state = tensor
    cuts = sorted(chance.randint(0, values.numel()) for _ in range(parts - 1))
    names = [name for name in state if name != "step"]
    tensors = (values, grad, *(state[name] for name in names))
    each = [part.reshape(-1).tensor_split(cuts) for part in tensors]
    return [
        (p, g, {"step": state["step"], **dict(zip(names, own, strict=True))})
        for p, g, *own in zip(*each, strict=True)
    ]


@each_decay
def test_statistics_do_not_depend_on_groups_and_cuts(decoupled: bool) -> None:
    optimizer = stepped_optimizer(decoupled)
    whole = measured(optimizer)
    with each_row() as row:
        for seed in range(8):
            chance = random.Random(seed)
            groups: list[list[Any]] = [[] for _ in range(chance.randint(1, 6))]
            for tensor in tensors_of(optimizer):
                for chunk in random_cuts(tensor, chance.randint(1, 5), chance):
                    chance.choice(groups).append(chunk)
            with row(f"seed {seed}"):
                assert_same(measured(rebuilt(groups, optimizer)), whole, are_cut=True)


@each_decay
def test_statistics_do_not_depend_on_the_ranks(decoupled: bool) -> None:
    """Each rank holds a shard of every tensor; torchmetrics reduces their matrices."""
    optimizer = stepped_optimizer(decoupled)
    whole = measured(optimizer)
    with each_row() as row:
        for ranks in (2, 3, 8):
            chance = random.Random(ranks)
            shards = [random_cuts(tensor, ranks, chance) for tensor in tensors_of(optimizer)]
            first, *others = (
                measured(rebuilt([[shard[rank] for shard in shards]], optimizer))
                for rank in range(ranks)
            )
            for other in others:
                first.merge_state(other)
            with row(f"{ranks} ranks"):
                assert_same(first, whole)
