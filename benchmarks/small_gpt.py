"""The GPT of the recipes, and the text that it is trained on in the benchmarks."""

from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from recipes.char_gpt import LitGPT
from recipes.small_gpt import SmallGPT, library_text
from recipes.small_gpt import text_pieces as pieces_of

__all__ = ["LitGPT", "SmallGPT", "text_loader", "text_pieces"]


def text_pieces() -> Tensor:
    """Pieces of the standard library's sources, of one byte more than the context."""
    return pieces_of(library_text()).long()


def text_loader(batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    """The pieces in batches."""
    return DataLoader(TensorDataset(text_pieces()), batch_size=batch_size, shuffle=True)
