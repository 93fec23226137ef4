"""Train a small conditional GAN on 5,000 MNIST images, with one Adam for each network.

python -m recipes.gan
python -m recipes.gan generator.lr=5e-4 'discriminator.betas=[0.9,0.999]' trainer.max_epochs=5
"""

from pathlib import Path
from typing import Any

import hydra
import lightning as L
import matplotlib.pyplot as plt
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig
from sklearn.neighbors import KNeighborsClassifier  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from lightning_adam import build_adam
from recipes._common import check_positive, finish, mnist_loaders, quoted, validation_metric


class LitGAN(L.LightningModule):
    def __init__(self, cfg: DictConfig, classifier: KNeighborsClassifier) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.cfg = cfg
        self.classifier = classifier
        self.generator = small_generator(cfg.noise, cfg.width)
        self.discriminator = small_discriminator(cfg.width)

    def configure_optimizers(self) -> Any:
        cfg, trainer = self.cfg, self.trainer
        return [
            build_adam(self.generator, cfg.generator, trainer=trainer),
            build_adam(self.discriminator, cfg.discriminator, trainer=trainer),
        ]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, digits = batch
        generator, discriminator = self.optimizers()  # type: ignore[attr-defined]
        generated = self.generate(digits)

        self.toggle_optimizer(discriminator)
        real, fake = self.judge(images, digits), self.judge(generated.detach(), digits)
        discriminator_loss = softplus(-real).mean() + softplus(fake).mean()
        discriminator.zero_grad()
        self.manual_backward(discriminator_loss)
        discriminator.step()
        self.untoggle_optimizer(discriminator)

        self.toggle_optimizer(generator)
        generator_loss = softplus(-self.judge(generated, digits)).mean()
        generator.zero_grad()
        self.manual_backward(generator_loss)
        generator.step()
        self.untoggle_optimizer(generator)

        self.log("train/generator_loss", generator_loss, prog_bar=True)
        self.log("train/discriminator_loss", discriminator_loss, prog_bar=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        digits = batch[1]
        generated = self.generate(digits).flatten(1).float().cpu()
        accuracy = self.classifier.score(generated, digits.cpu())
        self.log("val/recognized", accuracy, prog_bar=True)

    def generate(self, digits: Tensor) -> Tensor:
        """Returns an image of each digit."""
        noise = torch.randn(len(digits), self.cfg.noise).type_as(next(self.parameters()))
        return self.generator(torch.cat([noise, one_hot(digits, 10)], dim=1))  # type: ignore[no-any-return]

    def judge(self, images: Tensor, digits: Tensor) -> Tensor:
        """Returns the logits that the images are real, given their digits."""
        return self.discriminator(images).gather(1, digits[:, None])  # type: ignore[no-any-return]


def small_generator(noise: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(noise + 10, 2 * width * 7 * 7),
        nn.Unflatten(1, (2 * width, 7, 7)),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * width, width, kernel_size=4, stride=2, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.ConvTranspose2d(width, 1, kernel_size=4, stride=2, padding=1),
        nn.Sigmoid(),
    )


def small_discriminator(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, kernel_size=4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, kernel_size=4, stride=2, padding=1),
        nn.BatchNorm2d(2 * width),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(2 * width * 7 * 7, 10),
    )


@torch.inference_mode()
def draw(module: LitGAN, path: Path) -> None:
    """Writes a picture of ten generated images of each digit."""
    digits = torch.arange(10).repeat(10)
    images = module.eval().generate(digits.to(module.device)).float().cpu()
    rows = images.view(10, 10, 28, 28).transpose(1, 2)
    plt.imsave(path, rows.reshape(280, 280), cmap="gray", vmin=0, vmax=1)


@hydra.main(version_base="1.3", config_path="conf", config_name="gan")
def main(cfg: DictConfig) -> float | None:
    check_positive(cfg, "batch_size", "width")
    L.seed_everything(cfg.seed)
    output = Path(HydraConfig.get().runtime.output_dir)
    train, validation = mnist_loaders(cfg.batch_size)
    # A generated digit counts as recognized if the most similar real image shows that digit.
    images, digits = train.dataset.tensors  # type: ignore[attr-defined]
    classifier = KNeighborsClassifier(n_neighbors=1).fit(images.flatten(1), digits)
    images, digits = validation.dataset.tensors  # type: ignore[attr-defined]
    real = float(classifier.score(images.flatten(1), digits))
    checkpoint = ModelCheckpoint(
        dirpath=output / "checkpoints",
        filename="best",
        save_last=True,
        monitor="val/recognized",
        mode="max",
    )
    trainer = instantiate(
        cfg.trainer,
        logger=instantiate(cfg.get("logger")) or False,
        callbacks=[instantiate(cfg.get("adam_monitor")) or L.Callback(), checkpoint],
    )
    module = LitGAN(cfg, classifier)
    trainer.fit(module, train, validation, ckpt_path=cfg.ckpt_path)
    recognized = validation_metric(trainer, module, validation, "val/recognized")
    picture = output / "generated.png"
    draw(module, picture)
    finish(
        trainer,
        {
            "recognized generated digits": recognized,
            "recognized real digits": real,
            "picture": quoted(picture),
        },
    )
    return recognized


if __name__ == "__main__":
    main()
