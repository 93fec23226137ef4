"""A small GPT on bytes, and the loaders of its text."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from recipes._common import read_text
from recipes.char_gpt import BYTES, Block

CONTEXT = 128


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
