"""Which tensors decay."""

import pytest
import torch
from torch import nn

from lightning_adam.param_groups import param_groups
from lightning_adam.schema import ConfigError, WeightDecayOn


def names(module: nn.Module, on: WeightDecayOn = WeightDecayOn.matrices) -> dict[str, set[str]]:
    groups = param_groups(module, 0.1, on)
    return {group["name"]: {name for name, _ in group["params"]} for group in groups}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 20)
        self.tokens = nn.Embedding(20, 8)
        self.head.weight = self.tokens.weight


def test_only_matrices_decay() -> None:
    net = nn.ModuleDict(
        {
            "convolution": nn.Conv2d(1, 2, 3),
            "batch_norm": nn.BatchNorm2d(2),
            "image_norm": nn.LayerNorm((2, 4, 4)),
            "tokens": nn.Embedding(5, 3),
            "bag": nn.EmbeddingBag(5, 3),
            "linear": nn.Linear(3, 4),
            "recurrent": nn.GRU(3, 4),
        }
    )
    grouped = names(net)
    assert grouped["decay"] == {
        "convolution.weight",
        "linear.weight",
        "recurrent.weight_ih_l0",
        "recurrent.weight_hh_l0",
    }
    assert grouped["decay"] | grouped["no_decay"] == {name for name, _ in net.named_parameters()}


def test_all_means_all() -> None:
    net = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3))
    assert names(net, WeightDecayOn.all) == {"decay": {"0.weight", "1.weight", "1.bias"}}


def test_a_matrix_shared_with_an_embedding_stands_once_and_does_not_decay() -> None:
    assert names(Tied()) == {"no_decay": {"head.weight", "head.bias"}}


def test_a_shared_matrix_stands_once() -> None:
    layer = nn.Linear(3, 3)
    assert names(nn.Sequential(layer, layer)) == {"decay": {"0.weight"}, "no_decay": {"0.bias"}}


def test_frozen_parameters_stand_in_no_group() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    net[0].requires_grad_(False)
    assert names(net) == {"decay": {"1.weight"}, "no_decay": {"1.bias"}}


def test_the_groups_are_the_same_without_decay() -> None:
    groups = param_groups(nn.Linear(2, 3), 0.0, WeightDecayOn.matrices)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [
        ("decay", 0.0),
        ("no_decay", 0.0),
    ]


def test_compiled_modules_keep_their_names() -> None:
    net = nn.ModuleDict({"0": torch.compile(nn.Linear(2, 3))})  # type: ignore[dict-item]
    assert names(net) == {"decay": {"0.weight"}, "no_decay": {"0.bias"}}


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has no parameter to train"):
        names(nn.Linear(2, 3).requires_grad_(False))


def test_a_parameter_without_a_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match="weight has no shape yet"):
        names(nn.LazyLinear(3))
