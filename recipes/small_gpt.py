"""A small GPT on bytes, and a text that is everywhere: the sources of Python's own library."""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

BYTES = 256
CONTEXT = 128
ENOUGH = 4 << 20
"""Bytes of text: more than a recipe or a benchmark reads."""


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


def library_text() -> bytearray:
    """The standard library's sources, one after the other."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) > ENOUGH:
            break
    return text


def text_pieces(text: bytearray, context: int = CONTEXT, every: int = CONTEXT) -> Tensor:
    """Pieces of one byte more than the context, one `every` so many bytes; the text is shared."""
    return torch.frombuffer(text, dtype=torch.uint8).unfold(0, context + 1, every)
