"""Train a small GPT on the bytes of Python's standard library, or of any text file.

python -m recipes.char_gpt
python -m recipes.char_gpt text=README.md trainer.precision=bf16-true
python -m recipes.char_gpt optimizer.lr=1e-3 'sample.prompt="class "' sample.temperature=0.5
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
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torchmetrics.text import Perplexity

from lightning_adam import AdamMixin, ConfigError
from recipes._common import check_positive, finish, read_text, text_loaders, validation_metric

BYTES = 256


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, residual: Tensor) -> Tensor:
        packed = self.query_key_value(self.attention_norm(residual))
        query, key, value = packed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        residual = residual + self.attention_output(attended.transpose(1, 2).flatten(2))
        return residual + self.feed_forward(residual)  # type: ignore[no-any-return]


class GPT(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.tokens = nn.Embedding(BYTES, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        # As in GPT-2. With torch's 1, the embeddings outweigh the blocks for many steps.
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        positions = torch.arange(text.shape[1], device=text.device)
        residual = self.tokens(text) + self.positions(positions)
        return self.head(self.norm(self.blocks(residual)))  # type: ignore[no-any-return]


class LitGPT(AdamMixin, L.LightningModule):
    def __init__(self, net: nn.Module, optimizer: DictConfig, scheduler: DictConfig | None) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.net = net
        self.perplexity = Perplexity()

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        logits, targets = self.predict(batch)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_validation_start(self) -> None:
        # Under bf16-true the sums of the metric would be bfloat16 too, and lose what is added.
        self.perplexity.set_dtype(torch.float32)

    def validation_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        logits, targets = self.predict(batch)
        self.perplexity(logits, targets)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.log("val/loss", loss, prog_bar=True)
        self.log("val/perplexity", self.perplexity, prog_bar=True)

    def predict(self, batch: tuple[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the float32 logits of each next byte, and the byte."""
        text = batch[0].long()
        return self.net(text[:, :-1]).float(), text[:, 1:]


def check(cfg: DictConfig) -> None:
    """Raises for settings that would fail during or after the run."""
    check_positive(cfg, "batch_size", "context", "width", "heads")
    if cfg.width % cfg.heads:
        raise ConfigError(
            f"width={cfg.width} is not a multiple of heads={cfg.heads}",
            f"Use for example width={cfg.heads * max(1, round(cfg.width / cfg.heads))}",
        )
    if not str(cfg.sample.prompt):
        raise ConfigError(
            "sample.prompt='' must have at least one byte", "Use for example sample.prompt=import"
        )
    if not cfg.sample.temperature > 0:
        raise ConfigError(
            f"sample.temperature={cfg.sample.temperature} must be above 0",
            "Use for example sample.temperature=0.1",
        )


@torch.inference_mode()
def sample_text(net: GPT, prompt: str, length: int, temperature: float, seed: int) -> str:
    """Returns the prompt and `length` bytes that continue it."""
    device = net.head.weight.device
    text = torch.tensor([list(prompt.encode())], device=device)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(length):
        logits = net(text[:, -net.context :])[0, -1].float().cpu()
        if not logits.isfinite().all():
            break  # The run diverged; its report shows where.
        probabilities = (logits / temperature).softmax(0)
        following = torch.multinomial(probabilities, 1, generator=generator).to(device)
        text = torch.cat([text, following[None]], dim=1)
    return bytes(text[0].tolist()).decode(errors="replace")


@hydra.main(version_base="1.3", config_path="conf", config_name="char_gpt")
def main(cfg: DictConfig) -> float | None:
    check(cfg)
    seed = L.seed_everything(cfg.seed)
    text = read_text(cfg.text, 16 * (cfg.context + 1))
    checkpoint = ModelCheckpoint(
        dirpath=f"{HydraConfig.get().runtime.output_dir}/checkpoints",
        filename="best",
        save_last=True,
        monitor="val/loss",
    )
    trainer = instantiate(
        cfg.trainer,
        logger=instantiate(cfg.get("logger")) or False,
        callbacks=[instantiate(cfg.get("adam_monitor")) or L.Callback(), checkpoint],
    )
    net = GPT(cfg.layers, cfg.width, cfg.heads, cfg.context)
    module = LitGPT(net, cfg.optimizer, cfg.get("scheduler"))
    train, validation = text_loaders(text, cfg.context, cfg.batch_size)
    trainer.fit(module, train, validation, ckpt_path=cfg.ckpt_path)
    loss = validation_metric(trainer, module, validation, "val/loss")
    bits = None if loss is None else loss / math.log(2)
    print(f"\n{sample_text(net, **cfg.sample, seed=seed)}")
    finish(trainer, {"validation bits per byte": bits})
    return bits


if __name__ == "__main__":
    main()
