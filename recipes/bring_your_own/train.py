"""Train a small network on handwritten digits. Replace the network and the data by yours.

python train.py
python train.py optimizer.lr=3e-4 'optimizer.betas=[0.9,0.95]' lightning_adam/scheduler=wsd
"""

import hydra
import lightning as L
import torch
import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_adam import AdamMixin


class LitClassifier(AdamMixin, L.LightningModule):
    def __init__(self, net: nn.Module, optimizer: DictConfig, scheduler: DictConfig) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.net = net

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


def digits() -> TensorDataset:
    """Returns the 1,797 images of 8 x 8 pixels that are bundled with scikit-learn."""
    pixels, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(pixels / 16).float(), torch.tensor(labels))


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    L.seed_everything(cfg.seed)
    # The same split in every run, so that runs with different seeds can be compared.
    train, val = random_split(digits(), [1397, 400], torch.Generator().manual_seed(0))
    net = nn.Sequential(
        nn.Linear(64, cfg.width), nn.LayerNorm(cfg.width), nn.ReLU(), nn.Linear(cfg.width, 10)
    )
    output_dir = HydraConfig.get().runtime.output_dir
    trainer = L.Trainer(
        max_epochs=cfg.max_epochs,
        callbacks=[instantiate(cfg.adam_monitor)],
        logger=WandbLogger(project="bring_your_own", save_dir=output_dir, offline=True),
        log_every_n_steps=10,
        default_root_dir=output_dir,
    )
    trainer.fit(
        LitClassifier(net, cfg.optimizer, cfg.scheduler),
        DataLoader(train, batch_size=cfg.batch_size, shuffle=True),
        DataLoader(val, batch_size=400),
    )
    wandb.finish()
    print(f"validation accuracy: {trainer.callback_metrics['val/accuracy']:.4f}")
    # A search minimizes what `main` returns.
    return float(trainer.callback_metrics["val/loss"])


if __name__ == "__main__":
    main()
