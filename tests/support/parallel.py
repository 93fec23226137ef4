"""Training on several ranks through Lightning's Trainer, and the same training on one."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_adam import AdamMixin
from tests.support.training import trainer

STEPS = 6
"""In two epochs."""
BATCH = 16
"""Batch size over all ranks."""
OPTIMIZER = {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True}


class Lit(AdamMixin, L.LightningModule):
    """Dimensions that two ranks divide evenly, unevenly, and not at all."""

    def __init__(self, optimizer: Any = OPTIMIZER) -> None:
        super().__init__(optimizer=optimizer, scheduler={"name": "cosine", "total_steps": 20})
        torch.manual_seed(1)
        norm = nn.LayerNorm(8)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        self.net = nn.Sequential(
            nn.Linear(6, 8), norm, nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.net(inputs), targets)


class Sharded(Lit):
    """FSDP2."""

    def configure_model(self) -> None:
        if not isinstance(self.net[0].weight, DTensor):
            assert self.device_mesh is not None
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Columns(Lit):
    """A layer in columns and the next in rows; on four ranks also FSDP2 over two such pairs."""

    def configure_model(self) -> None:
        if isinstance(self.net[0].weight, DTensor):
            return
        mesh = self.device_mesh
        assert mesh is not None
        plan = {
            "0": ColwiseParallel(output_layouts=Replicate()),
            "3": RowwiseParallel(input_layouts=Replicate()),
        }
        parallelize_module(self.net, mesh["tensor_parallel"], plan)
        if mesh["data_parallel"].size() > 1:
            fully_shard(self.net, mesh=mesh["data_parallel"])


class Plain(Lit):
    """Without the mixin's `configure_optimizers`."""

    def configure_optimizers(self) -> Any:
        return self.build(
            [
                {"params": [each for each in self.parameters() if each.ndim > 1], "name": "decay"},
                {
                    "params": [each for each in self.parameters() if each.ndim < 2],
                    "name": "no_decay",
                    "weight_decay": 0.0,
                },
            ]
        )

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        return AdamW(groups, lr=1e-2, weight_decay=0.1)


class Zero(Plain):
    """Each rank steps some of the parameters."""

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        return ZeroRedundancyOptimizer(groups, AdamW, lr=1e-2, weight_decay=0.1)


def ddp() -> Strategy:
    return DDPStrategy(process_group_backend="gloo")


def fsdp2() -> Strategy:
    return ModelParallelStrategy(
        data_parallel_size=world_size(), tensor_parallel_size=1, process_group_backend="gloo"
    )


def tensor_parallel() -> Strategy:
    return ModelParallelStrategy(
        data_parallel_size=world_size() // 2, tensor_parallel_size=2, process_group_backend="gloo"
    )


class Kind(NamedTuple):
    """A parallel training, and the module that one process trains instead."""

    module: type[Lit]
    strategy: Callable[[], Strategy]
    alone: type[Lit]
    collectives: int
    """All-reduces of a measurement."""
    at_start: int = 1
    """All-reduces of the monitor when the training starts."""
    ranks_a_share: int = 1
    """The number of ranks that get the same data."""


KINDS = {
    "DDP": Kind(Lit, ddp, Lit, 0, 0),
    "FSDP2": Kind(Sharded, fsdp2, Lit, 2),
    "tensor parallel": Kind(Columns, tensor_parallel, Lit, 2, ranks_a_share=2),
    "ZeroRedundancyOptimizer": Kind(Zero, ddp, Plain, 2),
}


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def loader(kind: str) -> DataLoader[tuple[Tensor, ...]]:
    """Loads this rank's part of each batch."""
    inputs = torch.randn(STEPS // 2 * BATCH, 6, generator=torch.Generator().manual_seed(3))
    data = TensorDataset(inputs, inputs[:, :1].sin())
    ranks = KINDS[kind].ranks_a_share if world_size() > 1 else 1
    shares, share = world_size() // ranks, int(os.environ.get("RANK", "0")) // ranks
    sampler: DistributedSampler[Any] = DistributedSampler(data, shares, share, shuffle=False)
    return DataLoader(data, batch_size=BATCH // shares, sampler=sampler)


def fit_ranks(
    kind: str,
    callbacks: list[L.Callback],
    logger: Any = False,
    ckpt_path: str | None = None,
    **settings: Any,
) -> tuple[L.Trainer, Lit]:
    world = world_size()
    module = KINDS[kind].alone() if world == 1 else KINDS[kind].module()
    fit = trainer(
        devices=world,
        strategy="auto" if world == 1 else KINDS[kind].strategy(),
        callbacks=callbacks,
        logger=logger,
        **{"max_epochs": 2, "use_distributed_sampler": False, **settings},
    )
    fit.fit(module, loader(kind), ckpt_path=ckpt_path)
    return fit, module


def local_parameters(module: nn.Module) -> list[Tensor]:
    """Copies this rank's part of each parameter."""
    return [
        (each.to_local() if isinstance(each, DTensor) else each).detach().clone()
        for each in module.parameters()
    ]
