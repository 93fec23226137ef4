"""Train a small diffusion model on MNIST, average its weights, and draw the digits it generates.

python -m recipes.diffusion
python -m recipes.diffusion optimizer.lr=1e-3 ema_decay=0.99 trainer.max_epochs=20
python -m recipes.diffusion sample.steps=100 sample.rows=4
"""

import math
from itertools import pairwise
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
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_adam import AdamMixin
from recipes._common import check_positive, finish, mnist_loaders, quoted, validation_metric

DIGITS = 10
IMAGE_SIZE = 28
FREQUENCIES = 16


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, condition_width: int) -> None:
        super().__init__()

        def convolution(channels: int) -> nn.Module:
            return nn.Sequential(
                nn.GroupNorm(1, channels),
                nn.SiLU(),
                nn.Conv2d(channels, channels_out, kernel_size=3, padding=1),
            )

        self.first = convolution(channels_in)
        self.condition = nn.Linear(condition_width, channels_out)
        self.second = convolution(channels_out)
        self.skip = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        hidden = self.first(images) + self.condition(condition)[:, :, None, None]
        return self.skip(images) + self.second(hidden)  # type: ignore[no-any-return]


class UNet(nn.Module):
    """Predicts the velocity of an image from the noisy image, its time and its digit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        condition_width = 4 * width
        self.time = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, condition_width),
            nn.SiLU(),
            nn.Linear(condition_width, condition_width),
        )
        self.digit = nn.Embedding(DIGITS, condition_width)
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4, width, 3, padding=1))
        self.down = ResidualBlock(width, width, condition_width)
        self.downsample = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.ModuleList(
            ResidualBlock(2 * width, 2 * width, condition_width) for _ in range(2)
        )
        self.upsample = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.up = ResidualBlock(2 * width, width, condition_width)
        self.head = nn.Sequential(
            nn.GroupNorm(1, width),
            nn.SiLU(),
            nn.Conv2d(width, 4, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def forward(self, images: Tensor, times: Tensor, digits: Tensor) -> Tensor:
        frequencies = torch.logspace(0, 3, FREQUENCIES, device=images.device, dtype=images.dtype)
        angles = times[:, None] * frequencies
        condition = self.time(torch.cat([angles.sin(), angles.cos()], dim=1)) + self.digit(digits)
        fine = self.down(self.stem(images), condition)
        coarse = self.downsample(fine)
        for block in self.middle:
            coarse = block(coarse, condition)
        upsampled = self.up(torch.cat([self.upsample(coarse), fine], dim=1), condition)
        return self.head(upsampled)  # type: ignore[no-any-return]


def signal_and_noise(times: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the factors of the image and of the noise at times from 0 to 1.

    This is the cosine schedule (Nichol & Dhariwal 2021, arXiv 2102.09672) in continuous time.
    """
    angles = times.view(-1, 1, 1, 1) * math.pi / 2
    return angles.cos(), angles.sin()


class LitDiffusion(AdamMixin, L.LightningModule):
    def __init__(
        self, net: nn.Module, optimizer: DictConfig, scheduler: DictConfig | None, ema_decay: float
    ) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.net = net
        average = get_ema_multi_avg_fn(ema_decay)  # type: ignore[no-untyped-call]
        self.ema = AveragedModel(net, multi_avg_fn=average)
        self.ema.requires_grad_(False)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.ema.update_parameters(self.net)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        noisy, times, velocity = self.add_noise(images)
        loss = mse_loss(self.net(noisy, times, digits), velocity)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, digits = batch
        # The same noise in each validation, so that the losses differ by the weights alone.
        noisy, times, velocity = self.add_noise(images, torch.Generator().manual_seed(batch_idx))
        for name, net in {"val/loss": self.ema, "val/loss_raw": self.net}.items():
            self.log(name, mse_loss(net(noisy, times, digits), velocity), prog_bar=True)

    def add_noise(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns noisy images, their times, and the velocities to predict.

        The velocity is a target of equal variance at all times (Salimans & Ho 2022, arXiv
        2202.00512, appendix D).
        """
        images = 2 * images - 1
        times = torch.rand(len(images), generator=generator).to(images)
        noise = torch.randn(images.shape, generator=generator).to(images)
        signal_rate, noise_rate = signal_and_noise(times)
        noisy = signal_rate * images + noise_rate * noise
        return noisy, times, signal_rate * noise - noise_rate * images


@torch.inference_mode()
def generate(net: nn.Module, digits: Tensor, steps: int, seed: int) -> Tensor:
    """Returns images of the digits, by deterministic steps (DDIM: Song et al. 2021, 2010.02502)."""
    shape = (len(digits), 1, IMAGE_SIZE, IMAGE_SIZE)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(digits.device)
    for time, next_time in pairwise(torch.linspace(1, 0, steps + 1, device=digits.device)):
        signal_rate, noise_rate = signal_and_noise(time)
        velocity = net(images, time.expand(len(digits)), digits)
        clean = (signal_rate * images - noise_rate * velocity).clamp(-1, 1)
        noise = (images - signal_rate * clean) / noise_rate
        signal_rate, noise_rate = signal_and_noise(next_time)
        images = signal_rate * clean + noise_rate * noise
    return images


def draw_digits(net: nn.Module, picture: Path, rows: int, steps: int, seed: int) -> None:
    """Draws a column of generated images for each digit."""
    device = next(net.parameters()).device
    digits = torch.arange(DIGITS, device=device).repeat(rows)
    tiles = generate(net, digits, steps, seed).view(rows, DIGITS, IMAGE_SIZE, IMAGE_SIZE)
    image = tiles.transpose(1, 2).reshape(rows * IMAGE_SIZE, DIGITS * IMAGE_SIZE)
    plt.imsave(picture, image.cpu(), cmap="gray", vmin=-1, vmax=1)


@hydra.main(version_base="1.3", config_path="conf", config_name="diffusion")
def main(cfg: DictConfig) -> float | None:
    check_positive(cfg, "batch_size", "width", "sample.rows", "sample.steps")
    L.seed_everything(cfg.seed)
    output_dir = Path(HydraConfig.get().runtime.output_dir)
    checkpoint = ModelCheckpoint(
        dirpath=output_dir / "checkpoints", filename="best", save_last=True, monitor="val/loss"
    )
    trainer = instantiate(
        cfg.trainer,
        logger=instantiate(cfg.get("logger")) or False,
        callbacks=[instantiate(cfg.get("adam_monitor")) or L.Callback(), checkpoint],
    )
    module = LitDiffusion(UNet(cfg.width), cfg.optimizer, cfg.get("scheduler"), cfg.ema_decay)
    train, validation = mnist_loaders(cfg.batch_size)
    trainer.fit(module, train, validation, ckpt_path=cfg.ckpt_path)
    loss = validation_metric(trainer, module, validation, "val/loss")
    results = {
        "validation loss, averaged weights": loss,
        "validation loss, raw weights": validation_metric(
            trainer, module, validation, "val/loss_raw"
        ),
    }
    picture = output_dir / "generated.png"
    draw_digits(module.ema.float().eval(), picture, **cfg.sample, seed=cfg.seed)
    finish(trainer, results | {"picture": quoted(picture)})
    return loss


if __name__ == "__main__":
    main()
