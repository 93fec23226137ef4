"""Pre-train a small ModernBERT on source code, and fine-tune it to restore punctuation.

The encoder learns to predict masked bytes of Python's standard library. From a few examples it then
learns which punctuation mark is hidden: with LoRA, and with layer-wise learning rates.

python -m recipes.finetune_transformers
python -m recipes.finetune_transformers examples=32 optimizer.layer_decay.rate=0.9
python -m recipes.finetune_transformers lora.rank=4 lora.optimizer.lr=1e-2
"""

import math

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from transformers import ModernBertConfig, ModernBertForMaskedLM, ModernBertModel

from lightning_adam import AdamMixin, ConfigError
from recipes._common import (
    Loader,
    check_positive,
    finish,
    read_text,
    text_loaders,
    validation_metric,
)

MARKS = b"()[],.:="
# The byte 0 does not occur in source code.
PAD, MASK, VOCABULARY = 0, 256, 257
MASKED_FRACTION = 0.2
VALIDATION_EXAMPLES = 100


class LitMaskedLM(AdamMixin, L.LightningModule):
    def __init__(self, net: nn.Module, optimizer: DictConfig, scheduler: DictConfig | None) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.net = net

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        text = batch[0].long()
        is_masked = torch.rand(text.shape, device=text.device) < MASKED_FRACTION
        # transformers leaves labels of -100 out of the loss.
        labels = text.masked_fill(~is_masked, -100)
        loss: Tensor = self.net(text.masked_fill(is_masked, MASK), labels=labels).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss


class Restorer(nn.Module):
    """Predicts which punctuation mark is hidden in the middle of a text."""

    def __init__(self, encoder: ModernBertModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, len(MARKS))

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.encoder(text).last_hidden_state
        return self.head(hidden[:, text.shape[1] // 2])  # type: ignore[no-any-return]


class LitRestorer(AdamMixin, L.LightningModule):
    def __init__(self, net: nn.Module, optimizer: DictConfig, scheduler: DictConfig | None) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.net = net
        self.accuracy = MulticlassAccuracy(num_classes=len(MARKS), average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        text, marks = batch
        loss = cross_entropy(self.net(text), marks)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        text, marks = batch
        logits = self.net(text)
        self.accuracy(logits, marks)
        self.log("val/loss", cross_entropy(logits, marks), prog_bar=True)
        self.log("val/accuracy", self.accuracy, prog_bar=True)


class LoRA(nn.Module):
    """Adds the product of two small matrices to a weight (Hu et al. 2022, arXiv 2106.09685)."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.randn(rank, inputs) / math.sqrt(inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * self.up @ self.down


def add_lora(encoder: nn.Module, rank: int, alpha: float) -> None:
    """Freezes the encoder, and adds trained matrices to the weights of its linear layers."""
    encoder.requires_grad_(False)
    for layer in [each for each in encoder.modules() if isinstance(each, nn.Linear)]:
        register_parametrization(layer, "weight", LoRA(layer.weight, rank, alpha))


def make_examples(text: bytearray, context: int, count: int) -> TensorDataset:
    """Returns `count` texts for each punctuation mark, which is hidden in their middle."""
    pieces = torch.frombuffer(text, dtype=torch.uint8).unfold(0, context, 1)
    middle = context // 2
    generator = torch.Generator().manual_seed(0)
    chosen, marks = [], []
    for index, mark in enumerate(MARKS):
        found = (pieces[:, middle] == mark).nonzero().flatten()
        found = found[torch.randperm(len(found), generator=generator)[:count]]
        chosen.append(pieces[found])
        marks.append(torch.full((len(found),), index))
    texts = torch.cat(chosen).long()
    texts[:, middle] = MASK
    return TensorDataset(texts, torch.cat(marks))


def check(cfg: DictConfig) -> None:
    """Raises for sizes that do not fit each other or the data."""
    check_positive(cfg, "batch_size", "examples", "context", "heads", "lora.rank")
    unit = 2 * cfg.heads
    if cfg.width % unit:
        raise ConfigError(
            f"width={cfg.width} is not a multiple of twice heads={cfg.heads}, as rotary position"
            " embeddings need",
            f"Use for example width={unit * max(1, round(cfg.width / unit))}",
        )


@hydra.main(version_base="1.3", config_path="conf", config_name="finetune_transformers")
def main(cfg: DictConfig) -> float | None:
    check(cfg)
    L.seed_everything(cfg.seed)
    text = read_text(None, cfg.context)
    split = len(text) - len(text) // 16
    examples: Loader = DataLoader(
        make_examples(text[:split], cfg.context, cfg.examples), cfg.batch_size, shuffle=True
    )
    validation: Loader = DataLoader(
        make_examples(text[split:], cfg.context, VALIDATION_EXAMPLES), batch_size=400
    )
    config = ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=cfg.width,
        intermediate_size=2 * cfg.width,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        max_position_embeddings=cfg.context + 1,
        local_attention=16,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
    )

    print("\nPre-training")
    masked_lm = ModernBertForMaskedLM(config)
    phase = cfg.pretraining
    pieces, _ = text_loaders(text[:split], cfg.context, phase.batch_size)
    instantiate(phase.trainer).fit(LitMaskedLM(masked_lm, phase.optimizer, phase.scheduler), pieces)
    pretrained = masked_lm.model.state_dict()

    def finetune(net: nn.Module, optimizer: DictConfig, trainer: L.Trainer) -> float | None:
        module = LitRestorer(net, optimizer, cfg.get("scheduler"))
        trainer.fit(module, examples, validation)
        return validation_metric(trainer, module, validation, "val/accuracy")

    unlogged = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    print("\nFrom scratch")
    net = Restorer(ModernBertModel(config))
    from_scratch = finetune(net, cfg.scratch.optimizer, instantiate(cfg.trainer, **unlogged))

    print("\nFine-tuning with LoRA")
    net = Restorer(ModernBertModel(config))
    net.encoder.load_state_dict(pretrained)
    add_lora(net.encoder, cfg.lora.rank, cfg.lora.alpha)
    lora = finetune(net, cfg.lora.optimizer, instantiate(cfg.trainer, **unlogged))

    print("\nFine-tuning with layer decay")
    net = Restorer(ModernBertModel(config))
    net.encoder.load_state_dict(pretrained)
    checkpoint = ModelCheckpoint(
        dirpath=f"{HydraConfig.get().runtime.output_dir}/checkpoints",
        filename="best",
        monitor="val/accuracy",
        mode="max",
    )
    trainer = instantiate(
        cfg.trainer,
        logger=instantiate(cfg.get("logger")) or False,
        callbacks=[instantiate(cfg.get("adam_monitor")) or L.Callback(), checkpoint],
    )
    finetuned = finetune(net, cfg.optimizer, trainer)
    results = {
        "validation accuracy, from scratch": from_scratch,
        "validation accuracy, LoRA": lora,
        "validation accuracy, layer decay": finetuned,
    }
    finish(trainer, results)
    return finetuned


if __name__ == "__main__":
    main()
