"""Trainings of many ranks through Lightning's Trainer: `test_ranks.py` compares them."""

import itertools
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping
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

from lightning_adam import AdamMixin, AdamMonitor
from lightning_adam.findings.judging import Judge
from lightning_adam.statistics import kernels
from tests.support.memory_logger import MemoryLogger
from tests.support.ranks import Collectives, folder, keep

STEPS = 6
"""In two epochs."""
BATCH = 16
"""Of all ranks together."""
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
    """A layer in columns, the next in rows, and, of four ranks, FSDP2 over two such pairs."""

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
    """How ranks train, and what one process trains instead."""

    module: type[Lit]
    strategy: Callable[[], Strategy]
    alone: type[Lit]
    collectives: int
    """Of a measurement."""
    at_start: int = 1
    ranks_a_share: int = 1
    """How many ranks get the same data."""


KINDS = {
    "DDP": Kind(Lit, ddp, Lit, 0, 0),
    "FSDP2": Kind(Sharded, fsdp2, Lit, 2),
    "tensor parallel": Kind(Columns, tensor_parallel, Lit, 2, ranks_a_share=2),
    "ZeroRedundancyOptimizer": Kind(Zero, ddp, Plain, 2),
}


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def loader(kind: str) -> DataLoader[tuple[Tensor, ...]]:
    """This rank's share of each batch."""
    inputs = torch.randn(STEPS // 2 * BATCH, 6, generator=torch.Generator().manual_seed(3))
    data = TensorDataset(inputs, inputs[:, :1].sin())
    ranks = KINDS[kind].ranks_a_share if world_size() > 1 else 1
    shares, share = world_size() // ranks, int(os.environ.get("RANK", "0")) // ranks
    sampler: DistributedSampler[Any] = DistributedSampler(data, shares, share, shuffle=False)
    return DataLoader(data, batch_size=BATCH // shares, sampler=sampler)


def monitor() -> AdamMonitor:
    return AdamMonitor(
        every_n_steps=2,
        statistics="all",
        scopes=["model", "group", "layer", "tensor"],
        histograms_every_n_steps=3,
    )


def fit(
    kind: str,
    callbacks: list[L.Callback],
    logger: Any = False,
    ckpt_path: str | None = None,
    **settings: Any,
) -> tuple[L.Trainer, Lit]:
    world = world_size()
    module = KINDS[kind].alone() if world == 1 else KINDS[kind].module()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="auto" if world == 1 else KINDS[kind].strategy(),
        callbacks=callbacks,
        logger=logger,
        **{
            "max_epochs": 2,
            "use_distributed_sampler": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        | settings,
    )
    trainer.fit(module, loader(kind), ckpt_path=ckpt_path)
    return trainer, module


def parameters(module: nn.Module) -> list[Tensor]:
    """This rank's parts."""
    return [
        (each.to_local() if isinstance(each, DTensor) else each).detach().clone()
        for each in module.parameters()
    ]


def plain(kind: str) -> dict[str, Any]:
    with Collectives() as collectives:
        _, module = fit(kind, [])
    return {"parameters": parameters(module), "collectives": collectives.count}


def monitored(kind: str) -> dict[str, Any]:
    logger, callback = MemoryLogger(), monitor()
    with Collectives() as collectives:
        trainer, module = fit(kind, [callback], logger)
    return {
        "parameters": parameters(module),
        "collectives": collectives.count,
        "rows": logger.rows,
        "metrics": {key: float(each) for key, each in trainer.callback_metrics.items()},
    }


def attached_later(kind: str) -> dict[str, Any]:
    """A checkpoint that knows of no monitor."""
    path = folder() / f"{kind}_alone.ckpt"
    trainer, _ = fit(kind, [], max_epochs=1)
    trainer.save_checkpoint(path)
    logger = MemoryLogger()
    fit(kind, [monitor()], logger, ckpt_path=str(path))
    return {"rows": logger.rows}


def resumed(kind: str) -> dict[str, Any]:
    """Half of the training, and the other half from its checkpoint."""
    path = folder() / f"{kind}.ckpt"
    trainer, _ = fit(kind, [monitor()], MemoryLogger(), max_epochs=1)
    trainer.save_checkpoint(path)
    logger = MemoryLogger()
    _, module = fit(kind, [monitor()], logger, ckpt_path=str(path))
    return {"parameters": parameters(module), "rows": logger.rows}


def stopped(kind: str) -> dict[str, Any]:
    """A statistic decides when to stop."""
    stop = EarlyStopping(
        "adam_schedule/step", stopping_threshold=2.5, mode="max", check_on_train_epoch_end=True
    )
    callback = AdamMonitor(every_n_steps=1, statistics="all")
    trainer, _ = fit(kind, [callback, stop], limit_train_batches=1, max_steps=-1, max_epochs=STEPS)
    return {"step": trainer.global_step}


def stopped_by_finding(kind: str) -> dict[str, Any]:
    """What the last rank alone has found ends the training of all."""
    is_last = world_size() == 1 or dist.get_rank() == world_size() - 1
    severity = {"warmup_short": {"severity": "warning" if is_last else "off"}}
    callback = AdamMonitor(every_n_steps=2, findings=severity, stop_on=["warmup_short"])
    trainer, _ = fit(kind, [callback])
    return {"step": trainer.global_step}


PLACES: dict[str, tuple[Any, str, int]] = {
    "at the start": (AdamMonitor, "_begin", 0),
    "measuring": (kernels, "measure", 2),
    "sending": (AdamMonitor, "_send", 2),
    "logging": (MemoryLogger, "log_metrics", 2),
    "judging": (Judge, "judge", 2),
}
"""What fails at which of its calls."""
FAULTS = {f"{place} on rank {rank}": (place, rank) for place in PLACES for rank in (0, 1)}


def faulty(kind: str, place: str, rank: int) -> dict[str, Any]:
    """One rank's fault, once."""
    owner, name, call = PLACES[place]
    original, calls, logger = getattr(owner, name), itertools.count(), MemoryLogger()

    def fails(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == call and dist.get_rank() == rank:
            raise ZeroDivisionError("planted")
        return original(*arguments, **keywords)

    with warnings.catch_warnings(record=True) as caught, mock.patch.object(owner, name, fails):
        warnings.simplefilter("always")
        trainer, module = fit(kind, [AdamMonitor(every_n_steps=1)], logger)
    return {
        "parameters": parameters(module),
        "step": trainer.global_step,
        "rows": logger.rows,
        "said": [str(each.message) for each in caught if "AdamMonitor" in str(each.message)],
    }


def main() -> None:
    results: dict[str, Any] = {}
    for kind in KINDS:
        results[kind] = {
            "plain": plain(kind),
            "monitored": monitored(kind),
            "resumed": resumed(kind),
            "attached later": attached_later(kind),
            "stopped": stopped(kind),
            "stopped by a finding": stopped_by_finding(kind),
        }
    for kind in ("DDP", "FSDP2"):
        for name, (place, rank) in FAULTS.items():
            results[f"{kind}, {name}"] = faulty(kind, place, rank)
    keep(results)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
