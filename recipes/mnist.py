"""Train a small CNN on 5,000 MNIST images: the shortest use of AdamMixin and AdamMonitor.

python -m recipes.mnist
python -m recipes.mnist optimizer.lr=3e-4 'optimizer.betas=[0.9,0.95]' trainer.max_epochs=3
python -m recipes.mnist -m optimizer.lr=1e-4,1e-3
"""

from typing import Any

import hydra
import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from lightning_adam import AdamMixin
from recipes._common import check_positive, finish, mnist_loaders, validation_metric


class LitClassifier(AdamMixin, L.LightningModule):
    def __init__(self, net: nn.Module, optimizer: Any, scheduler: Any) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.net = net
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.net(images)
        self.accuracy(logits, labels)
        self.log("val/loss", cross_entropy(logits, labels), prog_bar=True)
        self.log("val/accuracy", self.accuracy, prog_bar=True)


def small_cnn(width: int) -> nn.Module:
    def block(channels_in: int, channels_out: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1)
        return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        *block(1, width),
        *block(width, 2 * width),
        nn.Flatten(),
        nn.Linear(2 * width * 7 * 7, 10),
    )


@hydra.main(version_base="1.3", config_path="conf", config_name="mnist")
def main(cfg: DictConfig) -> float | None:
    check_positive(cfg, "batch_size", "width")
    L.seed_everything(cfg.seed)
    checkpoint = ModelCheckpoint(
        dirpath=f"{HydraConfig.get().runtime.output_dir}/checkpoints",
        filename="best",
        save_last=True,
        monitor="val/accuracy",
        mode="max",
    )
    trainer = instantiate(
        cfg.trainer,
        logger=instantiate(cfg.get("logger")) or False,
        callbacks=[instantiate(cfg.get("adam_monitor")) or L.Callback(), checkpoint],
    )
    module = LitClassifier(small_cnn(cfg.width), cfg.optimizer, cfg.get("scheduler"))
    train, validation = mnist_loaders(cfg.batch_size)
    trainer.fit(module, train, validation, ckpt_path=cfg.ckpt_path)
    accuracy = validation_metric(trainer, module, validation, "val/accuracy")
    finish(trainer, {"validation accuracy": accuracy})
    return accuracy


if __name__ == "__main__":
    main()
