"""Every form of a config trains bit-identically to plain torch."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from lightning_adam import AdamMixin, build_adam
from lightning_adam.config.optimizer import AdamConfig
from lightning_adam.config.schedule import CosineConfig
from tests.support.pairwise import pairwise_params
from tests.support.training import Lit, loader, loss_of, network, parameters, trainer

STEPS, WARMUP_STEPS, LR, WEIGHT_DECAY = 12, 3, 1e-2, 0.1
partial: Callable[..., Any] = functools.partial


class FromHparams(AdamMixin, L.LightningModule):
    """Has its configs only in `self.hparams`."""

    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = network()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)


def factor(step: int) -> float:
    """Returns the factor of a cosine with a linear warm-up, like the presets."""
    if step < WARMUP_STEPS:
        return (step + 1) / (WARMUP_STEPS + 1)
    return (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS))) / 2


def parameters_by_hand(schedule: Callable[[torch.optim.Optimizer], Any]) -> list[Tensor]:
    """Returns the parameters after training with torch.optim.AdamW, with decay of matrices only."""
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
    "weight_decay_on": "matrices",
}
ARGUMENTS: dict[str, Any] = {name: each for name, each in BY_TARGET.items() if name != "_target_"}
OPTIMIZERS: dict[str, Any] = {
    "typed node": OmegaConf.merge(OmegaConf.structured(AdamConfig), ADAMW),
    "DictConfig": OmegaConf.create(ADAMW),
    "dict": ADAMW,
    "dataclass": AdamConfig(lr=LR, weight_decay=WEIGHT_DECAY, decoupled_weight_decay=True),
    "partial": partial(torch.optim.AdamW, **ARGUMENTS),
    "dict with a target": BY_TARGET,
    "DictConfig with a target": OmegaConf.create({**BY_TARGET, "_partial_": True}),
}
SCHEDULES: dict[str, Any] = {
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
MODULES: dict[str, Any] = {"keywords": Lit, "hparams": FromHparams}


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "module"), pairwise_params(OPTIMIZERS, SCHEDULES, MODULES)
)
def test_every_form_trains_bit_identically(
    optimizer: Any, scheduler: Any, module: type[Lit | FromHparams]
) -> None:
    lit = module(optimizer, scheduler)
    trainer(max_epochs=1).fit(lit, loader(STEPS))
    assert_equal(parameters(lit), parameters_by_hand(partial(LambdaLR, lr_lambda=factor)))


@pytest.mark.parametrize(
    ("scheduler", "module"),
    [
        (ANNEALING, Lit),
        (OmegaConf.create({**ANNEALING, "_partial_": True}), FromHparams),
        (partial(CosineAnnealingLR, T_max="total_steps"), FromHparams),
    ],
    ids=["dict", "DictConfig", "partial"],
)
def test_every_form_of_a_class_with_total_steps_trains_bit_identically(
    scheduler: Any, module: type[Lit | FromHparams]
) -> None:
    lit = module(ADAMW, scheduler)
    trainer(max_epochs=1).fit(lit, loader(STEPS))
    expected = parameters_by_hand(partial(CosineAnnealingLR, T_max=STEPS))
    assert_equal(parameters(lit), expected)


PRESETS = """
defaults:
  - lightning_adam/optimizer: adamw
  - lightning_adam/scheduler: cosine
"""


def test_composed_presets_train_bit_identically(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(PRESETS, encoding="utf-8")
    settings = [f"optimizer.lr={LR}", f"optimizer.weight_decay={WEIGHT_DECAY}"]
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        cfg = compose("config", [*settings, f"scheduler.warmup_steps={WARMUP_STEPS}"])
    lit = Lit(cfg.optimizer, cfg.scheduler)
    trainer(max_epochs=1).fit(lit, loader(STEPS))
    assert_equal(parameters(lit), parameters_by_hand(partial(LambdaLR, lr_lambda=factor)))


class WithoutMixin(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        return build_adam(self.net, ADAMW, COSINE, steps)


def test_build_adam_trains_bit_identically_without_the_mixin() -> None:
    module = WithoutMixin()
    trainer(max_epochs=1).fit(module, loader(STEPS))
    assert_equal(parameters(module), parameters_by_hand(partial(LambdaLR, lr_lambda=factor)))
