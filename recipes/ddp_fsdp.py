"""Train Hugging Face's GPT-2 in several processes, with DDP or FSDP2.

python -m recipes.ddp_fsdp
python -m recipes.ddp_fsdp strategy=fsdp
python -m recipes.ddp_fsdp experiment=gpt2_8gpu tokens=train.bin
recipes/ddp_fsdp_torchrun.sh strategy=fsdp
sbatch recipes/ddp_fsdp.slurm strategy=fsdp
"""

import math
import os
from datetime import datetime
from pathlib import Path

import hydra
import lightning as L
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_adam import AdamMixin, ConfigError
from recipes._common import Loader, check_positive, finish, read_text, validation_metric


class LitGPT2(AdamMixin, L.LightningModule):
    def __init__(
        self,
        net: GPT2LMHeadModel,
        optimizer: DictConfig,
        scheduler: DictConfig | None,
        replicas: int,
    ) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.net = net
        self.replicas = replicas

    def configure_model(self) -> None:
        """Shards the network block by block, if FSDP2 is the strategy."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, ModelParallelStrategy):
            return
        processes = self.trainer.world_size
        if processes % self.replicas:
            raise ConfigError(
                f"replicas={self.replicas} must divide the number of processes, {processes}",
                "Use for example replicas=1",
            )
        shape, names = (self.replicas, processes // self.replicas), ("replicas", "shards")
        mesh = init_device_mesh(strategy.root_device.type, shape, mesh_dim_names=names)
        mesh = mesh["shards"] if self.replicas == 1 else mesh
        for block in self.net.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), prog_bar=True, sync_dist=True)

    def loss(self, batch: tuple[Tensor]) -> Tensor:
        """Returns the mean cross-entropy of each token after the first, in nats."""
        tokens = batch[0].long()
        return self.net(input_ids=tokens, labels=tokens).loss  # type: ignore[no-any-return]


def gpt2(layers: int, width: int, heads: int, context: int, vocabulary: int) -> GPT2LMHeadModel:
    """Returns a GPT-2 with random weights, without dropout."""
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        n_positions=context,
        vocab_size=vocabulary,
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    net = GPT2LMHeadModel(config)
    # Otherwise transformers warns that it has to guess the loss.
    net.loss_type = "ForCausalLM"
    return net


def token_loaders(
    path: str | None, context: int, vocabulary: int, batch_size: int
) -> tuple[Loader, Loader]:
    """Returns loaders of pieces of `context` tokens; the last sixteenth of them validates.

    Tokens are 16-bit integers in a file, or the bytes of Python's standard library.
    """
    if path is None:
        tokens = torch.frombuffer(read_text(None, 0), dtype=torch.uint8)
    elif Path(path).is_file():
        tokens = torch.from_numpy(np.memmap(path, dtype=np.uint16, mode="c"))
    else:
        raise ConfigError(
            f"tokens={path} is not a file: {Path(path).absolute()}",
            "Use the path of a file of 16-bit tokens, or tokens=null for bytes of Python's sources",
        )
    largest = int(tokens[: 1 << 20].int().max())
    if largest >= vocabulary:
        raise ConfigError(
            f"vocabulary={vocabulary} must be above the largest token in tokens={path}, {largest}",
            f"Use for example vocabulary={largest // 64 * 64 + 64}",
        )
    pieces = tokens[: len(tokens) // context * context].view(-1, context)
    split = len(pieces) - len(pieces) // 16
    return (
        DataLoader(TensorDataset(pieces[:split]), batch_size=batch_size, shuffle=True),
        DataLoader(TensorDataset(pieces[split:]), batch_size=batch_size),
    )


def started() -> str:
    """Returns a name that all processes of a job agree on before they are connected."""
    now = f"{datetime.now():%Y-%m-%d/%H-%M-%S}"
    if "SLURM_STEP_ID" in os.environ:
        return f"slurm/{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    if distributed.is_torchelastic_launched():
        # The first process to ask sets the time in torchrun's store.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(address, port, is_master=False)  # type: ignore[attr-defined]
        return str(store.compare_set("recipes/started", "", now), "utf-8")
    # Lightning passes the folder on to the processes that it starts.
    return now


OmegaConf.register_new_resolver("started", started, use_cache=True, replace=True)
OmegaConf.register_new_resolver("product", lambda *factors: math.prod(factors), replace=True)
OmegaConf.register_new_resolver(
    "first_process",
    lambda value: None if getattr(rank_zero_only, "rank", 0) else value,
    replace=True,
)


@hydra.main(version_base="1.3", config_path="conf", config_name="ddp_fsdp")
def main(cfg: DictConfig) -> float | None:
    check_positive(cfg, "batch_size", "context", "layers", "width", "heads", "replicas")
    # All processes begin with the same parameters.
    L.seed_everything(cfg.seed)
    checkpoint = ModelCheckpoint(
        dirpath=f"{HydraConfig.get().runtime.output_dir}/checkpoints",
        filename="best",
        save_last=True,
        monitor="val/loss",
    )
    trainer = instantiate(
        cfg.trainer,
        logger=instantiate(cfg.get("logger")) or False,
        callbacks=[instantiate(cfg.get("adam_monitor")) or L.Callback(), checkpoint],
    )
    is_sweep = HydraConfig.get().mode is RunMode.MULTIRUN
    if is_sweep and not trainer.strategy.cluster_environment.creates_processes_externally:
        raise ConfigError(
            "-m needs a launcher that starts all processes of a job, such as submitit: otherwise"
            " Lightning starts the whole sweep in each of them",
            "Run the jobs one by one",
        )
    net = gpt2(cfg.layers, cfg.width, cfg.heads, cfg.context, cfg.vocabulary)
    module = LitGPT2(net, cfg.optimizer, cfg.get("scheduler"), cfg.replicas)
    train, validation = token_loaders(cfg.tokens, cfg.context, cfg.vocabulary, cfg.batch_size)
    trainer.fit(module, train, validation, ckpt_path=cfg.ckpt_path)
    loss = validation_metric(trainer, module, validation, "val/loss")
    finish(trainer, {"validation loss": loss})
    return loss


if __name__ == "__main__":
    main()
