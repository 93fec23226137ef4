"""A small GPT on the bytes of Python's own standard library, which is on every machine."""

import sysconfig
from pathlib import Path

import lightning as L
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, TensorDataset

from lightning_adam import AdamMixin

BYTES = 256
CONTEXT = 128
ENOUGH = 4 << 20
"""Bytes of text: more than a benchmark reads."""


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attention = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, residual: Tensor) -> Tensor:
        packed = self.queries_keys_values(self.before_attention(residual))
        queries, keys, values = packed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed: Tensor = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        residual = residual + self.attention(mixed.transpose(1, 2).flatten(2))
        return residual + self.feed_forward(residual)  # type: ignore[no-any-return]


class SmallGPT(nn.Module):
    """With the defaults 4.9 million parameters in 77 tensors."""

    def __init__(
        self, layers: int = 6, width: int = 256, heads: int = 4, vocabulary: int = BYTES
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.last = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        positions = torch.arange(text.shape[1], device=text.device)
        residual = self.tokens(text) + self.positions(positions)
        return self.head(self.last(self.blocks(residual)))  # type: ignore[no-any-return]


class LitGPT(AdamMixin, L.LightningModule):
    def __init__(self, net: nn.Module, optimizer: DictConfig) -> None:
        super().__init__(optimizer=optimizer)
        self.net = net

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        (text,) = batch
        logits: Tensor = self.net(text[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        self.log("train/loss", loss)
        return loss


def text_pieces() -> Tensor:
    """Pieces of the standard library's sources, of one byte more than the context."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) > ENOUGH:
            break
    return torch.frombuffer(text, dtype=torch.uint8).unfold(0, CONTEXT + 1, CONTEXT).long()


def text_loader(batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    """The pieces in batches."""
    return DataLoader(TensorDataset(text_pieces()), batch_size=batch_size, shuffle=True)
