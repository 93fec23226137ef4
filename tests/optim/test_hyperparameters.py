"""Checkpoints with configs in `save_hyperparameters` load with Lightning's defaults."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.tuner.tuning import Tuner
from omegaconf import OmegaConf
from torch import Tensor, nn

from lightning_adam import AdamMixin, build_adam
from lightning_adam.config.optimizer import AdamConfig
from lightning_adam.config.schedule import CosineConfig
from tests.support.tables import each_row
from tests.support.training import assert_same_parameters, loader, loss_of, network, trainer

LR, BETAS, TOTAL_STEPS = 1e-2, (0.9, 0.95), 20
STEPS = 2


class Base(AdamMixin, L.LightningModule):
    net: nn.Module

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)


class FromHparams(Base):
    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = network()


class PassesArguments(Base):
    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.save_hyperparameters()
        self.net = network()


class TemplateModule(Base):
    """Like the module of lightning-hydra-template."""

    def __init__(self, optimizer: Any, scheduler: Any, width: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = network()


class OwnHooks(PassesArguments):
    """Overrides hooks without `super()`, as most modules do."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["own"] = 1

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["own"] == 1


class WithoutMixin(L.LightningModule):
    """Builds the optimizer without the mixin."""

    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = network()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> Any:
        return build_adam(self, self.hparams["optimizer"], self.hparams["scheduler"])


class TakesWholeConfig(Base):
    """Takes the whole config as an argument."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(optimizer=cfg["optimizer"], scheduler=cfg["scheduler"])
        self.save_hyperparameters()
        self.net = network()


class HyperparametersAreConfig(Base):
    """The hyperparameters are the whole config."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(optimizer=cfg["optimizer"], scheduler=cfg["scheduler"])
        self.save_hyperparameters(cfg)
        self.net = network()


KINDS = (
    FromHparams,
    PassesArguments,
    TemplateModule,
    OwnHooks,
    WithoutMixin,
    TakesWholeConfig,
    HyperparametersAreConfig,
)
Form = Callable[[], Any]


def plain_node() -> Any:
    """Returns a config with interpolations to a part that the module does not get."""
    cfg = {
        "steps": TOTAL_STEPS,
        "lr": LR,
        "model": {
            "optimizer": {"lr": "${lr}", "betas": [*BETAS], "weight_decay": 0.1},
            "scheduler": {"name": "cosine", "total_steps": "${steps}"},
        },
    }
    return OmegaConf.create(cfg).model


def structured_node() -> Any:
    optimizer = AdamConfig(lr=LR, betas=[*BETAS], weight_decay=0.1)
    return OmegaConf.create(
        {
            "optimizer": OmegaConf.structured(optimizer),
            "scheduler": OmegaConf.structured(CosineConfig(total_steps=TOTAL_STEPS)),
        }
    )


def dataclasses() -> Any:
    optimizer = AdamConfig(lr=LR, betas=[*BETAS], weight_decay=0.1)
    return {"optimizer": optimizer, "scheduler": CosineConfig(total_steps=TOTAL_STEPS)}


def partial_nodes() -> Any:
    adamw = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": LR, "betas": [*BETAS]}
    cosine = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": TOTAL_STEPS}
    scheduler = {**cosine, "_partial_": True, "interval": "step"}
    return OmegaConf.create({"optimizer": adamw, "scheduler": scheduler})


def partials(convert: str) -> Any:
    cfg = partial_nodes()
    cfg.scheduler.pop("interval")
    return {name: instantiate(node, _convert_=convert) for name, node in cfg.items()}


FORMS: dict[str, Form] = {
    "untyped node": plain_node,
    "typed node": structured_node,
    "dataclass": dataclasses,
    "_partial_ node": partial_nodes,
    "partial": functools.partial(partials, "none"),
    "partial of plain values": functools.partial(partials, "all"),
}


def module_of(kind: Any, form: Form) -> Any:
    cfg = form()
    return (
        kind(cfg)
        if kind in (TakesWholeConfig, HyperparametersAreConfig)
        else kind(cfg["optimizer"], cfg["scheduler"])
    )


def fitted(module: Any, epochs: int, checkpoint: Path | None = None) -> L.Trainer:
    fit = trainer(max_epochs=epochs)
    fit.fit(module, loader(STEPS), ckpt_path=checkpoint)
    return fit


@pytest.mark.parametrize("kind", KINDS)
def test_run_with_saved_configs_is_resumed_and_loaded_at_the_defaults(
    kind: Any, tmp_path: Path
) -> None:
    checkpoint, weights = tmp_path / "first.ckpt", tmp_path / "weights.ckpt"
    with each_row() as row:
        for name, form in FORMS.items():
            uninterrupted_run = module_of(kind, form)
            fitted(uninterrupted_run, 2)
            fit = fitted(module_of(kind, form), 1)
            fit.save_checkpoint(checkpoint)
            fit.save_checkpoint(weights, weights_only=True)
            with row((name, "resumed")):
                resumed = module_of(kind, form)
                fitted(resumed, 2, checkpoint)
                assert_same_parameters(resumed, uninterrupted_run)
            # A module that overrides on_save_checkpoint without super() saves them unchanged.
            files = [checkpoint] if kind in (OwnHooks, WithoutMixin) else [checkpoint, weights]
            for file in files:
                with row((name, file.name)):
                    loaded = kind.load_from_checkpoint(file)
                    (optimizer,) = fitted(loaded, 1).optimizers
                    group = optimizer.param_groups[0]
                    assert (group["initial_lr"], tuple(group["betas"])) == (LR, BETAS)
                    assert group["lr"] < LR


@pytest.mark.parametrize(
    "kind",
    [
        FromHparams,
        PassesArguments,
        TemplateModule,
        OwnHooks,
        TakesWholeConfig,
        HyperparametersAreConfig,
    ],
)
def test_lr_find_restores_a_module_with_saved_configs(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with each_row() as row:
        for name, form in FORMS.items():
            with row(name):
                module = module_of(kind, form)
                before = [parameter.detach().clone() for parameter in module.parameters()]
                fit = trainer(max_epochs=1, enable_checkpointing=True)
                found = Tuner(fit).lr_find(
                    module, loader(STEPS), num_training=4, attr_name="optimizer_lr", min_lr=1e-3
                )
                assert found is not None
                assert all(map(torch.equal, before, module.parameters()))


class Data(L.LightningDataModule):
    """Has a ListConfig from Hydra as its argument."""

    def __init__(self, sizes: Any) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return loader(self.hparams["sizes"][0])


def test_hyperparameters_of_a_datamodule_are_plain_as_well(tmp_path: Path) -> None:
    first, again = trainer(max_epochs=1), trainer(max_epochs=2)
    first.fit(module_of(PassesArguments, plain_node), Data(OmegaConf.create([STEPS])))
    first.save_checkpoint(tmp_path / "first.ckpt")
    again.fit(
        module_of(PassesArguments, plain_node),
        Data(OmegaConf.create([STEPS])),
        ckpt_path=tmp_path / "first.ckpt",
    )
    assert again.global_step == 2 * STEPS
    assert Data.load_from_checkpoint(tmp_path / "first.ckpt").hparams["sizes"] == [STEPS]


def test_module_keeps_its_hyperparameters_as_they_were_given(tmp_path: Path) -> None:
    module = module_of(TakesWholeConfig, plain_node)
    fitted(module, 1).save_checkpoint(tmp_path / "first.ckpt")
    assert module.hparams.cfg.optimizer.lr == LR
    assert OmegaConf.is_config(module.hparams.cfg)
