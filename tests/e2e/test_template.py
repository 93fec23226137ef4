"""A project in the layout of lightning-hydra-template, its module with the mixin."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.commands import BIN, Finished, run, write_files

pytestmark = pytest.mark.slow

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
    return trainer, model


@hydra.main(version_base="1.3", config_path="../configs", config_name="train.yaml")
def main(cfg):
    trainer, model = train(cfg)
    (optimizer,) = trainer.optimizers
    (entry,) = trainer.lr_scheduler_configs
    seen = {{
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
    print("{PRINTED}" + json.dumps(seen))


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

MATRICES = {"net.body.0.weight", "net.head.weight"}
ALL = {f"net.{name}.{kind}" for name in ("body.0", "body.1", "head") for kind in ("weight", "bias")}
OF_HEAD = {"net.head.weight", "net.head.bias"}
HEAD = '[{name: head, match: "*head*", lr_scale: 10}]'
FALLING = (
    "model.optimizer.lr=0.01",
    "model.scheduler.patience=0",
    "model.scheduler.factor=0.5",
    "+model.scheduler.threshold=0.99",
)
"""Only a loss a hundred times lower counts as an improvement."""
PLATEAU = {
    "class": "ReduceLROnPlateau",
    "monitor": "val/loss",
    "interval": "epoch",
    "frequency": 1,
}

Trained = dict[str, Any]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    write_files(folder, FILES)
    return folder


def train(project: Path, *overrides: str) -> Finished:
    return run([BIN / "python", "-m", "src.train", *overrides], project)


def trained(project: Path, *overrides: str) -> list[Trained]:
    """What the jobs of a command say they trained with."""
    finished = train(project, *overrides)
    assert finished.returncode == 0, finished.output
    printed = [line for line in finished.lines if line.startswith(PRINTED)]
    return [json.loads(line.removeprefix(PRINTED)) for line in printed]


@pytest.fixture(scope="module")
def grouped(project: Path) -> dict[tuple[str, str], Trained]:
    """The template's own nodes, by what is added to them: weight_decay_on, groups."""
    added = [(on, groups) for on in ("matrices", "all") for groups in ("[]", HEAD)]
    jobs = trained(
        project,
        "-m",
        "model.optimizer.weight_decay=0.1",
        "+model.optimizer.weight_decay_on=matrices,all",
        f"+model.optimizer.groups=[],{HEAD}",
    )
    return dict(zip(added, jobs, strict=True))


@pytest.fixture(scope="module")
def swapped(project: Path) -> dict[str, Trained]:
    """What is trained with where other nodes stand in the place of the template's."""
    names = ["step", "annealing", "presets"]
    jobs = trained(project, "-m", f"experiment={','.join(names)}")
    return dict(zip(names, jobs, strict=True))


def settings(trained: Trained, setting: str) -> dict[str, Any]:
    """One setting of each group."""
    return {name: group[setting] for name, group in trained["groups"].items()}


def names(trained: Trained) -> dict[str, set[str]]:
    """The parameters of each group."""
    return {name: set(group["names"]) for name, group in trained["groups"].items()}


def trained_by_hand(project: Path, **exempt: float) -> list[float]:
    """torch alone, over the project's own network and samples; biases and norms may differ."""
    net_file = project / "src/models/components/dense_net.py"
    data_file = project / "src/data/digits_datamodule.py"
    torch.manual_seed(0)
    net = runpy.run_path(str(net_file))["DenseNet"](6, 8, 2)
    data = runpy.run_path(str(data_file))["DigitsDataModule"](BATCHES * BATCH_SIZE, BATCH_SIZE)
    matrices = [each for each in net.parameters() if each.ndim == 2]
    vectors = [each for each in net.parameters() if each.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, **exempt}]
    adam = torch.optim.Adam(groups, lr=1e-3, weight_decay=0.1)
    for _ in range(EPOCHS):
        for points, labels in data.train_dataloader():
            adam.zero_grad()
            loss: Tensor = nn.functional.cross_entropy(net(points), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
    parameters: list[float] = nn.utils.parameters_to_vector(net.parameters()).tolist()
    return parameters


def test_the_optimizer_and_the_plateau_of_the_templates_node_are_trained_with(
    grouped: dict[tuple[str, str], Trained],
) -> None:
    trained = grouped["matrices", "[]"]
    assert trained["class"] == "Adam"
    assert names(trained) == {"decay": MATRICES, "no_decay": ALL - MATRICES}
    assert settings(trained, "lr") == {"decay": 1e-3, "no_decay": 1e-3}
    assert settings(trained, "weight_decay") == {"decay": 0.1, "no_decay": 0.0}
    assert trained["scheduler"] == PLATEAU


def test_parameters_are_those_of_torch_alone_to_the_bit(
    project: Path, grouped: dict[tuple[str, str], Trained]
) -> None:
    spared, decayed = grouped["matrices", "[]"], grouped["all", "[]"]
    assert spared["parameters"] == trained_by_hand(project, weight_decay=0.0)
    assert decayed["parameters"] == trained_by_hand(project)


def test_weight_decay_on_and_groups_work_through_the_partial(
    grouped: dict[tuple[str, str], Trained],
) -> None:
    assert names(grouped["all", "[]"]) == {"decay": ALL}
    assert settings(grouped["all", "[]"], "weight_decay") == {"decay": 0.1}
    assert names(grouped["all", HEAD]) == {"decay": ALL - OF_HEAD, "head": OF_HEAD}
    both = grouped["matrices", HEAD]
    rates = {"decay": 1e-3, "no_decay": 1e-3, "head": 1e-2, "head_no_decay": 1e-2}
    assert settings(both, "lr") == pytest.approx(rates)
    decays = {"decay": 0.1, "no_decay": 0.0, "head": 0.1, "head_no_decay": 0.0}
    assert settings(both, "weight_decay") == decays


def test_what_is_typed_arrives_and_the_rate_falls_when_the_metric_stalls(project: Path) -> None:
    (falling,) = trained(project, *FALLING)
    # The first validation is the best so far; each of the later ones halves the rate.
    rate = 0.01 * 0.5 ** (EPOCHS - 1)
    assert settings(falling, "lr") == {"decay": rate, "no_decay": rate}
    assert falling["scheduler"] == PLATEAU


def test_a_wrong_keyword_is_refused_in_one_sentence(project: Path) -> None:
    refused = train(project, "+model.optimizer.beta=0.9")
    assert refused.returncode == 1
    (sentence,) = [line for line in refused.lines if "optimizer.beta=" in line[:20]]
    assert sentence.startswith("optimizer.beta=0.9: no such field; type for example ")
    for harm in ("Traceback", PRINTED):
        assert harm not in refused.output


def test_the_presets_stand_in_for_the_nodes(swapped: dict[str, Trained]) -> None:
    trained = swapped["presets"]
    assert trained["class"] == "AdamW"
    assert settings(trained, "peak") == {"decay": 2e-3, "no_decay": 2e-3}
    assert settings(trained, "lr") == {"decay": 0.0, "no_decay": 0.0}
    assert settings(trained, "weight_decay") == {"decay": 0.01, "no_decay": 0.0}
    assert trained["scheduler"]["interval"] == "step"
    assert "adam_moments/grad_norm/group/decay" in trained["metrics"]


def test_a_scheduler_that_counts_epochs_is_stepped_after_each(swapped: dict[str, Trained]) -> None:
    trained = swapped["step"]
    assert (trained["class"], trained["scheduler"]["class"]) == ("AdamW", "StepLR")
    assert trained["scheduler"]["interval"] == "epoch"
    assert settings(trained, "lr")["decay"] == 1e-3 * 0.5**EPOCHS


def test_a_scheduler_over_total_steps_is_stepped_after_each_of_them(
    swapped: dict[str, Trained],
) -> None:
    trained = swapped["annealing"]
    assert (trained["class"], trained["scheduler"]["class"]) == ("NAdam", "CosineAnnealingLR")
    assert trained["scheduler"]["interval"] == "step"
    assert settings(trained, "peak")["decay"] == 1e-3
    assert settings(trained, "lr")["decay"] == 0.0


def test_a_preset_merged_with_the_templates_node_is_refused_by_name(project: Path) -> None:
    refused = train(project, "experiment=merged")
    assert refused.returncode == 1
    assert "expected the fields of lightning_adam/optimizer alone" in refused.output
