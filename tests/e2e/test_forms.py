"""The forms in which a config may come: LightningCLI, two optimizers, each of them in a Trainer."""

import csv
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from lightning.pytorch.cli import LightningCLI
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torch.utils.data import DataLoader

from lightning_adam import AdamMixin, ConfigError
from lightning_adam.schema import AdamConfig, CosineConfig
from tests.support.commands import BIN, Command, Finished, run
from tests.support.training import Lit, loader, loss_of, network, parameters, trainer

STEPS, WARMUP_STEPS, LR, WEIGHT_DECAY = 12, 3, 1e-2, 0.1

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
partial: Callable[..., Any] = functools.partial
HEAD = {"name": "head", "match": "net.3.*", "lr_scale": 10}
FROM_FILE = {
    "model": {
        "optimizer": {
            "lr": 0.5,
            "betas": [0.8, 0.9],
            "weight_decay_on": "all",
            "groups": [HEAD],
        },
        "scheduler": {"name": "cosine", "warmup_steps": 2},
    },
    "trainer": {**QUIET, "max_steps": 5},
}
TYPED = (
    "--model.optimizer.lr=0.5",
    "--model.optimizer.betas=[0.8,0.9]",
    "--model.optimizer.weight_decay_on=all",
    "--model.scheduler.name=cosine",
    "--model.scheduler.warmup_steps=2",
)
PRINTED = "trained with: "
CLI_APP = f"""
import json
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adam import AdamMixin
from lightning_adam.schema import AdamConfig


class Lit(AdamMixin, L.LightningModule):
    def __init__(self, optimizer: AdamConfig, scheduler: dict[str, Any] | None = None):
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.net = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(40, 6)), batch_size=4)


if __name__ == "__main__":
    trainer = LightningCLI(Lit, Data).trainer
    groups = trainer.optimizers[0].param_groups
    rates = {{group["name"]: group["initial_lr"] for group in groups}}
    print("{PRINTED}" + json.dumps([rates, groups[0]["betas"], trainer.global_step]))
"""
GAN = f"""
import json

import hydra
import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

from lightning_adam import build_adam


class GAN(L.LightningModule):
    def __init__(self, cfg):
        super().__init__()
        self.automatic_optimization = False
        self.cfg = cfg
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        generator, discriminator = self.optimizers()
        fake = self.generator(torch.randn_like(batch[0]))
        real_logits = self.discriminator(batch[0])
        fake_logits = self.discriminator(fake.detach())
        discriminator.zero_grad()
        self.manual_backward((softplus(-real_logits) + softplus(fake_logits)).mean())
        discriminator.step()
        generator.zero_grad()
        self.manual_backward(softplus(-self.discriminator(fake)).mean())
        generator.step()
        self.lr_schedulers().step()

    def configure_optimizers(self):
        cfg, trainer = self.cfg, self.trainer
        return [
            build_adam(self.generator, cfg.generator, cfg.scheduler, trainer=trainer),
            build_adam(self.discriminator, cfg.discriminator, trainer=trainer),
        ]


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    L.seed_everything(0)
    gan = GAN(cfg)
    before = [parameter.clone() for parameter in gan.parameters()]
    trainer = L.Trainer(
        max_epochs=2,
        logger=CSVLogger("."),
        callbacks=[instantiate(cfg.adam_monitor)],
        accelerator="cpu",
        log_every_n_steps=1,
        enable_progress_bar=False,
    )
    trainer.fit(gan, DataLoader(TensorDataset(torch.randn(40, 2)), batch_size=8))
    seen = [
        {{
            "class": type(optimizer).__name__,
            "peak": group.get("initial_lr"),
            "lr": group["lr"],
            "betas": group["betas"],
            "weight_decay": group["weight_decay"],
        }}
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups[:1]
    ]
    still = [
        name
        for (name, parameter), old in zip(gan.named_parameters(), before, strict=True)
        if torch.equal(parameter, old)
    ]
    print("{PRINTED}" + json.dumps([seen, still]))


if __name__ == "__main__":
    main()
"""
GAN_CONFIG = """
defaults:
  - lightning_adam/optimizer@generator: adam
  - lightning_adam/optimizer@discriminator: adamw
  - lightning_adam/scheduler: linear
  - lightning_adam/monitor: default
  - _self_
generator: {lr: 1e-3}
"""
PRESETS = """
defaults:
  - lightning_adam/optimizer: adamw
  - lightning_adam/scheduler: cosine
"""


class Data(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return loader(STEPS)


class Fitted(AdamMixin, L.LightningModule):
    net: nn.Module

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)


class Typed(Fitted):
    """As LightningCLI wants it: the types of its arguments stand in the signature."""

    def __init__(self, optimizer: AdamConfig, scheduler: dict[str, Any] | None = None) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.net = network()


class Untyped(Fitted):
    def __init__(self, optimizer: dict[str, Any], scheduler: dict[str, Any] | None = None) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.net = network()


class FromHparams(Fitted):
    """What it is trained with is in `self.hparams` alone."""

    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = network()


CommandLine = Callable[..., L.Trainer]


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """The trainer of a `fit` that is typed for LightningCLI, in the process of the tests."""

    def fit(module: type[L.LightningModule], *typed: str) -> L.Trainer:
        monkeypatch.setattr("sys.argv", ["train.py", "fit", *typed])
        cli = LightningCLI(
            module,
            Data,
            trainer_defaults={**QUIET, "max_steps": 5},
            save_config_callback=None,
            seed_everything_default=False,
        )
        return cli.trainer

    return fit


def test_lightning_cli_trains_with_what_is_typed(command_line: CommandLine) -> None:
    fit = command_line(Typed, *TYPED)
    (group,) = fit.optimizers[0].param_groups
    assert (group["initial_lr"], group["betas"], group["name"]) == (0.5, (0.8, 0.9), "decay")
    (entry,) = fit.lr_scheduler_configs
    assert isinstance(entry.scheduler, LambdaLR)
    assert (entry.interval, fit.global_step) == ("step", 5)
    assert group["lr"] == 0.0


def test_lightning_cli_reads_the_same_from_a_file_with_groups(tmp_path: Path) -> None:
    (tmp_path / "cli.py").write_text(CLI_APP, encoding="utf-8")
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(FROM_FILE), encoding="utf-8")
    command: Command = [BIN / "python", "cli.py", "fit", "--config", "fit.yaml"]
    finished = run([*command, "--model.optimizer.lr=0.25"], tmp_path)
    assert finished.returncode == 0, finished.output
    expected = [{"decay": 0.25, "head": 2.5}, [0.8, 0.9], 5]
    assert json.loads(finished.after(PRINTED)) == expected


def test_lightning_cli_refuses_a_key_that_is_no_field(
    command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command_line(Typed, "--model.optimizer.lrr=0.5")
    assert "model.optimizer.lrr" in capsys.readouterr().err


def test_what_lightning_cli_cannot_judge_is_refused_by_our_sentence(
    command_line: CommandLine,
) -> None:
    with pytest.raises(ConfigError) as refused:
        command_line(Typed, "--model.optimizer.lr=-0.5")
    assert str(refused.value).startswith("optimizer.lr=-0.5: expected a finite number above 0")


def test_lightning_cli_takes_a_class_by_its_target(command_line: CommandLine) -> None:
    node = {"_target_": "torch.optim.NAdam", "lr": 0.5, "weight_decay": 0.1, "groups": [HEAD]}
    fit = command_line(Untyped, f"--model.optimizer={json.dumps(node)}")
    assert type(fit.optimizers[0]) is torch.optim.NAdam
    rates = {group["name"]: group["lr"] for group in fit.optimizers[0].param_groups}
    assert rates == {"decay": 0.5, "no_decay": 0.5, "head": 5.0, "head_no_decay": 5.0}


@pytest.fixture(scope="module")
def adversaries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """A generator and a discriminator, each trained by an optimizer of its own."""
    folder = tmp_path_factory.mktemp("adversaries")
    (folder / "conf").mkdir()
    (folder / "gan.py").write_text(GAN, encoding="utf-8")
    (folder / "conf" / "config.yaml").write_text(GAN_CONFIG, encoding="utf-8")
    overrides = ["generator.betas=[0.5,0.9]", "discriminator.lr=4e-3", "scheduler.warmup_steps=1"]
    finished = run([BIN / "python", "gan.py", *overrides], folder)
    assert finished.returncode == 0, finished.output
    return folder, finished


def test_two_optimizers_keep_their_own_settings(adversaries: tuple[Path, Finished]) -> None:
    trained, still = json.loads(adversaries[1].after(PRINTED))
    assert still == []
    generator, discriminator = trained
    assert generator == {
        "class": "Adam",
        "peak": 1e-3,
        "lr": 0.0,
        "betas": [0.5, 0.9],
        "weight_decay": 0.0,
    }
    assert discriminator == {
        "class": "AdamW",
        "peak": None,
        "lr": 4e-3,
        "betas": [0.9, 0.999],
        "weight_decay": 0.01,
    }


def test_both_of_two_optimizers_are_measured(adversaries: tuple[Path, Finished]) -> None:
    (metrics,) = adversaries[0].rglob("metrics.csv")
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    for row in rows:
        for name in ("generator", "discriminator"):
            for scope in ("", "/group/decay", "/group/no_decay"):
                assert float(row[f"adam_moments/grad_norm/optimizer/{name}{scope}"]) > 0
    rates = [float(row["adam_schedule/lr/optimizer/generator"]) for row in rows]
    assert rates == pytest.approx([0.0, *(1e-3 * left / 9 for left in range(9, 0, -1))])
    assert {float(row["adam_schedule/lr/optimizer/discriminator"]) for row in rows} == {4e-3}


def factor(step: int) -> float:
    """The cosine after a linear warm-up, as the presets have it."""
    if step < WARMUP_STEPS:
        return step / WARMUP_STEPS
    return (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS))) / 2


def trained_by_hand(schedule: Callable[[torch.optim.Optimizer], Any]) -> list[Tensor]:
    """torch alone: AdamW over matrices that decay and vectors that do not."""
    net = network()
    matrices = [each for each in net.parameters() if each.ndim == 2]
    vectors = [each for each in net.parameters() if each.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    scheduler = schedule(adam)
    for batch in loader(STEPS):
        adam.zero_grad()
        loss_of(net, (batch[0], batch[1])).backward()  # type: ignore[no-untyped-call]
        adam.step()
        scheduler.step()
    return parameters(net)


def assert_equal(trained: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(trained, expected, strict=True))


ADAMW = {"lr": LR, "weight_decay": WEIGHT_DECAY, "decoupled_weight_decay": True}
COSINE = {"name": "cosine", "warmup_steps": WARMUP_STEPS}
BY_TARGET = {
    "_target_": "torch.optim.AdamW",
    "lr": LR,
    "weight_decay": WEIGHT_DECAY,
    "fused": True,
}
OPTIMIZERS: dict[str, Any] = {
    "typed node": OmegaConf.merge(OmegaConf.structured(AdamConfig), ADAMW),
    "DictConfig": OmegaConf.create(ADAMW),
    "dict": ADAMW,
    "dataclass": AdamConfig(lr=LR, weight_decay=WEIGHT_DECAY, decoupled_weight_decay=True),
    "partial": partial(torch.optim.AdamW, lr=LR, weight_decay=WEIGHT_DECAY, fused=True),
    "dict with a target": BY_TARGET,
    "DictConfig with a target": OmegaConf.create({**BY_TARGET, "_partial_": True}),
}
SCHEDULERS: dict[str, Any] = {
    "typed node": OmegaConf.merge(OmegaConf.structured(CosineConfig), COSINE),
    "DictConfig": OmegaConf.create(COSINE),
    "dict": COSINE,
    "dataclass": CosineConfig(warmup_steps=WARMUP_STEPS),
    "partial": partial(LambdaLR, lr_lambda=factor, interval="step"),
}
ANNEALING = {
    "_target_": "torch.optim.lr_scheduler.CosineAnnealingLR",
    "T_max": "total_steps",
}


@pytest.mark.parametrize("module", [Lit, FromHparams], ids=["keywords", "hparams"])
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_every_form_trains_the_same_to_the_bit(
    module: type[Lit | FromHparams], optimizer: Any, scheduler: Any
) -> None:
    lit = module(optimizer, scheduler)
    trainer(max_epochs=1).fit(lit, loader(STEPS))
    assert_equal(parameters(lit), trained_by_hand(partial(LambdaLR, lr_lambda=factor)))


@pytest.mark.parametrize("module", [Lit, FromHparams], ids=["keywords", "hparams"])
@pytest.mark.parametrize(
    "scheduler",
    [
        ANNEALING,
        OmegaConf.create({**ANNEALING, "_partial_": True}),
        partial(CosineAnnealingLR, T_max="total_steps"),
    ],
    ids=["dict", "DictConfig", "partial"],
)
def test_every_form_of_a_class_over_total_steps_trains_the_same_to_the_bit(
    module: type[Lit | FromHparams], scheduler: Any
) -> None:
    lit = module(ADAMW, scheduler)
    trainer(max_epochs=1).fit(lit, loader(STEPS))
    expected = trained_by_hand(partial(CosineAnnealingLR, T_max=STEPS))
    assert_equal(parameters(lit), expected)


def test_a_composed_preset_trains_the_same_to_the_bit(tmp_path: Path) -> None:
    settings = [f"optimizer.lr={LR}", f"optimizer.weight_decay={WEIGHT_DECAY}"]
    cfg = composed(tmp_path, *settings, f"scheduler.warmup_steps={WARMUP_STEPS}")
    lit = Lit(cfg.optimizer, cfg.scheduler)
    trainer(max_epochs=1).fit(lit, loader(STEPS))
    assert_equal(parameters(lit), trained_by_hand(partial(LambdaLR, lr_lambda=factor)))


def composed(folder: Path, *overrides: str) -> DictConfig:
    (folder / "config.yaml").write_text(PRESETS, encoding="utf-8")
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose("config", overrides=list(overrides))
