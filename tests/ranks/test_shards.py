"""Statistics of sharded optimizers equal those of one process.

Every rank gets the same data, so the mean of their gradients is the gradient of one process.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.optim import Adam, AdamW, NAdam, Optimizer

from lightning_adam import AdamStatistics, ConfigError
from lightning_adam._compat.torch import is_flat_parameter
from lightning_adam.statistics.sharding import LocalStats, all_reduce_stats
from tests.support.ranks import Collectives, Ranks

SCOPES = ("model", "group", "layer", "tensor")
STEPS = 3


class Net(nn.Module):
    """Dimensions that two and four ranks divide evenly (8), unevenly (5) and not at all (1)."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Linear(6, 8, dtype=dtype)
        self.norm = nn.LayerNorm(8, dtype=dtype)
        # Otherwise the gradients behind it would cancel out, except for rounding.
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        self.narrow = nn.Linear(8, 5, dtype=dtype)
        self.one = nn.Linear(5, 1, dtype=dtype)
        self.unused = nn.Linear(3, 8, dtype=dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.one(self.narrow(self.norm(self.wide(inputs).tanh()))).squeeze(-1)
        return outputs


class Sharded(NamedTuple):
    """A module and its optimizer."""

    module: nn.Module
    optimizer: Optimizer


Build = Callable[[Net], Sharded]


def groups(module: nn.Module) -> list[dict[str, Any]]:
    """Returns a group that decays and one that does not."""
    named = list(module.named_parameters())
    return [
        {
            "params": [each for name, each in named if name.endswith("weight")],
            "weight_decay": 0.1,
            "name": "decay",
        },
        {
            "params": [each for name, each in named if name.endswith("bias")],
            "weight_decay": 0.0,
            "lr": 3e-3,
            "name": "no_decay",
        },
    ]


def adamw(module: nn.Module, **settings: Any) -> Sharded:
    return Sharded(module, AdamW(groups(module), lr=1e-2, **settings))


def amsgrad(module: nn.Module) -> Sharded:
    return Sharded(module, Adam(groups(module), lr=1e-2, amsgrad=True))


def nadam(module: nn.Module) -> Sharded:
    return Sharded(module, NAdam(groups(module), lr=1e-2))


def adamw_using_all(net: Net) -> Sharded:
    """As with FSDP1, unused parameters have gradients of zero."""
    net.register_forward_hook(
        lambda _, inputs, outputs: outputs + 0 * net.unused(inputs[0][:, :3]).sum()
    )
    return adamw(net)


def ddp(net: Net) -> nn.Module:
    return nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)


def fsdp2(net: Net, mesh: Any = None) -> Net:
    fully_shard(net, mesh=mesh)
    return net


def fsdp2_of_parts(net: Net, *, and_the_rest: bool) -> Net:
    """Shards a layer, and optionally the rest; otherwise the rest are plain tensors."""
    fully_shard(net.wide)
    return fsdp2(net) if and_the_rest else net


def tensor_parallel(net: Net, mesh: Any = None) -> Net:
    plan = {
        "wide": ColwiseParallel(output_layouts=Replicate()),
        "narrow": RowwiseParallel(input_layouts=Replicate()),
    }
    parallelize_module(net, mesh or init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    return net


def two_by_two(*names: str) -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


def data_and_tensor_parallel(net: Net) -> Net:
    mesh = two_by_two("data", "tensor")
    return fsdp2(tensor_parallel(net, mesh["tensor"]), mesh["data"])


def fsdp1(net: Net, strategy: str = "FULL_SHARD", **settings: Any) -> nn.Module:
    return FullyShardedDataParallel(
        net,
        use_orig_params=True,
        sharding_strategy=ShardingStrategy[strategy],
        device_id=torch.device("cpu"),
        **settings,
    )


def fsdp1_hybrid(net: Net) -> nn.Module:
    return fsdp1(net, "HYBRID_SHARD", device_mesh=two_by_two("replicate", "shard"))


def zero(net: Net) -> Sharded:
    return Sharded(ddp(net), ZeroRedundancyOptimizer(groups(net), AdamW, lr=1e-2))


class Case(NamedTuple):
    """A way to shard a module, and the reference to compare with."""

    build: Build
    whole: Build = adamw
    dtype: torch.dtype = torch.float32
    collectives: int = 2
    """All-reduces of a measurement."""


CASES = {
    "DDP": Case(lambda net: Sharded(ddp(net), adamw(net).optimizer), collectives=0),
    "FSDP2": Case(lambda net: adamw(fsdp2_of_parts(net, and_the_rest=True))),
    "FSDP2, fused": Case(lambda net: adamw(fsdp2(net), fused=True)),
    "FSDP2, amsgrad": Case(lambda net: amsgrad(fsdp2(net)), amsgrad),
    "FSDP2, NAdam": Case(lambda net: nadam(fsdp2(net)), nadam),
    "FSDP2 of a part": Case(lambda net: adamw(fsdp2_of_parts(net, and_the_rest=False))),
    # The order of sums changes the last digits.
    "tensor parallel": Case(lambda net: adamw(tensor_parallel(net)), dtype=torch.float64),
    "FSDP1": Case(lambda net: adamw(fsdp1(net)), adamw_using_all),
    "FSDP1, not sharded": Case(lambda net: adamw(fsdp1(net, "NO_SHARD")), adamw_using_all),
    "ZeroRedundancyOptimizer": Case(zero),
    "HSDP": Case(lambda net: adamw(fsdp2(net, two_by_two("replicate", "shard")))),
    "data and tensor parallel": Case(
        lambda net: adamw(data_and_tensor_parallel(net)), dtype=torch.float64
    ),
    "FSDP1, hybrid": Case(lambda net: adamw(fsdp1_hybrid(net)), adamw_using_all),
}
ON_FOUR = ("HSDP", "data and tensor parallel", "FSDP1, hybrid")
"""Those that need four ranks; on four, a module that is sharded in part is measured too."""


def take_steps(sharded: Sharded, dtype: torch.dtype) -> None:
    """Takes some steps; the last gradients stay."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        inputs = torch.randn(16, 6, generator=generator, dtype=torch.float64).to(dtype)
        sharded.optimizer.zero_grad()
        (sharded.module(inputs) - inputs[:, 0]).square().mean().backward()
        sharded.optimizer.step()


def measure(sharded: Sharded) -> dict[str, Any]:
    module = sharded.module
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module = module.module
    statistics = AdamStatistics("all", SCOPES, worst={"grad_max": 2}, module=module)
    with Collectives() as collectives:
        statistics.update(sharded.optimizer, histograms=True, skipped_steps=1.0)
    return {
        "collectives": collectives.count,
        "values": statistics.compute(),
        "table": statistics.table("tensor"),
        "exponents": statistics.compute_exponents(),
    }


# Functions that the ranks run


def measure_case(name: str) -> dict[str, Any]:
    case = CASES[name]
    sharded = case.build(Net(case.dtype))
    take_steps(sharded, case.dtype)
    return measure(sharded)


def reduce_nan_of_last_rank() -> LocalStats:
    """Reduces numbers of which the last rank's is NaN."""
    is_last = dist.get_rank() == dist.get_world_size() - 1
    number = torch.tensor([[torch.nan if is_last else 1.0, -torch.inf]], dtype=torch.float64)
    counts = torch.full((1, 1, 1), 2**40, dtype=torch.int64)
    stats = LocalStats(number, number, counts, torch.zeros(1))
    return all_reduce_stats(stats, torch.device("cpu"))


def find_flat_parameters() -> dict[bool, list[bool]]:
    """Finds FSDP1's flat parameters, by whether it keeps the original ones."""
    return {
        keeps: [
            is_flat_parameter(each)
            for each in FullyShardedDataParallel(
                Net(torch.float32), use_orig_params=keeps, device_id=torch.device("cpu")
            ).parameters()
        ]
        for keeps in (True, False)
    }


def measure_without_wrapper() -> str:
    """Returns the error for a module in which FSDP1's shards cannot be identified."""
    net = Net(torch.float32)
    sharded = adamw(fsdp1(net))
    take_steps(sharded, torch.float32)
    try:
        AdamStatistics(module=net).update(sharded.optimizer)
    except ConfigError as error:
        return str(error)
    return ""


# Tests


def assert_measured_like_one_process(name: str, results: list[dict[str, Any]]) -> None:
    case = CASES[name]
    whole = case.whole(Net(case.dtype))
    take_steps(whole, case.dtype)
    expected = measure(whole)
    counted = [
        key
        for key in expected["values"]
        if ("fraction" in key or "count" in key) and "signal" not in key
    ]
    assert counted
    for result in results:
        values = result["values"]
        assert values.keys() == expected["values"].keys()
        assert values == pytest.approx(expected["values"], rel=1e-5, abs=1e-12)
        assert [values[key] for key in counted] == [expected["values"][key] for key in counted]
        assert result["exponents"] == expected["exponents"]
        assert [row["tensor"] for row in result["table"]] == [
            row["tensor"] for row in expected["table"]
        ]
        assert result["collectives"] == case.collectives


@pytest.mark.parametrize("name", [name for name in CASES if name not in ON_FOUR])
def test_ranks_measure_like_one_process_in_two_collectives(ranks: Ranks, name: str) -> None:
    assert_measured_like_one_process(name, ranks.run(measure_case, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ON_FOUR, "FSDP2 of a part"])
def test_four_ranks_measure_like_one_process_in_two_collectives(
    four_ranks: Ranks, name: str
) -> None:
    assert_measured_like_one_process(name, four_ranks.run(measure_case, name))


def test_nan_and_large_counts_reach_all_ranks(ranks: Ranks) -> None:
    for sums, maxima, exponents, _ in ranks.run(reduce_nan_of_last_rank):
        assert sums[0, 0].isnan()
        assert maxima[0, 0].isnan()
        assert maxima[0, 1] == -torch.inf
        assert exponents.item() == 2**40 * ranks.world


def test_flat_parameters_are_distinguished_from_original_ones(ranks: Ranks) -> None:
    for flat in ranks.run(find_flat_parameters):
        assert not any(flat[True])
        assert flat[False] == [True]


def test_module_without_the_wrapper_of_fsdp1_is_an_error(ranks: Ranks) -> None:
    for error in ranks.run(measure_without_wrapper):
        assert error.endswith("use_orig_params=True. Use AdamStatistics(module=wrapped)")
