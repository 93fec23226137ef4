"""Healthy training runs of common architectures with common settings.

No rule may raise a finding on any of them. Every builder takes the arguments of `build_loop`, so
that a setting of a run can be overridden: `run.build(eps=1e-10)`.
"""

import functools
import re
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    mse_loss,
    one_hot,
    pad,
    softplus,
)
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam, AdamW, Optimizer

from benchmarks.planted_faults import Loop, Run, Schedule, digits, mlp, mnist, text, warmed_up
from benchmarks.small_gpt import SmallGPT, library_text, text_pieces
from benchmarks.small_networks import (
    ActorCritic,
    DiffusionTransformer,
    LSTMLanguageModel,
    MatrixFactorization,
    SkipGram,
    UNet,
    VisionTransformer,
    add_lora,
    leaky_mlp,
    rezero_mlp,
    tanh_mlp,
    tied_gpt,
)
from recipes.mnist import small_cnn

CONTEXT = 32
"""Bytes of context of the language models."""
VOCABULARY = 2000
"""Words of word2vec."""


def build_loop(
    module: nn.Module,
    compute_loss: Callable[[], Tensor],
    *,
    steps: int = 300,
    of: Callable[..., Optimizer] = AdamW,
    clip: float | None = None,
    schedule: Schedule = lambda share: 1.0,
    dtype: torch.dtype = torch.float32,
    exclude_vectors: bool = False,
    **settings: Any,
) -> Loop:
    """Build the loop of a module.

    Args:
        module: The network. Only parameters that require gradients are optimized.
        compute_loss: Draws a batch and computes its loss.
        steps: The number of optimizer steps.
        of: The optimizer's class.
        clip: The largest gradient norm; None disables clipping.
        schedule: The fraction of the run → a factor of the learning rate.
        dtype: The dtype of the parameters.
        exclude_vectors: Put biases and norm weights in a parameter group without weight decay.
        settings: Further arguments of the optimizer.
    """
    module.to(dtype)
    trained = [each for each in module.parameters() if each.requires_grad]
    groups = [{"params": trained}]
    if exclude_vectors:
        vectors: dict[str, Any] = {"params": [each for each in trained if each.ndim < 2]}
        matrices = {"params": [each for each in trained if each.ndim >= 2]}
        groups = [matrices, vectors | {"weight_decay": 0.0}]

    def backward(step: int) -> float:
        loss = compute_loss()
        module.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if clip is not None:
            clip_grad_norm_(trained, clip)
        return loss.item()

    return Loop(module, of(groups, **settings), backward, steps, schedule)


def start_warmup(share: float) -> float:
    """The first fifth of a linear warm-up: with 400 steps, a warm-up of 2,000 steps."""
    return share / 5


def decay_linearly(share: float) -> float:
    """A linear schedule to 0."""
    return 1.0 - share


def classifier(
    net: Callable[[], nn.Module],
    *,
    batch_size: int = 64,
    shift: int = 0,
    pretrained: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Loop:
    """Train a network on MNIST.

    Args:
        net: Builds the network.
        batch_size: The number of images in a batch.
        shift: Shift the images right by this many pixels.
        pretrained: Start from weights that are trained on the images without a shift.
        seed: The seed of the weights and the batches.
        dtype: The dtype of the parameters and the images.
        options: Further arguments of `build_loop`.
    """
    weights = pretrained_classifier(net) if pretrained else None
    torch.manual_seed(seed)
    module = net()
    if weights is not None:
        module.load_state_dict(weights)
    order = torch.Generator().manual_seed(seed)
    images, labels = mnist()
    images = images.roll(shift, dims=-1).to(dtype)

    def compute_loss() -> Tensor:
        batch = torch.randint(len(labels), (batch_size,), generator=order)
        return cross_entropy(module(images[batch]).float(), labels[batch])

    return build_loop(module, compute_loss, dtype=dtype, **options)


def language_model(
    net: Callable[[], nn.Module],
    *,
    batch_size: int = 16,
    prose: bool = False,
    prepare: Callable[[nn.Module], nn.Module] = lambda module: module,
    pretrained: bool = False,
    seed: int = 0,
    **options: Any,
) -> Loop:
    """Train a network on bytes of Python's standard library.

    Args:
        net: Builds the network.
        batch_size: The number of pieces of text in a batch.
        prose: Train on documentation instead of source code.
        prepare: Changes the network before it is trained.
        pretrained: Start from weights that are trained on source code.
        seed: The seed of the weights and the batches.
        options: Further arguments of `build_loop`.
    """
    weights = pretrained_language_model(net) if pretrained else None
    torch.manual_seed(seed)
    module = net()
    if weights is not None:
        module.load_state_dict(weights)
    module = prepare(module)
    order = torch.Generator().manual_seed(seed)
    pieces = documentation() if prose else text()[:, : CONTEXT + 1]

    def compute_loss() -> Tensor:
        batch = pieces[torch.randint(len(pieces), (batch_size,), generator=order)]
        logits = module(batch[:, :-1])
        return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    return build_loop(module, compute_loss, **options)


@functools.cache
def pretrained_classifier(net: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Train a network on MNIST and return its weights."""
    return trained_weights(classifier(net, steps=300, lr=1e-3))


@functools.cache
def pretrained_language_model(net: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Train a network on source code and return its weights."""
    return trained_weights(language_model(net, steps=300, lr=3e-3, betas=(0.9, 0.95), clip=1.0))


def trained_weights(loop: Loop) -> dict[str, Tensor]:
    """Train to the end and return the weights."""
    for step in range(1, loop.steps + 1):
        loop.backward(step)
        loop.optimizer.step()
    return loop.module.state_dict()


@functools.cache
def documentation() -> Tensor:
    """Pieces of the documentation that is part of Python's standard library."""
    topics = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    return text_pieces(bytearray(topics.read_bytes()), CONTEXT, CONTEXT)[:4000].long()


def diffusion(
    net: Callable[[], nn.Module],
    *,
    batch_size: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Loop:
    """Train a network to predict the noise of noisy digits."""
    torch.manual_seed(seed)
    module = net()
    generator = torch.Generator().manual_seed(seed)
    images = 2 * digits()[0].view(-1, 1, 8, 8) - 1

    def compute_loss() -> Tensor:
        batch = images[torch.randint(len(images), (batch_size,), generator=generator)]
        time = torch.rand(batch_size, generator=generator)
        noise = torch.randn(batch.shape, generator=generator)
        angles = (time * torch.pi / 2)[:, None, None, None]
        noisy = angles.cos() * batch + angles.sin() * noise
        return mse_loss(module(noisy.to(dtype), time.to(dtype)).float(), noise)

    return build_loop(module, compute_loss, dtype=dtype, **options)


def gan(
    *,
    judged: str = "generator",
    data: Callable[[], Tensor],
    batch_size: int = 128,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Loop:
    """Train a generator and a discriminator, which have an optimizer each.

    Args:
        judged: "generator" or "discriminator": the network of the loop. The other one is stepped
            before each step of it.
        data: Returns the real data, of shape (samples, features).
        batch_size: The number of real and of generated samples in a batch.
        seed: The seed of the weights and the batches.
        dtype: The dtype of the parameters and the data.
        options: Further arguments of `build_loop`.
    """
    torch.manual_seed(seed)
    real = data().to(dtype)
    order = torch.Generator().manual_seed(seed)
    generator = leaky_mlp(16, 128, 128, real.shape[1])
    discriminator = leaky_mlp(real.shape[1], 128, 128, 1)

    def generate() -> Tensor:
        generated: Tensor = generator(torch.randn(batch_size, 16, generator=order).to(dtype))
        return generated

    def generator_loss() -> Tensor:
        return softplus(-discriminator(generate()).float()).mean()

    def discriminator_loss() -> Tensor:
        batch = real[torch.randint(len(real), (batch_size,), generator=order)]
        scores = discriminator(torch.cat([batch, generate().detach()])).float()
        return softplus(-scores[:batch_size]).mean() + softplus(scores[batch_size:]).mean()

    loops = {
        "generator": build_loop(generator, generator_loss, dtype=dtype, **options),
        "discriminator": build_loop(discriminator, discriminator_loss, dtype=dtype, **options),
    }
    loop = loops.pop(judged)
    (other,) = loops.values()

    def backward(step: int) -> float:
        other.backward(step)
        other.optimizer.step()
        return loop.backward(step)

    return replace(loop, backward=backward)


def ring_of_gaussians() -> Tensor:
    """Points of eight Gaussians on a circle."""
    generator = torch.Generator().manual_seed(0)
    angles = torch.randint(8, (4096,), generator=generator) * (torch.pi / 4)
    centers = torch.stack([angles.cos(), angles.sin()], dim=1)
    return centers + 0.05 * torch.randn(4096, 2, generator=generator)


def flat_digits() -> Tensor:
    """The digits with pixels between -1 and 1."""
    return 2 * digits()[0] - 1


def bandit(
    *,
    batch_size: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Loop:
    """REINFORCE with a moving average as baseline on a contextual bandit: a signed loss."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    policy = tanh_mlp(16, 64, 8, last_gain=0.01)
    goal = torch.randn(16, 8, generator=generator) / 4
    baseline = torch.zeros(())

    def compute_loss() -> Tensor:
        contexts = torch.randn(batch_size, 16, generator=generator)
        log_probabilities = policy(contexts.to(dtype)).float().log_softmax(-1)
        arms = torch.multinomial(log_probabilities.exp().detach(), 1, generator=generator)
        rewards = (contexts @ goal).gather(1, arms)
        rewards = rewards + 0.5 * torch.randn(batch_size, 1, generator=generator)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1).mean()
        gains = (rewards - baseline) * log_probabilities.gather(1, arms)
        baseline.lerp_(rewards.mean(), 0.1)
        loss: Tensor = -gains.mean() - 0.01 * entropy
        return loss

    return build_loop(policy, compute_loss, dtype=dtype, **options)


def gridworld(
    *,
    side: int = 5,
    horizon: int = 16,
    environments: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Loop:
    """Advantage actor-critic on a grid with a goal in one corner: a signed loss."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    agent = ActorCritic(2 * side, actions=4)
    moves = torch.tensor([[0, 1], [0, -1], [1, 0], [-1, 0]])

    def compute_loss() -> Tensor:
        places = torch.randint(side, (environments, 2), generator=generator)
        observed, actions, rewards, running = [], [], [], []
        for _ in range(horizon):
            running.append((places < side - 1).any(-1).float())
            observed.append(one_hot(places, side).flatten(1).to(dtype))
            with torch.no_grad():
                probabilities = agent.actor(observed[-1]).float().softmax(-1)
            actions.append(torch.multinomial(probabilities, 1, generator=generator).squeeze(1))
            moved = (places + moves[actions[-1]]).clamp(0, side - 1)
            places = torch.where(running[-1][:, None] > 0, moved, places)
            arrived = (places == side - 1).all(-1).float()
            rewards.append(running[-1] * (arrived - 0.05))
        returns = torch.zeros(horizon + 1, environments)
        for step in reversed(range(horizon)):
            returns[step] = rewards[step] + 0.95 * returns[step + 1]
        logits, values = agent(torch.stack(observed))
        log_probabilities = logits.float().log_softmax(-1)
        entropies = -(log_probabilities.exp() * log_probabilities).sum(-1)
        taken = log_probabilities.gather(-1, torch.stack(actions)[..., None]).squeeze(-1)
        errors = returns[:-1] - values.float()
        losses = 0.5 * errors**2 - errors.detach() * taken - 0.01 * entropies
        mask = torch.stack(running)
        mean_loss: Tensor = (losses * mask).sum() / mask.sum()
        return mean_loss

    return build_loop(agent, compute_loss, dtype=dtype, **options)


def recommender(
    *,
    users: int = 2000,
    items: int = 3000,
    batch_size: int = 512,
    seed: int = 0,
    **options: Any,
) -> Loop:
    """Matrix factorization of centered ratings, with users and items from Zipf's law."""
    torch.manual_seed(seed)
    module = MatrixFactorization(users, items)
    generator = torch.Generator().manual_seed(seed)
    counts = {"users": users, "items": items}
    factors = {key: torch.randn(n, 4, generator=generator) / 2 for key, n in counts.items()}
    biases = {key: torch.randn(n, generator=generator) / 2 for key, n in counts.items()}
    frequencies = {key: 1 / torch.arange(1, n + 1) for key, n in counts.items()}

    def compute_loss() -> Tensor:
        chosen = {
            key: torch.multinomial(each, batch_size, replacement=True, generator=generator)
            for key, each in frequencies.items()
        }
        user, item = chosen["users"], chosen["items"]
        ratings = (factors["users"][user] * factors["items"][item]).sum(-1)
        ratings = ratings + biases["users"][user] + biases["items"][item]
        ratings = ratings + 0.3 * torch.randn(batch_size, generator=generator)
        return mse_loss(module(user, item).float(), ratings)

    return build_loop(module, compute_loss, **options)


@functools.cache
def words() -> tuple[Tensor, Tensor]:
    """The frequent words of the standard library's sources, in order, and the count of each."""
    found = re.findall(r"[A-Za-z_]{2,}", library_text()[: 1 << 20].decode(errors="ignore"))
    common = Counter(found).most_common(VOCABULARY)
    numbers = {word: number for number, (word, _) in enumerate(common)}
    order = [numbers[word] for word in found if word in numbers]
    return torch.tensor(order), torch.tensor([count for _, count in common])


def word2vec(
    *,
    batch_size: int = 256,
    negatives: int = 5,
    window: int = 5,
    seed: int = 0,
    **options: Any,
) -> Loop:
    """Skip-gram with negative sampling."""
    torch.manual_seed(seed)
    module = SkipGram(VOCABULARY)
    generator = torch.Generator().manual_seed(seed)
    corpus, counts = words()
    frequencies = counts.float() ** 0.75

    def compute_loss() -> Tensor:
        places = torch.randint(window, len(corpus) - window, (batch_size,), generator=generator)
        offsets = torch.randint(1, window + 1, (batch_size,), generator=generator)
        signs = 2 * torch.randint(2, (batch_size,), generator=generator) - 1
        drawn = torch.multinomial(
            frequencies, batch_size * negatives, replacement=True, generator=generator
        )
        contexts = torch.cat(
            [corpus[places + signs * offsets, None], drawn.view(batch_size, negatives)], dim=1
        )
        scores = module(corpus[places], contexts).float()
        labels = pad(torch.ones(batch_size, 1), (0, negatives))
        return binary_cross_entropy_with_logits(scores, labels, reduction="sum") / batch_size

    return build_loop(module, compute_loss, **options)


def small_gpt() -> SmallGPT:
    """A GPT of two layers with untied embeddings."""
    return SmallGPT(layers=2, width=64, embedding_std=0.02)


def layer_norm_mlp() -> nn.Module:
    """An MLP with LayerNorm."""
    return mlp(784, 128, 128, 10, norm=True)


def plain_mlp() -> nn.Module:
    """An MLP without normalization."""
    return mlp(784, 128, 128, 10)


WARMUP = warmed_up(0.1)
BETA2_99 = (0.9, 0.99)
BETA2_95 = (0.9, 0.95)
GPT = partial(language_model, small_gpt)
TIED = partial(language_model, tied_gpt)
LSTM = partial(language_model, LSTMLanguageModel)
VIT = partial(classifier, VisionTransformer, batch_size=32)
CNN = partial(classifier, partial(small_cnn, 8), batch_size=32)
NORMED = partial(classifier, layer_norm_mlp)
REZERO = partial(classifier, rezero_mlp)
RING_GAN = partial(gan, data=ring_of_gaussians, of=Adam, lr=2e-4)
DIGIT_GAN = partial(gan, data=flat_digits, of=Adam, lr=1e-3)
TUNED_MLP = partial(classifier, plain_mlp, pretrained=True, shift=2, lr=1e-5)
TUNED_GPT = partial(
    language_model, small_gpt, pretrained=True, prose=True, batch_size=32, steps=200, lr=1e-5
)
LOW_RANK = partial(language_model, small_gpt, pretrained=True, prose=True)
HEALTHY = [
    Run(
        "GPT, lr 3e-3, beta2 .95, warm-up, decay .1, clip 1",
        partial(
            GPT,
            lr=3e-3,
            betas=BETA2_95,
            weight_decay=0.1,
            clip=1.0,
            schedule=WARMUP,
            exclude_vectors=True,
        ),
    ),
    Run(
        "GPT, lr 1e-3, beta2 .95, decay .1, clip 1",
        partial(GPT, lr=1e-3, betas=BETA2_95, weight_decay=0.1, clip=1.0),
    ),
    Run(
        "GPT, lr 1e-3, beta2 .99, warm-up, decay .1, clip 1",
        partial(GPT, lr=1e-3, betas=BETA2_99, weight_decay=0.1, clip=1.0, schedule=WARMUP),
    ),
    Run(
        "GPT, lr 1e-3, beta2 .999, warm-up, decay .01",
        partial(GPT, lr=1e-3, weight_decay=0.01, schedule=WARMUP),
    ),
    Run(
        "tied GPT, lr 3e-3, beta2 .95, warm-up, decay .1, clip 1",
        partial(
            TIED,
            lr=3e-3,
            betas=BETA2_95,
            weight_decay=0.1,
            clip=1.0,
            schedule=WARMUP,
            exclude_vectors=True,
        ),
    ),
    Run("tied GPT, lr 1e-3, beta2 .999, clip 1", partial(TIED, lr=1e-3, clip=1.0)),
    Run(
        "fine-tuned MLP, lr 1e-5, beta2 .999, batch 512",
        partial(TUNED_MLP, batch_size=512),
    ),
    Run(
        "fine-tuned MLP, lr 1e-5, beta2 .999, warm-up, batch 512",
        partial(TUNED_MLP, batch_size=512, schedule=WARMUP),
    ),
    Run(
        "fine-tuned MLP, lr 1e-5, beta2 .99, batch 512",
        partial(TUNED_MLP, batch_size=512, betas=BETA2_99),
    ),
    Run(
        "fine-tuned MLP, lr 1e-5, beta2 .999, batch 32",
        partial(TUNED_MLP, batch_size=32, steps=600),
    ),
    Run(
        "fine-tuned GPT, lr 1e-5, beta2 .999, warm-up, batch 32",
        partial(TUNED_GPT, weight_decay=0.01, clip=1.0, schedule=WARMUP, exclude_vectors=True),
    ),
    Run(
        "fine-tuned GPT, lr 1e-5, beta2 .95, decay .1, batch 32",
        partial(TUNED_GPT, weight_decay=0.1, betas=BETA2_95, clip=1.0),
    ),
    Run(
        "LoRA, rank 4, lr 2e-4, beta2 .999, clip .3",
        partial(LOW_RANK, prepare=partial(add_lora, rank=4), lr=2e-4, weight_decay=0.0, clip=0.3),
    ),
    Run(
        "LoRA, rank 8, lr 1e-3, beta2 .95, warm-up, clip 1",
        partial(
            LOW_RANK,
            prepare=partial(add_lora, rank=8),
            lr=1e-3,
            betas=BETA2_95,
            weight_decay=0.0,
            clip=1.0,
            schedule=WARMUP,
        ),
    ),
    Run(
        "LoRA, rank 4, lr 1e-3, beta2 .99",
        partial(LOW_RANK, prepare=partial(add_lora, rank=4), lr=1e-3, betas=BETA2_99),
    ),
    Run("ReZero MLP, lr 1e-3, beta2 .999", partial(REZERO, lr=1e-3)),
    Run(
        "ReZero MLP, lr 1e-3, beta2 .99, start of a warm-up of 2,000 steps",
        partial(REZERO, lr=1e-3, betas=BETA2_99, steps=400, schedule=start_warmup),
    ),
    Run(
        "DiT, adaLN-zero, lr 1e-3, beta2 .999, no decay",
        partial(diffusion, DiffusionTransformer, lr=1e-3, weight_decay=0.0),
    ),
    Run(
        "DiT, adaLN-zero, lr 1e-3, beta2 .95, start of a warm-up of 2,000 steps",
        partial(
            diffusion,
            DiffusionTransformer,
            lr=1e-3,
            betas=BETA2_95,
            steps=400,
            schedule=start_warmup,
        ),
    ),
    Run(
        "ViT, lr 1e-3, beta2 .999, warm-up, decay .1, clip 1",
        partial(
            VIT,
            lr=1e-3,
            weight_decay=0.1,
            clip=1.0,
            schedule=WARMUP,
            exclude_vectors=True,
            steps=400,
        ),
    ),
    Run(
        "ViT, lr 5e-4, beta2 .95, decay .05",
        partial(VIT, lr=5e-4, betas=BETA2_95, weight_decay=0.05, steps=400),
    ),
    Run(
        "ViT, lr 1e-3, beta2 .99, warm-up, decay .05",
        partial(VIT, lr=1e-3, betas=BETA2_99, weight_decay=0.05, schedule=WARMUP, steps=400),
    ),
    Run("U-Net, Adam, lr 2e-4, beta2 .999", partial(diffusion, UNet, of=Adam, lr=2e-4)),
    Run(
        "U-Net, lr 1e-3, beta2 .99, warm-up, decay .01, clip 1",
        partial(
            diffusion, UNet, lr=1e-3, betas=BETA2_99, weight_decay=0.01, clip=1.0, schedule=WARMUP
        ),
    ),
    *(
        Run(
            f"GAN on Gaussians, {judged}, lr 2e-4, betas .5, .999",
            partial(RING_GAN, judged=judged, betas=(0.5, 0.999), steps=600),
        )
        for judged in ("generator", "discriminator")
    ),
    *(
        Run(
            f"GAN on digits, {judged}, lr 1e-3, betas 0, .99",
            partial(DIGIT_GAN, judged=judged, betas=(0.0, 0.99), steps=600),
        )
        for judged in ("generator", "discriminator")
    ),
    Run(
        "bandit, REINFORCE, Adam, lr 3e-3, beta2 .999", partial(bandit, of=Adam, lr=3e-3, steps=600)
    ),
    Run(
        "bandit, REINFORCE, Adam, lr 1e-3, beta2 .95, warm-up",
        partial(bandit, of=Adam, lr=1e-3, betas=BETA2_95, schedule=WARMUP, steps=600),
    ),
    Run(
        "gridworld, actor-critic, Adam, lr 7e-4, beta2 .999, eps 1e-5, clip .5",
        partial(gridworld, of=Adam, lr=7e-4, eps=1e-5, clip=0.5, steps=600),
    ),
    Run(
        "gridworld, actor-critic, Adam, lr 2.5e-3, beta2 .99, linear decay",
        partial(
            gridworld,
            of=Adam,
            lr=2.5e-3,
            betas=BETA2_99,
            clip=0.5,
            schedule=decay_linearly,
            steps=400,
        ),
    ),
    Run(
        "recommender, Adam, lr 3e-3, beta2 .999", partial(recommender, of=Adam, lr=3e-3, steps=600)
    ),
    Run(
        "recommender, Adam, lr 3e-3, beta2 .99, warm-up, L2 1e-6",
        partial(
            recommender,
            of=Adam,
            lr=3e-3,
            betas=BETA2_99,
            weight_decay=1e-6,
            schedule=WARMUP,
            steps=600,
        ),
    ),
    Run("word2vec, Adam, lr 1e-3, beta2 .999", partial(word2vec, of=Adam, lr=1e-3, steps=600)),
    Run(
        "word2vec, lr 1e-3, beta2 .95, warm-up",
        partial(word2vec, lr=1e-3, betas=BETA2_95, schedule=WARMUP, steps=600),
    ),
    Run("BatchNorm CNN, lr 1e-3, beta2 .999, decay .01", partial(CNN, lr=1e-3, weight_decay=0.01)),
    Run(
        "BatchNorm CNN, Adam, lr 1e-3, beta2 .999, L2 1e-6",
        partial(CNN, of=Adam, lr=1e-3, weight_decay=1e-6),
    ),
    Run(
        "BatchNorm CNN, Adam, lr 1e-3, beta2 .99, warm-up, L2 5e-4",
        partial(CNN, of=Adam, lr=1e-3, betas=BETA2_99, weight_decay=5e-4, schedule=WARMUP),
    ),
    Run(
        "BatchNorm CNN, Adam, lr 1e-3, beta2 .95, L2 5e-4",
        partial(CNN, of=Adam, lr=1e-3, betas=BETA2_95, weight_decay=5e-4),
    ),
    Run("LayerNorm MLP, lr 1e-3, beta2 .999", partial(NORMED, lr=1e-3, steps=400)),
    Run(
        "LayerNorm MLP, lr 1e-3, beta2 .95, warm-up, decay .1",
        partial(NORMED, lr=1e-3, betas=BETA2_95, weight_decay=0.1, schedule=WARMUP, steps=400),
    ),
    Run(
        "LayerNorm MLP, AMSGrad, lr 1e-3, beta2 .99",
        partial(NORMED, lr=1e-3, betas=BETA2_99, amsgrad=True, steps=400),
    ),
    Run("LSTM, Adam, lr 2e-3, beta2 .999, clip .25", partial(LSTM, of=Adam, lr=2e-3, clip=0.25)),
    Run(
        "LSTM, lr 3e-3, beta2 .99, warm-up, decay .01, clip 1",
        partial(LSTM, lr=3e-3, betas=BETA2_99, weight_decay=0.01, clip=1.0, schedule=WARMUP),
    ),
]
"""Healthy runs; warm-ups without a length take a tenth of the run and end in a cosine to 0."""
