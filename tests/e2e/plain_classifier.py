"""A script as Lightning's documentation writes it: an image classifier with Adam."""

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class LitClassifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(images), labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> None:
    L.seed_everything(1)
    images = torch.rand(256, 8, 8)
    data = TensorDataset(images, images.flatten(1)[:, :10].argmax(dim=1))
    trainer = L.Trainer(accelerator="cpu", max_epochs=2, log_every_n_steps=5, logger=CSVLogger("."))
    model = LitClassifier()
    trainer.fit(model, DataLoader(data, batch_size=16, shuffle=True), DataLoader(data, 64))
    torch.save(model.state_dict(), "parameters.pt")


if __name__ == "__main__":
    main()
