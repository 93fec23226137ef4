"""Seven small training runs, each a fraction of a second on one thread.

An app is a model, its loss, and fixed training and validation data. A plain PyTorch loop trains it
with Adam under a cosine schedule with a linear warm-up.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, mse_loss

from benchmarks.small_gpt import SmallGPT, library_text, text_pieces
from lightning_adam.optim.shapes import Curve
from lightning_adam.tune.configuration import Configuration
from recipes._common import mnist_loaders
from recipes.char_gpt import BYTES

DEFAULT = Configuration(
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.01,
    decoupled_weight_decay=True,
    amsgrad=False,
    warmup_ratio=0.0,
)
STARTS = {
    "default": DEFAULT,
    "bad_lr": replace(DEFAULT, lr=1e-5),
    "bad_decay": replace(DEFAULT, weight_decay=20.0),
    "bad_betas": replace(DEFAULT, betas=(0.99, 0.9)),
}
"""What the searches begin with: the defaults of AdamW, and three with one bad value."""
CONTEXT = 16
WORDS = 1000


Examples = tuple[Tensor, Tensor]
"""Inputs and targets."""
Data = tuple[Examples, Examples]
"""For training and for validation."""


@dataclass(frozen=True)
class App:
    """What is trained, on which data, and for how many steps."""

    model: Callable[[], nn.Module]
    data: Callable[[], Data]
    steps: int
    batch_size: int
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy


@cache
def digits() -> Data:
    """MNIST digits of 14 by 14 pixels; the last 2,000 of 5,000 are for validation."""
    parts = [loader.dataset.tensors for loader in mnist_loaders(1)]  # type: ignore[attr-defined]
    images, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    images = (avg_pool2d(images, 2) - 0.13) / 0.29
    return (images[:-2000], labels[:-2000]), (images[-2000:], labels[-2000:])


@cache
def mislabeled_digits() -> Data:
    """1,500 digits of which every fifth has a random label, with inputs that are not normalized."""
    (images, labels), (validation, truth) = digits()
    images, labels = images[:1500], labels[:1500].clone()
    labels[::5] = torch.randint(10, labels[::5].shape, generator=torch.Generator().manual_seed(0))
    return (75 * images, labels), (75 * validation, truth)


@cache
def digit_images() -> Data:
    """Digits to be reconstructed."""
    train, validation = (images.flatten(1) for images, _ in digits())
    return (train, train), (validation, validation)


@cache
def noisy_digits() -> Data:
    """Digits blended with noise of a random level, which is to be predicted, as in diffusion."""
    generator = torch.Generator().manual_seed(0)

    def blend(images: Tensor) -> Examples:
        angle = torch.rand(len(images), 1, generator=generator) * math.pi / 2
        noise = torch.randn(images.shape, generator=generator)
        return torch.cat([angle.cos() * images + angle.sin() * noise, angle], 1), noise

    (train, _), (validation, _) = digit_images()
    return blend(train.repeat(8, 1)), blend(validation)


@cache
def text() -> Data:
    """Bytes of the standard library's sources, and the bytes that follow each."""
    pieces = text_pieces(library_text(), CONTEXT, 4 * CONTEXT)[:20_000].long()
    pieces = pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))]
    inputs, targets = pieces[:, :-1], pieces[:, 1:]
    return (inputs[:-512], targets[:-512]), (inputs[-512:], targets[-512:])


@cache
def word_pairs() -> Data:
    """Words of the standard library's sources, and another that is at most two words away."""
    words = re.findall(r"[A-Za-z_]+", library_text().decode())
    index = {word: at for at, (word, _) in enumerate(Counter(words).most_common(WORDS))}
    ids = torch.tensor([index[word] for word in words if word in index])
    inputs, targets = torch.cat([ids[:-1], ids[:-2]]), torch.cat([ids[1:], ids[2:]])
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    inputs, targets = inputs[order], targets[order]
    train, validation = slice(100_000), slice(100_000, 104_000)
    return (inputs[train], targets[train]), (inputs[validation], targets[validation])


def cnn(width: int) -> nn.Module:
    """Two convolutions with batch normalization."""
    layers: list[nn.Module] = []
    for channels_in, channels_out in ((1, width), (width, 2 * width)):
        convolution = nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=2, padding=1)
        layers += [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * width * 4 * 4, 10))


class LSTM(nn.Module):
    """A byte-level language model with one recurrent layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(BYTES, width)
        self.recurrent = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, BYTES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.recurrent(self.tokens(inputs))[0])  # type: ignore[no-any-return]


def perceptron(*widths: int) -> nn.Module:
    """Linear layers with a ReLU between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width_in, width_out in pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


classifier = partial(perceptron, 196, 128, 128, 128, 10)
autoencoder = partial(perceptron, 196, 128, 64, 12, 64, 128, 196)
denoiser = partial(perceptron, 197, 256, 256, 196)
gpt = partial(SmallGPT, layers=2, width=32, heads=2, context=CONTEXT, embedding_std=0.1)


def skip_gram() -> nn.Module:
    """A word's embedding, and scores of all words."""
    return nn.Sequential(nn.Embedding(WORDS, 24), nn.Linear(24, WORDS))


def next_byte_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy over all places of a text."""
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


APPS = {
    "mlp": App(classifier, mislabeled_digits, 250, batch_size=32),
    "cnn": App(lambda: cnn(8), digits, 150, batch_size=32),
    "gpt": App(gpt, text, 150, batch_size=8, loss=next_byte_loss),
    "lstm": App(lambda: LSTM(48), text, 150, batch_size=8, loss=next_byte_loss),
    "autoencoder": App(autoencoder, digit_images, 250, batch_size=16, loss=mse_loss),
    "embedding": App(skip_gram, word_pairs, 300, batch_size=64),
    "diffusion": App(denoiser, noisy_digits, 300, batch_size=8, loss=mse_loss),
}
"""The apps by name. `diffusion` has the noisiest gradients, `embedding` the sparsest."""


def train(app: str, configuration: Configuration, seed: int, share: float = 1.0) -> float:
    """Trains an app and returns its validation loss.

    Args:
        app: One of `APPS`.
        configuration: Settings of Adam and of the warm-up.
        seed: Of the initial weights and the order of the data.
        share: Of the app's number of steps. The schedule is complete over this length.

    Returns:
        The validation loss after the last step; inf if the run diverged.
    """
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _train(APPS[app], configuration, share)


def _train(app: App, configuration: Configuration, share: float) -> float:
    (inputs, targets), validation = app.data()
    model, steps = app.model(), max(1, round(share * app.steps))
    assert configuration.betas is not None
    optimizer = torch.optim.Adam(
        model.parameters(),
        configuration.lr,
        configuration.betas,
        configuration.eps or 1e-8,
        configuration.weight_decay or 0.0,
        amsgrad=bool(configuration.amsgrad),
        decoupled_weight_decay=configuration.decoupled_weight_decay is not False,
        fused=True,
    )
    warmup_steps = round((configuration.warmup_ratio or 0.0) * steps)
    schedule = Curve("cosine", warmup_steps, steps, {"min_lr_ratio": 0.0})
    epochs = math.ceil(steps * app.batch_size / len(inputs))
    order = torch.cat([torch.randperm(len(inputs)) for _ in range(epochs)])
    for step, batch in enumerate(torch.split(order, app.batch_size)[:steps]):
        optimizer.param_groups[0]["lr"] = configuration.lr * schedule(step)
        optimizer.zero_grad()
        app.loss(model(inputs[batch]), targets[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        loss = app.loss(model(validation[0]), validation[1]).item()
    return loss if math.isfinite(loss) else math.inf
