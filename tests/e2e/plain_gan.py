"""A script that trains two networks against each other, with two Adams and manual optimization."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class GAN(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(), nn.Linear(16, 1))

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        (real,) = batch
        optimizers: Any = self.optimizers()
        for optimizer, is_generator in zip(optimizers, (True, False), strict=True):
            self.toggle_optimizer(optimizer)
            fake = self.generator(torch.randn(len(real), 4))
            if is_generator:
                loss = self.loss(fake, 1.0)
            else:
                loss = (self.loss(real, 1.0) + self.loss(fake.detach(), 0.0)) / 2
            self.log("g_loss" if is_generator else "d_loss", loss)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def loss(self, points: Tensor, label: float) -> Tensor:
        judged = self.discriminator(points)
        target = torch.full_like(judged, label)
        return nn.functional.binary_cross_entropy_with_logits(judged, target)

    def configure_optimizers(self) -> Any:
        settings: Any = {"lr": 2e-4, "betas": (0.5, 0.999)}
        generator = torch.optim.Adam(self.generator.parameters(), **settings)
        discriminator = torch.optim.Adam(self.discriminator.parameters(), **settings)
        return [generator, discriminator], []


def main() -> None:
    L.seed_everything(1)
    data = TensorDataset(torch.randn(256, 2) * torch.tensor([1.0, 0.1]))
    trainer = L.Trainer(accelerator="cpu", max_epochs=2, log_every_n_steps=5, logger=CSVLogger("."))
    model = GAN()
    trainer.fit(model, DataLoader(data, batch_size=16, shuffle=True))
    torch.save(model.state_dict(), "parameters.pt")


if __name__ == "__main__":
    main()
