"""A script around Lightning's own demonstration model, which trains with SGD."""

import lightning as L
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger


def main() -> None:
    L.seed_everything(1)
    model = BoringModel()
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, log_every_n_steps=5, logger=CSVLogger("."))
    trainer.fit(model)
    torch.save(model.state_dict(), "parameters.pt")


if __name__ == "__main__":
    main()
