"""The tensors that are measured: those of a model, without the model."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
Named = Sequence[tuple[str, Tensor]]


def resnet18() -> list[Shape]:
    """torchvision's, in its order."""

    def convolution(channels_in: int, channels_out: int, kernel: int) -> list[Shape]:
        # A batch norm's weight and bias follow.
        return [(channels_out, channels_in, kernel, kernel), (channels_out,), (channels_out,)]

    shapes = convolution(3, 64, 7)
    for channels_in, channels in [(64, 64), (64, 128), (128, 256), (256, 512)]:
        shapes += convolution(channels_in, channels, 3) + convolution(channels, channels, 3)
        if channels_in != channels:
            shapes += convolution(channels_in, channels, 1)
        shapes += 2 * convolution(channels, channels, 3)
    return [*shapes, (1000, 512), (1000,)]


def gpt(layers: int, width: int) -> list[Shape]:
    """GPT-2's layout; its output layer is the embedding again."""
    norm: list[Shape] = [(width,), (width,)]
    attention: list[Shape] = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    feed_forward: list[Shape] = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    embeddings: list[Shape] = [(50257, width), (1024, width)]
    return embeddings + layers * [*norm, *attention, *norm, *feed_forward] + norm


SHAPES: dict[str, Callable[[], list[Shape]]] = {
    "resnet18": resnet18,
    "gpt2": lambda: gpt(12, 768),
    "small": lambda: [(1000,) if each % 2 else (20, 50) for each in range(2000)],
    "1B": lambda: gpt(32, 1536),
    "tiny": lambda: [(8, 16), (16,), (3, 5, 7), (40,)],
}


def build(shapes: Sequence[Shape], device: str) -> tuple[Named, torch.optim.AdamW]:
    """Parameters in two groups, as AdamMixin makes them, after some steps with unlike gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape: Shape) -> Tensor:
        return torch.empty(shape, device=device).normal_(0, 0.02, generator=generator)

    named = [(f"{index}.weight", nn.Parameter(normal(shape))) for index, shape in enumerate(shapes)]
    matrices = [each for each in named if each[1].ndim > 1]
    vectors = [each for each in named if each[1].ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1, "name": "decay"},
        {"params": vectors, "weight_decay": 0.0, "name": "no_decay"},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=True)
    for _, parameter in named:
        parameter.grad = torch.empty_like(parameter)
    for _ in range(3):
        for _, parameter in named:
            assert parameter.grad is not None
            parameter.grad.normal_(0, 0.01, generator=generator)
        optimizer.step()
    return named, optimizer
