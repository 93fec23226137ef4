"""A project in the layout of lightning-hydra-template, its module with the mixin."""

PRINTED = "trained with: "
EPOCHS, BATCHES, BATCH_SIZE = 3, 4, 8

TRAIN = f"""
import json

import hydra
import lightning as L
from hydra.utils import instantiate
from torch.nn.utils import parameters_to_vector


def train(cfg):
    L.seed_everything(cfg.seed, workers=True)
    datamodule = instantiate(cfg.data)
    model = instantiate(cfg.model)
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values()]
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=[])
    trainer.fit(model=model, datamodule=datamodule, ckpt_path=cfg.ckpt_path)
    (optimizer,) = trainer.optimizers
    (entry,) = trainer.lr_scheduler_configs
    return {{
        "class": type(optimizer).__name__,
        "groups": {{
            group["name"]: {{
                "names": group["param_names"],
                "peak": group.get("initial_lr"),
                "lr": group["lr"],
                "weight_decay": group["weight_decay"],
            }}
            for group in optimizer.param_groups
        }},
        "scheduler": {{
            "class": type(entry.scheduler).__name__,
            "monitor": entry.monitor,
            "interval": entry.interval,
            "frequency": entry.frequency,
        }},
        "parameters": parameters_to_vector(model.parameters()).tolist(),
        "metrics": sorted(trainer.callback_metrics),
    }}


@hydra.main(version_base="1.3", config_path="../configs", config_name="train.yaml")
def main(cfg):
    print("{PRINTED}" + json.dumps(train(cfg)))


if __name__ == "__main__":
    main()
"""
MODULE = """
import torch
from lightning import LightningModule

from lightning_adam import AdamMixin


class DigitsLitModule(AdamMixin, LightningModule):
    def __init__(self, net, optimizer, scheduler, compile):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = net
        self.criterion = torch.nn.CrossEntropyLoss()

    def setup(self, stage):
        if self.hparams.compile and stage == "fit":
            self.net = torch.compile(self.net)

    def training_step(self, batch, batch_idx):
        loss = self.criterion(self.net(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.criterion(self.net(batch[0]), batch[1]))
"""
NET = """
from torch import Tensor, nn


class DenseNet(nn.Module):
    def __init__(self, inputs, width, outputs):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU())
        self.head = nn.Linear(width, outputs)

    def forward(self, points):
        return self.head(self.body(points))
"""
DATA = """
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset


class DigitsDataModule(LightningDataModule):
    def __init__(self, samples, batch_size):
        super().__init__()
        self.save_hyperparameters(logger=False)
        points = torch.randn(samples, 6, generator=torch.Generator().manual_seed(5))
        self.samples = TensorDataset(points, (points[:, 0] > 0).long())

    def train_dataloader(self):
        return DataLoader(self.samples, batch_size=self.hparams.batch_size)

    def val_dataloader(self):
        return DataLoader(self.samples, batch_size=self.hparams.samples)
"""
TRAIN_CONFIG = """
defaults:
  - _self_
  - data: digits
  - model: digits
  - callbacks: default
  - trainer: default
  - experiment: null

seed: 0
ckpt_path: null
"""
BARE_MODEL = """
_target_: src.models.digits_module.DigitsLitModule
net:
  _target_: src.models.components.dense_net.DenseNet
  inputs: 6
  width: 8
  outputs: 2
compile: false
"""
MODEL = f"""{BARE_MODEL}
optimizer:
  _target_: torch.optim.Adam
  _partial_: true
  lr: 0.001
  weight_decay: 0.0
scheduler:
  _target_: torch.optim.lr_scheduler.ReduceLROnPlateau
  _partial_: true
  mode: min
  factor: 0.1
  patience: 10
"""
STEP = """# @package _global_
defaults:
  - override /model: bare
model:
  optimizer: {_target_: torch.optim.AdamW, _partial_: true, lr: 0.001}
  scheduler: {_target_: torch.optim.lr_scheduler.StepLR, _partial_: true, step_size: 1, gamma: 0.5}
"""
ANNEALING = """# @package _global_
defaults:
  - override /model: bare
model:
  optimizer: {_target_: torch.optim.NAdam, _partial_: true, lr: 0.001}
  scheduler:
    _target_: torch.optim.lr_scheduler.CosineAnnealingLR
    _partial_: true
    T_max: total_steps
"""
PRESETS = """# @package _global_
defaults:
  - /lightning_adam/optimizer@model.optimizer: adamw
  - /lightning_adam/scheduler@model.scheduler: cosine
  - /lightning_adam/monitor@callbacks.adam_monitor: default
  - override /model: bare
model:
  optimizer: {lr: 0.002}
  scheduler: {warmup_steps: 2}
"""
MERGED = """# @package _global_
defaults:
  - /lightning_adam/optimizer@model.optimizer: adamw
"""
FILES = {
    "src/__init__.py": "",
    "src/train.py": TRAIN,
    "src/models/digits_module.py": MODULE,
    "src/models/components/dense_net.py": NET,
    "src/data/digits_datamodule.py": DATA,
    "configs/train.yaml": TRAIN_CONFIG,
    "configs/model/digits.yaml": MODEL,
    "configs/model/bare.yaml": BARE_MODEL,
    "configs/data/digits.yaml": f"""
_target_: src.data.digits_datamodule.DigitsDataModule
samples: {BATCHES * BATCH_SIZE}
batch_size: {BATCH_SIZE}
""",
    "configs/trainer/default.yaml": f"""
_target_: lightning.pytorch.trainer.Trainer
default_root_dir: ${{hydra:runtime.output_dir}}
max_epochs: {EPOCHS}
accelerator: cpu
devices: 1
log_every_n_steps: 1
enable_progress_bar: false
""",
    "configs/callbacks/default.yaml": """
model_checkpoint:
  _target_: lightning.pytorch.callbacks.ModelCheckpoint
  dirpath: ${hydra:runtime.output_dir}/checkpoints
  monitor: val/loss
""",
    "configs/experiment/step.yaml": STEP,
    "configs/experiment/annealing.yaml": ANNEALING,
    "configs/experiment/presets.yaml": PRESETS,
    "configs/experiment/merged.yaml": MERGED,
}
