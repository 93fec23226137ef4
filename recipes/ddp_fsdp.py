"""A small GPT on many processes: the bytes of Python's own library, whole or sharded.

python -m recipes.ddp_fsdp
python -m recipes.ddp_fsdp strategy=fsdp
python -m recipes.ddp_fsdp strategy=fsdp trainer.accelerator=gpu trainer.devices=8
recipes/ddp_fsdp_torchrun.sh strategy=fsdp
sbatch recipes/ddp_fsdp.slurm strategy=fsdp
"""

import math

import hydra
import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import DictConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_adam import ConfigError
from recipes.char_gpt import LitGPT, text_loaders, text_of
from recipes.looking import finish
from recipes.processes import register_resolvers
from recipes.quiet import quieten
from recipes.small_gpt import CONTEXT, SmallGPT


class LitShardedGPT(LitGPT):
    def __init__(
        self, net: SmallGPT, optimizer: DictConfig, scheduler: DictConfig | None, replicas: int
    ) -> None:
        super().__init__(net, optimizer, scheduler)
        self.replicas = replicas

    def configure_model(self) -> None:
        """Shards the network, block by block, if that is the strategy."""
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
        for block in self.net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


register_resolvers()


@hydra.main(version_base="1.3", config_path="conf", config_name="ddp_fsdp")
def main(cfg: DictConfig) -> float:
    quieten()
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
            "-m needs a launcher that starts all processes of a job, such as submitit: otherwise"
            " Lightning starts the whole sweep in each of them",
            "Run the jobs one by one",
        )
    net = SmallGPT(cfg.layers, cfg.width, cfg.heads)
    module = LitShardedGPT(net, cfg.optimizer, cfg.scheduler, cfg.replicas)
    loaders = text_loaders(text_of(None, CONTEXT), CONTEXT, cfg.batch_size)
    trainer.fit(module, *loaders, ckpt_path=cfg.ckpt_path)
    bits = float(trainer.callback_metrics["val/loss"]) / math.log(2)
    if trainer.is_global_zero:
        finish(f"validation: {bits:.4f} bits a byte", logger, checkpoint)
    return bits


if __name__ == "__main__":
    main()
