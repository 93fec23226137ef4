"""lightning-hydra-template, whose files do not mention lightning_adam, is tuned by one command."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lightning_adam.tune.history import History
from lightning_adam.tune.runs import Stage
from tests.support.commands import environment, run_text, write_files
from tests.support.template_project import DATA, NET

STEPS = 96
TRAIN = """
from pathlib import Path
import os
import sys

import hydra
import lightning as L

# As rootutils.setup_root does.
os.environ["PROJECT_ROOT"] = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, os.environ["PROJECT_ROOT"])


def train(cfg):
    if cfg.get("seed"):
        L.seed_everything(cfg.seed, workers=True)
    datamodule = hydra.utils.instantiate(cfg.data)
    model = hydra.utils.instantiate(cfg.model)
    callbacks = [hydra.utils.instantiate(each) for each in cfg.callbacks.values()]
    trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks, logger=[])
    if cfg.get("train"):
        trainer.fit(model=model, datamodule=datamodule, ckpt_path=cfg.get("ckpt_path"))
    train_metrics = trainer.callback_metrics
    if cfg.get("test"):
        # Lightning 2.6 cannot load its checkpoint, which has the network as a hyperparameter.
        ckpt_path = trainer.checkpoint_callback.best_model_path
        trainer.test(model=model, datamodule=datamodule, ckpt_path=ckpt_path)
    metric_dict = {**train_metrics, **trainer.callback_metrics}
    return metric_dict, {"trainer": trainer}


@hydra.main(version_base="1.3", config_path="../configs", config_name="train.yaml")
def main(cfg):
    metric_dict, _ = train(cfg)
    metric_name = cfg.get("optimized_metric")
    return metric_dict[metric_name].item() if metric_name else None


if __name__ == "__main__":
    main()
"""
MODULE = """
import torch
from lightning import LightningModule
from torchmetrics import MaxMetric, MeanMetric
from torchmetrics.classification.accuracy import Accuracy


class MNISTLitModule(LightningModule):
    def __init__(self, net, optimizer, scheduler, compile):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = net
        self.criterion = torch.nn.CrossEntropyLoss()
        self.val_acc = Accuracy(task="multiclass", num_classes=2)
        self.val_loss = MeanMetric()
        self.val_acc_best = MaxMetric()

    def on_train_start(self):
        self.val_loss.reset()
        self.val_acc.reset()
        self.val_acc_best.reset()

    def training_step(self, batch, batch_idx):
        return self.criterion(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        self.val_loss(self.criterion(logits, batch[1]))
        self.val_acc(logits.argmax(dim=1), batch[1])
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("val/acc", self.val_acc, on_step=False, on_epoch=True, prog_bar=True)

    def on_validation_epoch_end(self):
        self.val_acc_best(self.val_acc.compute())
        self.log("val/acc_best", self.val_acc_best.compute(), sync_dist=True, prog_bar=True)

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.criterion(self.net(batch[0]), batch[1]))

    def setup(self, stage):
        if self.hparams.compile and stage == "fit":
            self.net = torch.compile(self.net)

    def configure_optimizers(self):
        optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
        if self.hparams.scheduler is not None:
            scheduler = self.hparams.scheduler(optimizer=optimizer)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {
                    "scheduler": scheduler,
                    "monitor": "val/loss",
                    "interval": "epoch",
                    "frequency": 1,
                },
            }
        return {"optimizer": optimizer}
"""
TRAIN_CONFIG = """
# @package _global_
defaults:
  - _self_
  - data: mnist
  - model: mnist
  - callbacks: default
  - logger: null
  - trainer: default
  - paths: default
  - hydra: default
  - experiment: null
  - hparams_search: null
  - optional local: default
  - debug: null
task_name: "train"
tags: ["dev"]
train: True
test: True
ckpt_path: null
seed: null
"""
MODEL = """
_target_: src.models.mnist_module.MNISTLitModule
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
net:
  _target_: src.models.components.dense_net.DenseNet
  inputs: 6
  width: 8
  outputs: 2
compile: false
"""
CALLBACKS = """
model_checkpoint:
  _target_: lightning.pytorch.callbacks.ModelCheckpoint
  dirpath: ${paths.output_dir}/checkpoints
  filename: "epoch_{epoch:03d}"
  monitor: "val/acc"
  mode: "max"
  save_last: True
  auto_insert_metric_name: False
early_stopping:
  _target_: lightning.pytorch.callbacks.EarlyStopping
  monitor: "val/acc"
  patience: 100
  mode: "max"
"""
TRAINER = """
_target_: lightning.pytorch.trainer.Trainer
default_root_dir: ${paths.output_dir}
min_epochs: 1
max_epochs: 3
accelerator: cpu
devices: 1
check_val_every_n_epoch: 1
deterministic: False
"""
HYDRA = """
defaults:
  - override hydra_logging: default
  - override job_logging: default
run:
  dir: ${paths.log_dir}/${task_name}/runs/${now:%Y-%m-%d}_${now:%H-%M-%S}
sweep:
  dir: ${paths.log_dir}/${task_name}/multiruns/${now:%Y-%m-%d}_${now:%H-%M-%S}
  subdir: ${hydra.job.num}
job_logging:
  handlers:
    file:
      filename: ${hydra.runtime.output_dir}/${task_name}.log
"""
PATHS = """
root_dir: ${oc.env:PROJECT_ROOT}
data_dir: ${paths.root_dir}/data/
log_dir: ${paths.root_dir}/logs/
output_dir: ${hydra:runtime.output_dir}
work_dir: ${hydra:runtime.cwd}
"""
FILES = {
    "src/__init__.py": "",
    "src/train.py": TRAIN,
    "src/models/mnist_module.py": MODULE,
    "src/models/components/dense_net.py": NET,
    "src/data/mnist_datamodule.py": DATA + "\n    test_dataloader = val_dataloader\n",
    "configs/train.yaml": TRAIN_CONFIG,
    "configs/model/mnist.yaml": MODEL,
    "configs/data/mnist.yaml": """
_target_: src.data.mnist_datamodule.DigitsDataModule
samples: 256
batch_size: 8
""",
    "configs/callbacks/default.yaml": CALLBACKS,
    "configs/trainer/default.yaml": TRAINER,
    "configs/hydra/default.yaml": HYDRA,
    "configs/paths/default.yaml": PATHS,
}


@pytest.mark.slow
def test_template_is_tuned_without_a_change_to_its_files(tmp_path: Path) -> None:
    write_files(tmp_path, FILES)
    tuned = run_text(
        "python src/train.py -m hydra/sweeper=adam_tune hydra.sweeper.direction=maximize"
        " +optimized_metric=val/acc_best test=False"
        " hydra.sweeper.n_trials=4 model.optimizer.lr=1e-5",
        tmp_path,
        environment(CUDA_VISIBLE_DEVICES=""),
    )
    assert tuned.returncode == 0, tuned.output
    folder = tmp_path / "logs/train/multiruns/adam_tune_train"
    found = History(f"journal:{folder / 'trials.journal'}", "train", "maximize").runs()
    assert {(each.seed, each.steps, each.fixed_length) for each in found} == {(1, STEPS, "")}
    assert sum(each.request.length for each in found) == pytest.approx(4)
    assert {each.request.stage for each in found} == {Stage.start, Stage.ladder, Stage.search}
    results = OmegaConf.load(folder / "optimization_results.yaml")
    assert results.best_value > results.start_value
    line = tuned.after("overrides: ")
    # The node of the template has no betas.
    assert "++model.optimizer.betas=" in line
    again = run_text(f"python src/train.py {line}", tmp_path, environment(CUDA_VISIBLE_DEVICES=""))
    assert again.returncode == 0, again.output
