"""Small versions of common networks, for the healthy runs of the findings benchmark."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention, silu

from benchmarks.small_gpt import SmallGPT


def leaky_mlp(*widths: int) -> nn.Module:
    """Linear layers with LeakyReLU between them, as in a GAN."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


def tied_gpt(layers: int = 2, width: int = 64) -> SmallGPT:
    """A GPT with tied embeddings and the initialization of GPT-2."""
    module = SmallGPT(layers=layers, width=width)
    module.head.weight = module.tokens.weight
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            ends_branch = name.endswith(("attention.weight", "feed_forward.3.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if ends_branch else 0.02)
    return module


class VisionTransformer(nn.Module):
    """A ViT on 28 x 28 images with a class token and learned positions."""

    def __init__(self, patch: int = 7, width: int = 48, layers: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (28 // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width,
                    nhead=4,
                    dim_feedforward=4 * width,
                    dropout=0.0,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(layers)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1)
        logits: Tensor = self.head(self.norm(self.blocks(tokens + self.positions))[:, 0])
        return logits


class ReZero(nn.Module):
    """A residual branch multiplied by a gate that starts at 0."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = inputs + self.gate * self.branch(inputs)
        return outputs


def rezero_mlp(width: int = 64, layers: int = 6) -> nn.Module:
    """A residual MLP on 28 x 28 images with ReZero gates."""

    def branch() -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    blocks = [ReZero(branch()) for _ in range(layers)]
    return nn.Sequential(nn.Flatten(), nn.Linear(784, width), *blocks, nn.Linear(width, 10))


class TimeEmbedding(nn.Module):
    """Sinusoids of a time between 0 and 1, and an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, 2, width // 2))
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        angles = time[:, None] * self.get_buffer("frequencies")
        embedding: Tensor = self.layers(torch.cat([angles.sin(), angles.cos()], dim=-1))
        return embedding


class ResidualBlock(nn.Module):
    """Two convolutions with GroupNorm, conditioned on the time."""

    def __init__(self, channels_in: int, channels_out: int, time_width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(4, channels_in),
            nn.SiLU(),
            nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1),
        )
        self.time = nn.Linear(time_width, channels_out)
        self.second = nn.Sequential(
            nn.GroupNorm(4, channels_out),
            nn.SiLU(),
            nn.Conv2d(channels_out, channels_out, kernel_size=3, padding=1),
        )
        self.skip = nn.Conv2d(channels_in, channels_out, kernel_size=1)

    def forward(self, images: Tensor, time: Tensor) -> Tensor:
        hidden = self.first(images) + self.time(silu(time))[:, :, None, None]
        outputs: Tensor = self.skip(images) + self.second(hidden)
        return outputs


class UNet(nn.Module):
    """A U-Net with two resolutions; its last convolution starts at 0, as in DDPM."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        wide = 2 * channels
        self.time = TimeEmbedding(wide)
        self.first = nn.Conv2d(1, channels, kernel_size=3, padding=1)
        self.down = ResidualBlock(channels, channels, wide)
        self.downsample = nn.Conv2d(channels, wide, kernel_size=3, stride=2, padding=1)
        self.middle = ResidualBlock(wide, wide, wide)
        self.upsample = nn.ConvTranspose2d(wide, channels, kernel_size=2, stride=2)
        self.up = ResidualBlock(wide, channels, wide)
        self.norm = nn.GroupNorm(4, channels)
        self.last = nn.Conv2d(channels, 1, kernel_size=3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, images: Tensor, time: Tensor) -> Tensor:
        embedded = self.time(time)
        fine = self.down(self.first(images), embedded)
        coarse = self.upsample(self.middle(self.downsample(fine), embedded))
        noise: Tensor = self.last(silu(self.norm(self.up(torch.cat([fine, coarse], 1), embedded))))
        return noise


def modulate(inputs: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalize each token, then scale and shift it by the condition."""
    return layer_norm(inputs, inputs.shape[-1:]) * (1 + scale) + shift


class AdaptiveBlock(nn.Module):
    """A transformer block with adaLN-zero, as in DiT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attention = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.condition = zero_linear(width, 6 * width)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        modulation = self.condition(silu(condition))[:, None]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        packed = self.queries_keys_values(modulate(tokens, shift, scale))
        queries, keys, values = packed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
        tokens = tokens + gate * self.attention(mixed)
        outputs: Tensor = tokens + gate_mlp * self.feed_forward(
            modulate(tokens, shift_mlp, scale_mlp)
        )
        return outputs


class DiffusionTransformer(nn.Module):
    """A DiT on 8 x 8 images in patches of 2 x 2."""

    def __init__(self, width: int = 48, layers: int = 2) -> None:
        super().__init__()
        self.time = TimeEmbedding(width)
        self.patches = nn.Linear(4, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.ModuleList(AdaptiveBlock(width, heads=4) for _ in range(layers))
        self.condition = zero_linear(width, 2 * width)
        self.last = zero_linear(width, 4)

    def forward(self, images: Tensor, time: Tensor) -> Tensor:
        condition = self.time(time)
        patches = nn.functional.unfold(images, kernel_size=2, stride=2).transpose(1, 2)
        tokens = self.patches(patches) + self.positions
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.condition(silu(condition))[:, None].chunk(2, dim=-1)
        noise = self.last(modulate(tokens, shift, scale)).transpose(1, 2)
        return nn.functional.fold(noise, output_size=(8, 8), kernel_size=2, stride=2)


def zero_linear(width_in: int, width_out: int) -> nn.Linear:
    """A linear layer that starts at 0."""
    layer = nn.Linear(width_in, width_out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class LSTMLanguageModel(nn.Module):
    """An LSTM on bytes."""

    def __init__(self, width: int = 64, hidden: int = 96) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.lstm = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 256)

    def forward(self, text: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.tokens(text))[0])
        return logits


class SkipGram(nn.Module):
    """The two embeddings of word2vec with its initialization: U(-½/d, ½/d) and 0."""

    def __init__(self, words: int, width: int = 32) -> None:
        super().__init__()
        self.centers = nn.Embedding(words, width)
        self.contexts = nn.Embedding(words, width)
        nn.init.uniform_(self.centers.weight, -0.5 / width, 0.5 / width)
        nn.init.zeros_(self.contexts.weight)

    def forward(self, centers: Tensor, contexts: Tensor) -> Tensor:
        """Score `contexts`, of shape (batch, words), for `centers`, of shape (batch,)."""
        products = self.contexts(contexts) @ self.centers(centers)[:, :, None]
        scores: Tensor = products.squeeze(-1)
        return scores


class MatrixFactorization(nn.Module):
    """Embeddings of users and items from N(0, 0.01), and a bias of each."""

    def __init__(self, users: int, items: int, width: int = 16) -> None:
        super().__init__()
        self.users = nn.Embedding(users, width)
        self.items = nn.Embedding(items, width)
        self.user_bias = nn.Embedding(users, 1)
        self.item_bias = nn.Embedding(items, 1)
        for factors in (self.users, self.items):
            nn.init.normal_(factors.weight, std=0.01)
        for bias in (self.user_bias, self.item_bias):
            nn.init.zeros_(bias.weight)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        products = (self.users(users) * self.items(items)).sum(-1)
        ratings: Tensor = products + (self.user_bias(users) + self.item_bias(items)).squeeze(-1)
        return ratings


class ActorCritic(nn.Module):
    """A policy and a value with separate networks and orthogonal initialization, as in PPO."""

    def __init__(self, inputs: int, actions: int, width: int = 64) -> None:
        super().__init__()
        self.actor = tanh_mlp(inputs, width, actions, last_gain=0.01)
        self.critic = tanh_mlp(inputs, width, 1, last_gain=1.0)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(observations), self.critic(observations).squeeze(-1)


def tanh_mlp(inputs: int, width: int, outputs: int, last_gain: float) -> nn.Module:
    """Three linear layers with tanh, orthogonal weights and biases of 0."""
    layers = [nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, outputs)]
    for layer, gain in zip(layers, (math.sqrt(2), math.sqrt(2), last_gain), strict=True):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class LoRA(nn.Module):
    """A frozen linear layer with a low-rank branch that starts at 0."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float = 16.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        self.scale = alpha / rank
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.base(inputs) + self.scale * self.up(self.down(inputs))
        return outputs


def add_lora(gpt: SmallGPT, rank: int) -> SmallGPT:
    """Freeze a GPT and add LoRA to its attention layers."""
    gpt.requires_grad_(False)
    for block in gpt.blocks:
        for name in ("queries_keys_values", "attention"):
            setattr(block, name, LoRA(getattr(block, name), rank))
    return gpt
