"""A small GAN of digits on 5,000 real MNIST images: two networks, each with an Adam of its own.

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
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from lightning_adam import build_adam
from recipes.looking import finish, format_value
from recipes.mnist import LitClassifier, mnist_loaders, small_cnn
from recipes.quiet import quieten

EACH = 100
"""How many of each digit are generated to be read."""
ROWS = 10
"""Of the picture, in each of which stands every digit."""


class LitGAN(L.LightningModule):
    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.cfg = cfg
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
        of_real, of_generated = self.judge(images, digits), self.judge(generated.detach(), digits)
        discriminator_loss = softplus(-of_real).mean() + softplus(of_generated).mean()
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

    def generate(self, digits: Tensor) -> Tensor:
        """An image of each of the digits."""
        noise = torch.randn(len(digits), self.cfg.noise, device=digits.device)
        return self.generator(torch.cat([noise, one_hot(digits, 10)], dim=1))  # type: ignore[no-any-return]

    def judge(self, images: Tensor, digits: Tensor) -> Tensor:
        """The logits of being a real image of the digit."""
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


class Reader(Callback):
    """After each epoch lets a classifier of real digits read what is generated, and draws it."""

    def __init__(self, classifier: nn.Module, picture: Path) -> None:
        self.classifier = classifier.eval()
        self.picture = picture

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        digits = torch.arange(10, device=pl_module.device).repeat(EACH)
        images = pl_module.generate(digits)
        read = self.classifier.to(pl_module.device)(images).argmax(dim=1)
        pl_module.log("val/read", (read == digits).float().mean(), prog_bar=True)
        tiles = images[: ROWS * 10].view(ROWS, 10, 28, 28).transpose(1, 2)
        plt.imsave(self.picture, tiles.reshape(ROWS * 28, 280).cpu(), cmap="gray")


@hydra.main(version_base="1.3", config_path="conf", config_name="gan")
def main(cfg: DictConfig) -> float:
    quieten()
    L.seed_everything(cfg.seed)
    output_dir = Path(HydraConfig.get().runtime.output_dir)
    train, validation = mnist_loaders(cfg.batch_size)

    print("\na classifier of the real digits")
    classifier = LitClassifier(small_cnn(cfg.reader.width), cfg.reader.optimizer, None)
    reading = instantiate(cfg.reader.trainer)
    reading.fit(classifier, train, validation)
    of_real = float(reading.callback_metrics["val/accuracy"])

    print("\na generator and a discriminator")
    picture = output_dir / "generated.png"
    checkpoint = ModelCheckpoint(output_dir / "checkpoints", "last")
    logger = instantiate(cfg.logger)
    callbacks = [instantiate(cfg.adam_monitor), Reader(classifier.net, picture), checkpoint]
    trainer = instantiate(cfg.trainer, logger=logger, callbacks=callbacks)
    trainer.fit(LitGAN(cfg), train)
    of_generated = float(trainer.callback_metrics["val/read"])
    result = (
        f"read as what they are: {of_generated:.1%} of the generated digits, {of_real:.1%} of the"
        f" real ones\npicture: {format_value(str(picture))}"
    )
    finish(result, logger, checkpoint)
    return of_generated


if __name__ == "__main__":
    main()
