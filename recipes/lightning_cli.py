"""The same CNN on MNIST by LightningCLI, without Hydra: pip install 'lightning-adam[cli]'.

python -m recipes.lightning_cli fit
python -m recipes.lightning_cli fit --model.optimizer.lr=3e-4 --model.scheduler.name=cosine
python -m recipes.lightning_cli fit --adam_monitor.statistics=all --trainer.max_epochs=3
python -m recipes.lightning_cli fit --print_config
"""

from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_adam import AdamMonitor
from lightning_adam.config.optimizer import AdamConfig
from recipes.mnist import LitClassifier, mnist_loaders, small_cnn
from recipes.quiet import quieten


class LitTyped(LitClassifier):
    """What is typed as --model: LightningCLI reads the types of the arguments."""

    def __init__(
        self, optimizer: AdamConfig, scheduler: dict[str, Any] | None = None, width: int = 32
    ) -> None:
        super().__init__(small_cnn(width), optimizer, scheduler)


class MNIST(L.LightningDataModule):
    """What is typed as --data."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return mnist_loaders(self.batch_size)[0]

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return mnist_loaders(self.batch_size)[1]


class AdamCLI(LightningCLI):
    """Attaches the monitor, whose settings are typed as --adam_monitor."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(AdamMonitor, "adam_monitor")
        parser.set_defaults(
            {
                "adam_monitor.every_n_steps": 10,
                "model.optimizer.lr": 2e-3,
            }
        )


def main() -> None:
    quieten()
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": "outputs", "name": "lightning_cli"},
    }
    trainer = AdamCLI(
        LitTyped,
        MNIST,
        trainer_defaults={"max_epochs": 5, "log_every_n_steps": 10, "logger": logger},
        seed_everything_default=0,
    ).trainer
    print(f"\nvalidation accuracy: {float(trainer.callback_metrics['val/accuracy']):.4f}")
    print(f"run: {trainer.log_dir}")


if __name__ == "__main__":
    main()
