"""A small GPT on bytes, and the loaders of its text."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, TensorDataset

from lightning_adam import AdamMixin
from recipes._common import read_text

BYTES = 256
CONTEXT = 128


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
    """With the defaults 4.9 million parameters in 77 tensors.

    Numbers that the benchmarks have recorded depend on the order in which they are drawn.
    """

    def __init__(
        self,
        layers: int = 6,
        width: int = 256,
        heads: int = 4,
        vocabulary: int = BYTES,
        context: int = CONTEXT,
        embedding_std: float = 1.0,
    ) -> None:
        super().__init__()
        self.context = context
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.last = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        with torch.no_grad():
            self.tokens.weight.mul_(embedding_std)
            self.positions.weight.mul_(embedding_std)

    def forward(self, text: Tensor) -> Tensor:
        positions = torch.arange(text.shape[1], device=text.device)
        residual = self.tokens(text) + self.positions(positions)
        return self.head(self.last(self.blocks(residual)))  # type: ignore[no-any-return]


class LitGPT(AdamMixin, L.LightningModule):
    """Trains the network to predict the next byte."""

    def __init__(self, net: SmallGPT, optimizer: Any) -> None:
        super().__init__(optimizer=optimizer)
        self.net = net

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        (text,) = batch
        loss = cross_entropy(self.net(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        self.log("train/loss", loss, prog_bar=True)
        return loss


def library_text() -> bytearray:
    """The sources of Python's standard library, in alphabetical order."""
    return read_text(None, 0)


def text_pieces(text: bytearray, context: int = CONTEXT, every: int = CONTEXT) -> Tensor:
    """Pieces of `context + 1` bytes; one begins at each multiple of `every`."""
    return torch.frombuffer(text, dtype=torch.uint8).unfold(0, context + 1, every)


def text_loader(batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    """The pieces in batches."""
    return DataLoader(
        TensorDataset(text_pieces(library_text()).long()), batch_size=batch_size, shuffle=True
    )
