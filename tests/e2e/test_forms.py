"""LightningCLI, and a GAN of two optimizers with separate Hydra groups."""

import csv
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from lightning_adam import AdamMixin, ConfigError
from lightning_adam.config.errors import Source
from lightning_adam.config.optimizer import AdamConfig
from lightning_adam.optim.schedulers import scheduler_settings
from tests.support.commands import BIN, Finished, run, write_files
from tests.support.tables import each_row
from tests.support.training import loader, loss_of, network

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
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


class Data(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return loader(12)


class Configured(AdamMixin, L.LightningModule):
    net: nn.Module

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)


class Typed(Configured):
    """As LightningCLI wants it: the types of its arguments are in the signature."""

    def __init__(self, optimizer: AdamConfig, scheduler: dict[str, Any] | None = None) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.net = network()


class Untyped(Configured):
    def __init__(self, optimizer: dict[str, Any], scheduler: dict[str, Any] | None = None) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.net = network()


CommandLine = Callable[..., L.Trainer]


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """Runs `fit` of LightningCLI in the process of the tests, and returns the trainer."""

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


def test_lightning_cli_trains_with_its_options(command_line: CommandLine) -> None:
    fit = command_line(Typed, *TYPED)
    (group,) = fit.optimizers[0].param_groups
    assert (group["initial_lr"], group["betas"], group["name"]) == (0.5, (0.8, 0.9), "decay")
    (entry,) = fit.lr_scheduler_configs
    assert isinstance(entry.scheduler, LRScheduler)
    assert scheduler_settings(entry.scheduler)["name"] == "cosine"
    assert (entry.interval, fit.global_step) == ("step", 5)
    assert group["lr"] == 0.0


def test_lightning_cli_trains_with_a_file_and_groups(
    command_line: CommandLine, tmp_path: Path
) -> None:
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(FROM_FILE), encoding="utf-8")
    fit = command_line(Typed, "--config", "fit.yaml", "--model.optimizer.lr=0.25")
    groups = fit.optimizers[0].param_groups
    rates = {group["name"]: group["initial_lr"] for group in groups}
    assert rates == {"decay": 0.25, "head": 2.5}
    assert (groups[0]["betas"], fit.global_step) == ((0.8, 0.9), 5)


def test_lightning_cli_rejects_an_unknown_key(
    command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command_line(Typed, "--model.optimizer.lrr=0.5")
    assert "model.optimizer.lrr" in capsys.readouterr().err


COSINE = ("--model.optimizer.lr=0.1", "--model.scheduler.name=cosine")
INVALID: dict[tuple[str, ...], str] = {
    ("--model.optimizer.lr=-0.5",): "--model.optimizer.lr=-0.5 must be above 0.",
    ("--model.optimizer.betas=[0.9]",): "--model.optimizer.betas=[0.9] must have at least 2 items",
    ("--model.optimizer.layer_decay.rate=0.5",): (
        "--model.optimizer.layer_decay.pattern=null is required with a rate."
    ),
    (COSINE[0], "--model.scheduler.warmup_steps=2"): "--model.scheduler.name is required,",
    (*COSINE, "--model.scheduler.min_lr=1"): (
        "--model.scheduler.min_lr=1.0 is above the peak learning rate, 0.1."
    ),
}
"""Options, and the beginning of the first error."""
EXAMPLE = "Use for example "


def test_suggestions_of_errors_work_as_options(command_line: CommandLine) -> None:
    with each_row() as row:
        for options, beginning in INVALID.items():
            with row(options):
                errors = errors_until_it_trains(command_line, options)
                assert str(errors[0]).startswith(beginning)
                assert {error.path.source for error in errors if error.path} == {
                    Source.LIGHTNING_CLI
                }


def errors_until_it_trains(
    command_line: CommandLine, options: tuple[str, ...]
) -> list[ConfigError]:
    """The errors of a command line whose suggestions are followed one after the other."""
    errors: list[ConfigError] = []
    while True:
        try:
            fit = command_line(Typed, *options)
        except ConfigError as error:
            if str(error) in map(str, errors):
                raise
            errors.append(error)
            options = corrected(options, error)
        else:
            assert fit.global_step == 5
            return errors


def corrected(options: tuple[str, ...], error: ConfigError) -> tuple[str, ...]:
    """The options as the error suggests."""
    assert error.suggestion.startswith(EXAMPLE)
    assert error.path
    (suggested,) = shlex.split(error.suggestion.removeprefix(EXAMPLE))
    obsolete = {suggested.partition("=")[0]}
    if error.problem == "is not a setting":
        obsolete.add(error.path.name)
    return (*(each for each in options if each.partition("=")[0] not in obsolete), suggested)


def test_invalid_group_is_named_by_its_item_of_the_list(command_line: CommandLine) -> None:
    first = {"name": "first", "match": "net.0.*"}
    groups = json.dumps([first, {**HEAD, "match": "net.9.weight"}])
    with pytest.raises(ConfigError) as invalid:
        command_line(Typed, f"--model.optimizer.groups={groups}")
    beginning = "--model.optimizer.groups.1.match=net.9.weight matches nothing"
    assert str(invalid.value).startswith(beginning)
    suggestion = r"In item 1 of --model\.optimizer\.groups, use for example match: (.*)"
    found = re.fullmatch(suggestion, invalid.value.suggestion)
    assert found
    groups = json.dumps([first, {**HEAD, "match": found[1]}])
    fit = command_line(Typed, f"--model.optimizer.groups={groups}")
    assert "head" in {group["name"] for group in fit.optimizers[0].param_groups}


def test_dict_without_types_is_an_error_of_the_same_form(command_line: CommandLine) -> None:
    with pytest.raises(ConfigError) as invalid:
        command_line(Untyped, "--model.optimizer.lrr=0.5")
    assert str(invalid.value) == (
        "--model.optimizer.lrr=0.5 is not a setting. Use for example --model.optimizer.lr=0.5"
    )
    fit = command_line(Untyped, *corrected(("--model.optimizer.lrr=0.5",), invalid.value))
    assert fit.optimizers[0].param_groups[0]["lr"] == 0.5


def test_lightning_cli_trains_with_a_custom_class(command_line: CommandLine) -> None:
    node = {"_target_": "torch.optim.NAdam", "lr": 0.5, "weight_decay": 0.1, "groups": [HEAD]}
    fit = command_line(Untyped, f"--model.optimizer={json.dumps(node)}")
    assert type(fit.optimizers[0]) is torch.optim.NAdam
    rates = {group["name"]: group["lr"] for group in fit.optimizers[0].param_groups}
    assert rates == {"decay": 0.5, "head": 5.0}


PRINTED = "trained with: "
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
adam_monitor: {scopes: [model, group]}
"""


@pytest.fixture(scope="module")
def adversaries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """A run of a generator and a discriminator, each with its own optimizer."""
    folder = tmp_path_factory.mktemp("adversaries")
    write_files(folder, {"gan.py": GAN, "conf/config.yaml": GAN_CONFIG})
    overrides = ["generator.betas=[0.5,0.9]", "discriminator.lr=4e-3", "scheduler.warmup_steps=1"]
    finished = run([BIN / "python", "gan.py", *overrides], folder)
    assert finished.returncode == 0, finished.output
    return folder, finished


@pytest.mark.slow
def test_two_optimizers_keep_their_own_settings(adversaries: tuple[Path, Finished]) -> None:
    trained, unchanged = json.loads(adversaries[1].after(PRINTED))
    assert unchanged == []
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


@pytest.mark.slow
def test_both_optimizers_are_measured(adversaries: tuple[Path, Finished]) -> None:
    (metrics,) = adversaries[0].rglob("metrics.csv")
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    for row in rows:
        for name in ("generator", "discriminator"):
            for scope in ("", "group/decay/", "group/no_decay/"):
                assert float(row[f"adam_gradient/optimizer/{name}/{scope}grad_norm"]) > 0
    rates = [float(row["adam_schedule/optimizer/generator/lr"]) for row in rows]
    assert rates == pytest.approx([5e-4, *(1e-3 * left / 9 for left in range(9, 0, -1))])
    assert {float(row["adam_schedule/optimizer/discriminator/lr"]) for row in rows} == {4e-3}
