"""Tune AdamW for a small GRU that reads handwritten digits: 20 full runs in about two minutes.

The search writes a report; recipes/tune_output/tune.md is that of the first command.

python -m recipes.tune
python -m recipes.tune hydra.sweeper.n_trials=7
python -m recipes.tune hydra.mode=RUN optimizer.lr=1e-2
"""

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_adam import AdamMixin
from recipes._common import Loader, check_positive, finish, validation_metric

VALIDATION_IMAGES = 600


class LitReader(AdamMixin, L.LightningModule):
    """Reads an image row by row."""

    def __init__(self, width: int, optimizer: DictConfig, scheduler: DictConfig | None) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.rows = nn.GRU(input_size=8, hidden_size=width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        _, hidden = self.rows(images)
        return self.head(hidden[-1])  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val/loss", cross_entropy(self(images), labels), prog_bar=True)


def digit_loaders(batch_size: int) -> tuple[Loader, Loader]:
    """Returns loaders of the 1,797 digits of scikit-learn, 8 x 8 pixels with values from 0 to 1."""
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    images = torch.as_tensor(pixels / 16, dtype=torch.float32)[order].view(-1, 8, 8)
    labels = torch.as_tensor(digits, dtype=torch.int64)[order]
    train = TensorDataset(images[:-VALIDATION_IMAGES], labels[:-VALIDATION_IMAGES])
    validation = TensorDataset(images[-VALIDATION_IMAGES:], labels[-VALIDATION_IMAGES:])
    return (
        DataLoader(train, batch_size=batch_size, shuffle=True),
        DataLoader(validation, batch_size=VALIDATION_IMAGES),
    )


@hydra.main(version_base="1.3", config_path="conf", config_name="tune")
def main(cfg: DictConfig) -> float | None:
    check_positive(cfg, "batch_size", "width")
    L.seed_everything(cfg.seed, verbose=False)
    trainer = instantiate(cfg.trainer, logger=instantiate(cfg.get("logger")) or False)
    module = LitReader(cfg.width, cfg.optimizer, cfg.get("scheduler"))
    train, validation = digit_loaders(cfg.batch_size)
    trainer.fit(module, train, validation)
    loss = validation_metric(trainer, module, validation, "val/loss")
    if HydraConfig.get().mode is RunMode.RUN:
        finish(trainer, {"validation loss": loss})
    # The search minimizes what the app returns.
    return loss


if __name__ == "__main__":
    main()
