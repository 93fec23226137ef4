"""Parameter groups with FSDP1, where parameters are views of a flat one, on two ranks."""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from lightning_adam import ConfigError, build_optimizer
from tests.support.ranks import Ranks
from tests.support.tables import each_row

STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")


class Net(nn.Module):
    """Has parameters that are only on one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 6)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
        self.head = nn.Linear(6, 1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 6))


def wrapped(strategy: str = "FULL_SHARD", keeps: bool = True) -> tuple[Net, nn.Module]:
    net = Net()
    settings: dict[str, Any] = {
        "use_orig_params": keeps,
        "device_id": torch.device("cpu"),
        "sharding_strategy": ShardingStrategy[strategy],
    }
    net.block = FullyShardedDataParallel(net.block, **settings)  # type: ignore[assignment]
    return net, FullyShardedDataParallel(net, **settings)


def groups_of(module: nn.Module, root: nn.Module | None = None) -> dict[str, list[str]]:
    built = build_optimizer(module, {"weight_decay": 0.1}, root=root)
    return {group["name"]: group["param_names"] for group in built.param_groups}


# Functions that the ranks run


def group_each_strategy() -> list[dict[str, list[str]]]:
    found = []
    for strategy in STRATEGIES:
        net, root = wrapped(strategy)
        found += [groups_of(root), groups_of(net, root)]
    return found


def shapes_of_shards() -> list[int]:
    return [each.ndim for each in wrapped()[0].parameters()]


def errors() -> list[str]:
    """Returns the errors for a module without its wrapper and for flat parameters."""
    raised = []
    net, _ = wrapped()
    _, flat = wrapped(keeps=False)
    for module in (net, flat):
        try:
            groups_of(module)
        except ConfigError as error:
            raised.append(str(error))
    return raised


def build_without_deciding() -> list[list[str]]:
    """Builds optimizers in which all parameters decay, without knowing the shapes."""
    config = {"weight_decay_on": "all"}
    net, _ = wrapped()
    _, flat = wrapped(keeps=False)
    return [build_optimizer(each, config).param_groups[0]["param_names"] for each in (net, flat)]


# Tests


def test_groups_are_those_of_the_original_shapes(ranks: Ranks) -> None:
    expected = groups_of(Net())
    assert expected["decay"] == ["block.0.weight", "head.weight"]
    for found in ranks.run(group_each_strategy):
        assert found == [expected] * 2 * len(STRATEGIES)
    for dimensions in ranks.run(shapes_of_shards):
        assert set(dimensions) == {1}, "the shards have lost their shapes"


def test_hidden_shapes_are_an_error(ranks: Ranks) -> None:
    expected = [
        "wrapper is outside of the module. Use build_optimizer(module, optimizer, root=wrapped)",
        "_flat_param. Use FullyShardedDataParallel(..., use_orig_params=True)",
    ]
    for raised in ranks.run(errors):
        with each_row() as row:
            for error, ending in zip(raised, expected, strict=True):
                with row(ending):
                    assert error.startswith("optimizer cannot tell which parameters decay")
                    assert error.endswith(ending)


def test_shapes_are_not_needed_where_everything_decays(ranks: Ranks) -> None:
    names = [name for name, _ in Net().named_parameters()]
    for original, flat in ranks.run(build_without_deciding):
        assert original == names
        assert flat == ["_flat_param", "block._flat_param"]
