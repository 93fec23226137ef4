"""A CNN that has learned MNIST learns the digits of another data set from a few images of them.

python -m recipes.finetune
python -m recipes.finetune images=50 optimizer.layer_decay.rate=0.8 unfreeze_every_n_epochs=5
python -m recipes.finetune frozen_blocks=4 unfreeze_every_n_epochs=null
"""

import copy
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from omegaconf import DictConfig
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from recipes.looking import finish
from recipes.mnist import LitClassifier, mnist_loaders
from recipes.quiet import quieten

VALIDATION_IMAGES = 1000

Loaders = tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]


class GradualUnfreezing(BaseFinetuning):
    """Freezes the lower blocks, and lets them join one after the other, the upper first.

    Each joins at the layer decay's share of the learning rate that the block above it has (Howard
    & Ruder 2018, arXiv 1801.06146).
    """

    def __init__(self, blocks: int, every_n_epochs: int | None, rate: float) -> None:
        super().__init__()
        self.blocks = blocks
        self.every_n_epochs = every_n_epochs
        self.rate = rate

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net.trunk[: self.blocks])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if self.every_n_epochs is None or epoch % self.every_n_epochs:
            return
        nth = epoch // self.every_n_epochs
        if 1 <= nth <= self.blocks:
            block = pl_module.net.trunk[self.blocks - nth]
            # What is divided is the first group's: that of the lowest block trained from the start.
            self.unfreeze_and_add_param_group(block, optimizer, initial_denom_lr=self.rate**-nth)


class SmallCNN(nn.Module):
    """A trunk of four blocks, each of which halves the image, and a head."""

    def __init__(self, width: int) -> None:
        super().__init__()

        def block(channels_in: int, channels_out: int) -> nn.Module:
            convolution = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1)
            return nn.Sequential(
                convolution, nn.GroupNorm(4, channels_out), nn.ReLU(), nn.MaxPool2d(2)
            )

        channels = [1, width, 2 * width, 4 * width, 4 * width]
        self.trunk = nn.Sequential(*map(block, channels[:-1], channels[1:]))
        self.head = nn.Linear(4 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images).flatten(1))  # type: ignore[no-any-return]


def scanned_loaders(images: int, batch_size: int) -> Loaders:
    """Scans of 8 x 8 pixels that scikit-learn ships, on MNIST's canvas; so many to train with."""
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    scans = torch.as_tensor(pixels / 16, dtype=torch.float32)[order].view(-1, 1, 8, 8)
    canvas = pad(interpolate(scans, size=(20, 20), mode="bilinear"), [4, 4, 4, 4])
    labels = torch.as_tensor(digits, dtype=torch.int64)[order]
    train = TensorDataset(canvas[:images], labels[:images])
    validation = TensorDataset(canvas[-VALIDATION_IMAGES:], labels[-VALIDATION_IMAGES:])
    return (
        DataLoader(train, batch_size=batch_size, shuffle=True),
        DataLoader(validation, batch_size=VALIDATION_IMAGES),
    )


def fit(trainer: L.Trainer, net: SmallCNN, phase: DictConfig, loaders: Loaders) -> float:
    """The accuracy on the images that validate, at the end."""
    trainer.fit(LitClassifier(net, phase.optimizer, phase.scheduler), *loaders)
    return float(trainer.callback_metrics["val/accuracy"])


@hydra.main(version_base="1.3", config_path="conf", config_name="finetune")
def main(cfg: DictConfig) -> float:
    quieten()
    L.seed_everything(cfg.seed)
    logger = instantiate(cfg.logger)
    folder = f"{HydraConfig.get().runtime.output_dir}/checkpoints"
    checkpoint = ModelCheckpoint(folder, "best", "val/accuracy", mode="max")
    unfreezing = GradualUnfreezing(
        cfg.frozen_blocks, cfg.unfreeze_every_n_epochs, cfg.optimizer.layer_decay.rate
    )
    callbacks = [instantiate(cfg.adam_monitor), checkpoint, unfreezing]
    trainer = instantiate(cfg.trainer, logger=logger, callbacks=callbacks)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    few = scanned_loaders(cfg.images, cfg.batch_size)

    print("\nthe few images, from scratch")
    scratch = SmallCNN(cfg.width)
    from_scratch = fit(instantiate(cfg.trainer, **quiet), scratch, cfg.one_rate, few)
    print("\nMNIST")
    net = SmallCNN(cfg.width)
    mnist = mnist_loaders(cfg.pretraining.batch_size)
    fit(instantiate(cfg.pretraining.trainer, **quiet), net, cfg.pretraining, mnist)
    net.head.reset_parameters()
    print("\nthe few images, fine-tuned at one learning rate")
    same = copy.deepcopy(net)
    at_one_rate = fit(instantiate(cfg.trainer, **quiet), same, cfg.one_rate, few)
    print("\nthe few images, fine-tuned layer by layer")
    layer_by_layer = fit(trainer, net, cfg, few)
    result = (
        f"accuracy from {cfg.images} images\n"
        f"from scratch: {from_scratch:.4f}\n"
        f"fine-tuned at one learning rate: {at_one_rate:.4f}\n"
        f"fine-tuned layer by layer: {layer_by_layer:.4f}"
    )
    finish(result, logger, checkpoint)
    return layer_by_layer


if __name__ == "__main__":
    main()
