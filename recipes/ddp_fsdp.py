"""A small GPT on many processes: the bytes of Python's own library, whole or sharded.

python -m recipes.ddp_fsdp
python -m recipes.ddp_fsdp strategy=fsdp
python -m recipes.ddp_fsdp strategy=fsdp trainer.accelerator=gpu trainer.devices=8
recipes/ddp_fsdp_torchrun.sh strategy=fsdp
sbatch recipes/ddp_fsdp.slurm strategy=fsdp
"""

import math
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_adam import AdamMixin, ConfigError
from recipes.looking import finish
from recipes.processes import register_resolvers

BYTES = 256
CONTEXT = 128
TEXT = 2 << 20
"""Bytes of text; the last sixteenth validates."""


class SmallGPT(nn.Module):
    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(BYTES, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.last = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        length = text.shape[1]
        residual = self.tokens(text) + self.positions(torch.arange(length, device=text.device))
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=text.device)
        for block in self.blocks:
            residual = block(residual, src_mask=mask, is_causal=True)
        return self.head(self.last(residual))  # type: ignore[no-any-return]


class LitGPT(AdamMixin, L.LightningModule):
    def __init__(
        self, net: SmallGPT, optimizer: DictConfig, scheduler: DictConfig | None, replicas: int
    ) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.net = net
        self.replicas = replicas

    def configure_model(self) -> None:
        """Shards the network, block by block, if that is the strategy."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, ModelParallelStrategy):
            return
        processes = self.trainer.world_size
        if processes % self.replicas:
            raise ConfigError(
                f"replicas={self.replicas}: expected a divisor of the {processes} processes; type"
                " for example replicas=1"
            )
        shape, names = (self.replicas, processes // self.replicas), ("replicas", "shards")
        mesh = init_device_mesh(strategy.root_device.type, shape, mesh_dim_names=names)
        mesh = mesh["shards"] if self.replicas == 1 else mesh
        for block in self.net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), prog_bar=True, sync_dist=True)

    def loss(self, batch: tuple[Tensor]) -> Tensor:
        (text,) = batch
        logits: Tensor = self.net(text[:, :-1])
        return cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def text_loaders(batch_size: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Pieces of the standard library's sources, of one byte more than the context."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
    pieces = torch.frombuffer(text[:TEXT], dtype=torch.uint8).unfold(0, CONTEXT + 1, CONTEXT).long()
    train = len(pieces) - len(pieces) // 16
    return (
        DataLoader(TensorDataset(pieces[:train]), batch_size=batch_size, shuffle=True),
        DataLoader(TensorDataset(pieces[train:]), batch_size=batch_size),
    )


register_resolvers()


@hydra.main(version_base="1.3", config_path="../conf", config_name="ddp_fsdp")
def main(cfg: DictConfig) -> float:
    # The text is in memory: workers would only slow its loading.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.* is deprecated")
    # All processes begin with the same parameters.
    L.seed_everything(cfg.seed)
    logger = instantiate(cfg.logger)
    checkpoint = ModelCheckpoint(f"{HydraConfig.get().runtime.output_dir}/checkpoints")
    trainer = instantiate(
        cfg.trainer, logger=logger, callbacks=[instantiate(cfg.adam_monitor), checkpoint]
    )
    is_sweep = HydraConfig.get().mode is RunMode.MULTIRUN
    if is_sweep and not trainer.strategy.cluster_environment.creates_processes_externally:
        raise ConfigError(
            "-m: expected a launcher that starts all processes of each job, such as submitit, for"
            " Lightning would start the whole sweep in each; type one job after the other"
        )
    net = SmallGPT(cfg.layers, cfg.width, cfg.heads)
    module = LitGPT(net, cfg.optimizer, cfg.scheduler, cfg.replicas)
    trainer.fit(module, *text_loaders(cfg.batch_size), ckpt_path=cfg.ckpt_path)
    bits = float(trainer.callback_metrics["val/loss"]) / math.log(2)
    if trainer.is_global_zero:
        finish(f"validation: {bits:.4f} bits a byte", logger, checkpoint)
    return bits


if __name__ == "__main__":
    main()
