"""However a model is cut into groups, chunks or ranks, its numbers are the same."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_adam import AdamStatistics

SETTINGS: dict[str, Any] = {
    "lr": 0.01,
    "betas": (0.9, 0.99),
    "eps": 1e-4,
    "weight_decay": 0.1,
    "amsgrad": True,
}
SHAPES = [(40, 7), (13,), (1,), (5, 4, 3), (64, 3), (2,)]
State = dict[str, Tensor]


def trained(decoupled: bool) -> Optimizer:
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
    """An optimizer in the same state, its tensors in other groups."""
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


def pieces(tensor: tuple[Tensor, Tensor, State], cuts: list[int]) -> list[Any]:
    """A tensor as several, cut at these elements."""
    values, grad, state = tensor
    parts = [each.reshape(-1).tensor_split(cuts) for each in (values, grad)]
    names = [name for name in state if name != "step"]
    states = [state[name].reshape(-1).tensor_split(cuts) for name in names]
    return [
        (p, g, {"step": state["step"], **dict(zip(names, own, strict=True))})
        for p, g, *own in zip(*parts, *states, strict=True)
    ]


def measured(optimizer: Optimizer, kernel: str = "eager") -> AdamStatistics:
    metric = AdamStatistics("all", scopes=["model"], kernel=kernel)
    metric.update(optimizer, histograms=True)
    return metric


def model_histograms(metric: AdamStatistics) -> dict[str, list[int]]:
    return {key: counts for key, counts in metric.compute_exponents().items() if "group" not in key}


def assert_same(other: AdamStatistics, whole: AdamStatistics) -> None:
    values, expected = other.compute(), whole.compute()
    assert set(values) == set(expected)
    for key, value in expected.items():
        assert values[key] == pytest.approx(value, rel=1e-12, abs=1e-15), key
        if key.endswith(("_fraction", "_count", "_max")) and "signal" not in key:
            assert values[key] == value, key
    assert model_histograms(other) == model_histograms(whole)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_any_groups(seed: int, decoupled: bool) -> None:
    optimizer, chance = trained(decoupled), random.Random(seed)
    groups: list[list[Any]] = [[] for _ in range(chance.randint(1, 6))]
    for tensor in tensors_of(optimizer):
        chance.choice(groups).append(tensor)
    assert_same(measured(rebuilt(groups, optimizer)), measured(optimizer))


def random_cuts(tensor: tuple[Tensor, Tensor, State], parts: int, chance: random.Random) -> Any:
    """Parts of any length, some of them empty."""
    elements = tensor[0].numel()
    return pieces(tensor, sorted(chance.randint(0, elements) for _ in range(parts - 1)))


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_any_chunks(seed: int, decoupled: bool) -> None:
    optimizer, chance = trained(decoupled), random.Random(seed)
    chunks = [
        chunk
        for tensor in tensors_of(optimizer)
        for chunk in random_cuts(tensor, chance.randint(1, 5), chance)
    ]
    assert_same(measured(rebuilt([chunks], optimizer)), measured(optimizer))


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_any_ranks(ranks: int, decoupled: bool) -> None:
    """Each rank holds a shard of every tensor; torchmetrics reduces their matrices."""
    optimizer, chance = trained(decoupled), random.Random(ranks)
    shards = [random_cuts(tensor, ranks, chance) for tensor in tensors_of(optimizer)]
    metrics = [
        measured(rebuilt([[shard[rank] for shard in shards]], optimizer)) for rank in range(ranks)
    ]
    first, *others = metrics
    for other in others:
        first.merge_state(other)
    assert_same(first, measured(optimizer))


def test_a_group_is_what_a_model_of_it_alone_would_be() -> None:
    optimizer = trained(decoupled=True)
    tensors = tensors_of(optimizer)
    metric = AdamStatistics("all", scopes=["group"], kernel="eager")
    metric.update(rebuilt([tensors[:2], tensors[2:]], optimizer))
    alone = measured(rebuilt([tensors[2:]], optimizer)).compute()
    assert {
        key.removesuffix("/group/part_1"): value
        for key, value in metric.compute().items()
        if key.endswith("/group/part_1")
    } == alone
