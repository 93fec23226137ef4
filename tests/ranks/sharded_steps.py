"""Sharded optimizers after some steps, measured by all ranks: `test_shards.py` compares them.

Every rank gets the same data, so the mean of their gradients is the gradient of one process.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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
from lightning_adam._private.torch import is_flattened
from lightning_adam.shards import Part, over_ranks
from tests.support.ranks import Collectives, keep

SCOPES = ("model", "group", "layer", "tensor")
STEPS = 3


class Net(nn.Module):
    """Dimensions that two and four ranks divide evenly (8), unevenly (5) and not at all (1)."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Linear(6, 8, dtype=dtype)
        self.norm = nn.LayerNorm(8, dtype=dtype)
        # Else the gradients behind it would cancel out, but for rounding.
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
    """One that decays and one that does not."""
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


def adam(module: nn.Module) -> Sharded:
    return Sharded(module, AdamW(groups(module), lr=1e-2))


def whole(net: Net) -> Sharded:
    return adam(net)


def ddp(net: Net) -> Sharded:
    wrapped = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    return Sharded(wrapped, adam(net).optimizer)


def fsdp2(net: Net) -> Sharded:
    fully_shard(net.wide)
    fully_shard(net)
    return adam(net)


def fsdp2_fused(net: Net) -> Sharded:
    fully_shard(net)
    return Sharded(net, AdamW(groups(net), lr=1e-2, fused=True))


def fsdp2_amsgrad(net: Net) -> Sharded:
    fully_shard(net)
    return Sharded(net, Adam(groups(net), lr=1e-2, amsgrad=True))


def fsdp2_nadam(net: Net) -> Sharded:
    fully_shard(net)
    return Sharded(net, NAdam(groups(net), lr=1e-2))


def hsdp(net: Net) -> Sharded:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(net, mesh=mesh)
    return adam(net)


def tensor_parallel(net: Net) -> Sharded:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {
        "wide": ColwiseParallel(output_layouts=Replicate()),
        "narrow": RowwiseParallel(input_layouts=Replicate()),
    }
    return adam(parallelize_module(net, mesh, plan))


def data_and_tensor_parallel(net: Net) -> Sharded:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plan = {
        "wide": ColwiseParallel(output_layouts=Replicate()),
        "narrow": RowwiseParallel(input_layouts=Replicate()),
    }
    parallelize_module(net, mesh["tensor"], plan)
    fully_shard(net, mesh=mesh["data"])
    return adam(net)


def partly_sharded(net: Net) -> Sharded:
    """The rest is plain tensors, which every rank holds."""
    fully_shard(net.wide)
    return adam(net)


def fsdp1(strategy: ShardingStrategy) -> Build:
    def build(net: Net) -> Sharded:
        settings: dict[str, Any] = {}
        if strategy is ShardingStrategy.HYBRID_SHARD:
            settings["device_mesh"] = init_device_mesh(
                "cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard")
            )
        wrapped = FullyShardedDataParallel(
            net,
            use_orig_params=True,
            sharding_strategy=strategy,
            device_id=torch.device("cpu"),
            **settings,
        )
        return adam(wrapped)

    return build


def zero(net: Net) -> Sharded:
    wrapped = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = ZeroRedundancyOptimizer(groups(net), AdamW, lr=1e-2)
    return Sharded(wrapped, optimizer)


def whole_with_zeros(net: Net) -> Sharded:
    """As FSDP1 does, what is not used has gradients of zero."""
    net.register_forward_hook(
        lambda _, inputs, outputs: outputs + 0 * net.unused(inputs[0][:, :3]).sum()
    )
    return adam(net)


def whole_amsgrad(net: Net) -> Sharded:
    return Sharded(net, Adam(groups(net), lr=1e-2, amsgrad=True))


def whole_nadam(net: Net) -> Sharded:
    return Sharded(net, NAdam(groups(net), lr=1e-2))


class Case(NamedTuple):
    """How a module is sharded, and what it is compared with."""

    build: Build
    whole: Build = whole
    dtype: torch.dtype = torch.float32
    collectives: int = 2


ON_ANY = {
    "DDP": Case(ddp, collectives=0),
    "FSDP2": Case(fsdp2),
    "FSDP2, fused": Case(fsdp2_fused),
    "FSDP2, amsgrad": Case(fsdp2_amsgrad, whole_amsgrad),
    "FSDP2, NAdam": Case(fsdp2_nadam, whole_nadam),
    "FSDP2 of a part": Case(partly_sharded),
    # What is added up in another order differs in the last digits.
    "tensor parallel": Case(tensor_parallel, dtype=torch.float64),
    "FSDP1": Case(fsdp1(ShardingStrategy.FULL_SHARD), whole_with_zeros),
    "FSDP1, not sharded": Case(fsdp1(ShardingStrategy.NO_SHARD), whole_with_zeros),
    "ZeroRedundancyOptimizer": Case(zero),
}
ON_FOUR = {
    "HSDP": Case(hsdp),
    "data and tensor parallel": Case(data_and_tensor_parallel, dtype=torch.float64),
    "FSDP1, hybrid": Case(fsdp1(ShardingStrategy.HYBRID_SHARD), whole_with_zeros),
}


def cases(world: int) -> dict[str, Case]:
    return {**ON_ANY, **(ON_FOUR if world == 4 else {})}


def trained(sharded: Sharded, dtype: torch.dtype) -> None:
    """Some steps, and the gradients of the next-to-come still in place."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        inputs = torch.randn(16, 6, generator=generator, dtype=torch.float64).to(dtype)
        sharded.optimizer.zero_grad()
        (sharded.module(inputs) - inputs[:, 0]).square().mean().backward()
        sharded.optimizer.step()


def measured(sharded: Sharded) -> dict[str, Any]:
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


def nan_on_last_rank() -> Part:
    """What all ranks are told if one has met a NaN."""
    is_last = dist.get_rank() == dist.get_world_size() - 1
    number = torch.tensor([[torch.nan if is_last else 1.0, -torch.inf]], dtype=torch.float64)
    counts = torch.full((1, 1, 1), 2**40, dtype=torch.int64)
    return over_ranks(Part(number, number, counts, torch.zeros(1)), torch.device("cpu"))


def flat_parameters() -> dict[bool, list[bool]]:
    """By whether FSDP1 keeps the original ones, which of its parameters are flat ones."""
    return {
        keeps: [
            is_flattened(each)
            for each in FullyShardedDataParallel(
                Net(torch.float32), use_orig_params=keeps, device_id=torch.device("cpu")
            ).parameters()
        ]
        for keeps in (True, False)
    }


def without_its_wrapper() -> str:
    """What is said of a module from which FSDP1's parts cannot be told."""
    net = Net(torch.float32)
    sharded = fsdp1(ShardingStrategy.FULL_SHARD)(net)
    trained(sharded, torch.float32)
    try:
        AdamStatistics(module=net).update(sharded.optimizer)
    except ConfigError as error:
        return str(error)
    return ""


def main() -> None:
    dist.init_process_group("gloo")
    results: dict[str, Any] = {
        "nan": nan_on_last_rank(),
        "flat": flat_parameters(),
        "without its wrapper": without_its_wrapper(),
    }
    for name, case in cases(dist.get_world_size()).items():
        sharded = case.build(Net(case.dtype))
        trained(sharded, case.dtype)
        results[name] = measured(sharded)
    keep(results)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
