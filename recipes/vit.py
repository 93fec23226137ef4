"""Train a small Vision Transformer on 5,000 MNIST images, with warm-up and weight decay.

The class token, the position embedding, biases and norms do not decay: the table that is printed
before the run lists them as `no_decay`.

python -m recipes.vit
python -m recipes.vit optimizer.weight_decay=0.3 scheduler.warmup_ratio=0.2
python -m recipes.vit patch_size=4 width=96 trainer.max_epochs=5
"""

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from lightning_adam import AdamMixin, ConfigError
from recipes._common import check_positive, finish, mnist_loaders, validation_metric

IMAGE_SIZE = 28
DIGITS = 10


class ViT(nn.Module):
    def __init__(self, patch_size: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        patches = (IMAGE_SIZE // patch_size) ** 2
        self.patches = nn.Conv2d(1, width, kernel_size=patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.randn(1, 1 + patches, width) * 0.02)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width,
                    heads,
                    dim_feedforward=4 * width,
                    dropout=0.0,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(layers)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, DIGITS)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        class_token = self.class_token.expand(len(images), -1, -1)
        tokens = torch.cat([class_token, patches], dim=1) + self.position_embedding
        return self.head(self.norm(self.blocks(tokens)[:, 0]))  # type: ignore[no-any-return]


class LitViT(AdamMixin, L.LightningModule):
    def __init__(self, net: nn.Module, optimizer: DictConfig, scheduler: DictConfig | None) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.net = net
        self.accuracy = MulticlassAccuracy(num_classes=DIGITS, average="micro")

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


def check(cfg: DictConfig) -> None:
    """Raises for sizes that do not fit each other."""
    check_positive(cfg, "batch_size", "width", "heads")
    if cfg.patch_size not in (sizes := [1, 2, 4, 7, 14, 28]):
        raise ConfigError(
            f"patch_size={cfg.patch_size} does not divide the image size, {IMAGE_SIZE}",
            f"Use one of {', '.join(map(str, sizes))}",
        )
    if cfg.width % cfg.heads:
        raise ConfigError(
            f"width={cfg.width} is not a multiple of heads={cfg.heads}",
            f"Use for example width={cfg.heads * max(1, round(cfg.width / cfg.heads))}",
        )


@hydra.main(version_base="1.3", config_path="conf", config_name="vit")
def main(cfg: DictConfig) -> float | None:
    check(cfg)
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
    net = ViT(cfg.patch_size, cfg.layers, cfg.width, cfg.heads)
    module = LitViT(net, cfg.optimizer, cfg.get("scheduler"))
    train, validation = mnist_loaders(cfg.batch_size)
    trainer.fit(module, train, validation, ckpt_path=cfg.ckpt_path)
    accuracy = validation_metric(trainer, module, validation, "val/accuracy")
    finish(trainer, {"validation accuracy": accuracy})
    return accuracy


if __name__ == "__main__":
    main()
