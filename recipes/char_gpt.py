"""A small GPT on the bytes of Python's own library or of any text, which writes some at the end.

python -m recipes.char_gpt
python -m recipes.char_gpt text=README.md trainer.precision=bf16-true
python -m recipes.char_gpt optimizer.lr=1e-3 'sample.prompt="class "' sample.temperature=0.5
"""

import math
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.text import Perplexity

from lightning_adam import AdamMixin, ConfigError
from recipes.looking import finish, validated
from recipes.quiet import quieten
from recipes.small_gpt import SmallGPT, library_text, text_pieces

VALIDATION_SHARE = 16
"""One byte of so many validates."""


class LitGPT(AdamMixin, L.LightningModule):
    def __init__(
        self, net: SmallGPT, optimizer: DictConfig, scheduler: DictConfig | None = None
    ) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.net = net
        self.perplexity = Perplexity()

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        logits, targets = self.predict(batch)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_validation_start(self) -> None:
        # bf16-true makes bf16 of the metric's sums too: what is added to them would be lost.
        self.perplexity.set_dtype(torch.float32)

    def validation_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        logits, targets = self.predict(batch)
        self.perplexity(logits, targets)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.log("val/loss", loss, prog_bar=True, sync_dist=True)
        self.log("val/perplexity", self.perplexity, prog_bar=True)

    def predict(self, batch: tuple[Tensor]) -> tuple[Tensor, Tensor]:
        """The logits of each next byte, and the byte."""
        text = batch[0].long()
        # In half precision too, the loss is one of single precision.
        return self.net(text[:, :-1]).float(), text[:, 1:]


def text_of(path: str | None, context: int) -> bytearray:
    """The text of a file, or of Python's own library; one that is too short is an error."""
    if path is not None and not Path(path).expanduser().is_file():
        raise ConfigError(
            f"text={path} does not exist: {Path(path).expanduser().absolute()}",
            "Use the path of a text, for example text=README.md, or text=null for Python's library",
        )
    text = library_text() if path is None else bytearray(Path(path).expanduser().read_bytes())
    enough = VALIDATION_SHARE * (context + 1)
    if len(text) < enough:
        raise ConfigError(
            f"text={'null' if path is None else path} has {len(text):,} bytes, fewer than"
            f" {enough:,}, which are {VALIDATION_SHARE} * (context + 1)",
            "Use a longer text, for example text=README.md, or a smaller context",
        )
    return text


def text_loaders(
    text: bytearray, context: int, batch_size: int
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Pieces that begin anywhere in the text; its end, piece by piece, validates."""
    end = len(text) - len(text) // VALIDATION_SHARE
    train = text_pieces(text[:end], context, every=1)
    validation = text_pieces(text[end:], context, every=context)
    return (
        DataLoader(TensorDataset(train), batch_size=batch_size, shuffle=True),
        DataLoader(TensorDataset(validation), batch_size=batch_size),
    )


def check_sample(sample: DictConfig) -> None:
    """Raises before the run for what would fail after it."""
    if not str(sample.prompt):
        raise ConfigError(
            "sample.prompt='' must have at least one byte", "Use for example sample.prompt=import"
        )
    if not sample.temperature > 0:
        raise ConfigError(
            f"sample.temperature={sample.temperature} must be above 0",
            "Use for example sample.temperature=0.1",
        )


@torch.inference_mode()
def sample_text(net: SmallGPT, prompt: str, length: int, temperature: float, seed: int) -> str:
    """The prompt, and `length` bytes that go on from it: the same ones for the same seed."""
    device = net.head.weight.device
    text = torch.tensor([list(prompt.encode())], device=device)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(length):
        logits = net(text[:, -net.context :])[0, -1].float().cpu()
        if not logits.isfinite().all():
            # Of a training that diverged there is still the report to look at.
            break
        chances = (logits / temperature).softmax(0)
        following = torch.multinomial(chances, 1, generator=generator).to(device)
        text = torch.cat([text, following[None]], dim=1)
    return bytes(text[0].tolist()).decode(errors="replace")


@hydra.main(version_base="1.3", config_path="conf", config_name="char_gpt")
def main(cfg: DictConfig) -> float:
    quieten()
    text = text_of(cfg.text, cfg.context)
    check_sample(cfg.sample)
    L.seed_everything(cfg.seed)
    logger = instantiate(cfg.logger)
    checkpoint = ModelCheckpoint(
        dirpath=f"{HydraConfig.get().runtime.output_dir}/checkpoints",
        filename="best",
        save_last=True,
        monitor="val/loss",
    )
    trainer = instantiate(
        cfg.trainer, logger=logger, callbacks=[instantiate(cfg.adam_monitor), checkpoint]
    )
    net = SmallGPT(
        cfg.layers,
        cfg.width,
        cfg.heads,
        context=cfg.context,
        embedding_std=cfg.embedding_std,
    )
    module = LitGPT(net, cfg.optimizer, cfg.scheduler)
    loaders = text_loaders(text, cfg.context, cfg.batch_size)
    trainer.fit(module, *loaders, ckpt_path=cfg.ckpt_path)
    bits = validated(trainer, "val/loss", cfg.ckpt_path, epochs=4) / math.log(2)
    perplexity = float(trainer.callback_metrics["val/perplexity"])
    print(f"\n{sample_text(net, **cfg.sample, seed=cfg.seed)}")
    finish(f"validation: {bits:.4f} bits a byte, perplexity {perplexity:.3f}", logger, checkpoint)
    return bits


if __name__ == "__main__":
    main()
