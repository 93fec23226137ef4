"""Train the CNN of recipes.mnist with LightningCLI instead of Hydra.

pip install 'lightning-adam[cli]'
python -m recipes.lightning_cli fit
python -m recipes.lightning_cli fit --model.optimizer.lr=3e-4 --model.scheduler.name=cosine
python -m recipes.lightning_cli fit --adam_monitor.statistics=all --trainer.max_epochs=3
python -m recipes.lightning_cli fit --print_config
"""

from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_adam import AdamMixin, AdamMonitor
from lightning_adam.config.optimizer import AdamConfig
from recipes._common import Loader, mnist_loaders, validation_metric


class LitClassifier(AdamMixin, L.LightningModule):
    """Its arguments are the options `--model.*`; LightningCLI checks their types."""

    def __init__(
        self, optimizer: AdamConfig, scheduler: dict[str, Any] | None = None, width: int = 32
    ) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.net = nn.Sequential(
            *(nn.Conv2d(1, width, kernel_size=3, padding=1), nn.BatchNorm2d(width)),
            *(nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, 2 * width, kernel_size=3, padding=1), nn.BatchNorm2d(2 * width)),
            *(nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(2 * width * 7 * 7, 10)),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.net(images)
        self.log("val/loss", cross_entropy(logits, labels), prog_bar=True)
        self.log("val/accuracy", (logits.argmax(dim=1) == labels).float().mean(), prog_bar=True)


class MNIST(L.LightningDataModule):
    """Its argument is the option `--data.batch_size`."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.train_loader, self.validation_loader = mnist_loaders(batch_size)

    def train_dataloader(self) -> Loader:
        return self.train_loader

    def val_dataloader(self) -> Loader:
        return self.validation_loader


class AdamCLI(LightningCLI):
    """Attaches AdamMonitor. Its settings are the options `--adam_monitor.*`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(AdamMonitor, "adam_monitor")
        parser.set_defaults({"adam_monitor.every_n_steps": 10, "model.optimizer.lr": 2e-3})


def main() -> None:
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": "outputs", "name": "lightning_cli"},
    }
    cli = AdamCLI(
        LitClassifier,
        MNIST,
        trainer_defaults={"max_epochs": 5, "log_every_n_steps": 10, "logger": logger},
        seed_everything_default=0,
    )
    validation = cli.datamodule.val_dataloader()
    accuracy = validation_metric(cli.trainer, cli.model, validation, "val/accuracy")
    print(f"\nvalidation accuracy: {'not measured' if accuracy is None else f'{accuracy:.4f}'}")
    print(f"run: {cli.trainer.log_dir}")


if __name__ == "__main__":
    main()
