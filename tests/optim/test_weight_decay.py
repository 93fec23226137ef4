"""The parameters of common modules that decay with `weight_decay_on: matrices`."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2GRN, ConvNextV2LayerNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from lightning_adam import ConfigError, build_optimizer
from lightning_adam.config.optimizer import NO_DECAY
from tests.support.tables import each_row


def decaying(module: nn.Module, **config: Any) -> set[str]:
    optimizer = build_optimizer(module, {"weight_decay": 0.1, **config})
    return {
        name
        for group in optimizer.param_groups
        for name in group["param_names"]
        if group["weight_decay"]
    }


class DirectParameters(nn.Module):
    """A module with direct parameters, by name and shape."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))


class RMSNorm(DirectParameters):
    pass


class AdaLayerNorm(nn.Module):
    """A norm with a scale that is computed by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale_table = nn.Parameter(torch.ones(6, 4))
        self.linear = nn.Linear(4, 8)


class NormalizedLinear(nn.Linear):
    """A linear layer with a name that resembles a norm."""


class NormalizingFlow(DirectParameters):
    pass


class BitLinear(DirectParameters):
    pass


class LazyChild(nn.LazyLinear):
    pass


class ViT(nn.Module):
    """The names and shapes of timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.reg_token = nn.Parameter(torch.zeros(1, 4, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, 8))
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.head = nn.Linear(8, 2)


class ListsNoDecay(nn.Module):
    """Lists parameters that do not decay, like timm's models."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(5, 8))
        self.inner = nn.ModuleDict(
            {"table": DirectParameters(values=(4, 8)), "linear": nn.Linear(8, 8)}
        )

    def no_weight_decay(self) -> set[str]:
        return {"queries", "inner.table.*"}


class MarkedNoDecay(DirectParameters):
    """Marks a parameter like Mamba."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__(**shapes)
        self.log._no_weight_decay = True  # type: ignore[union-attr]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 20, bias=False)
        self.table = DirectParameters(query_tokens=(20, 8))
        self.head.weight = self.table.query_tokens  # type: ignore[assignment]


def lazy() -> nn.Module:
    module = LazyChild(1)
    module(torch.ones(2, 8))
    return module


def two(module: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2, bias=False), module)


DECAYING: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "ViT": (ViT, {"patch_embed.weight", "head.weight"}),
    "Linear(8, 1)": (lambda: nn.Linear(8, 1), {"weight"}),
    "Linear(1, 1)": (lambda: nn.Linear(1, 1), {"weight"}),
    "lazy subclass": (lazy, {"weight"}),
    "Conv1d(8, 1, 1)": (lambda: nn.Conv1d(8, 1, 1), {"weight"}),
    "Conv2d(8, 1, 1)": (lambda: nn.Conv2d(8, 1, 1), {"weight"}),
    "depthwise Conv1d": (lambda: nn.Conv1d(8, 8, 1, groups=8), {"weight"}),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(1, 8, 1), {"weight"}),
    "LSTM of one input": (
        lambda: nn.LSTM(1, 4),
        {"weight_ih_l0", "weight_hh_l0"},
    ),
    "GRUCell of one input": (lambda: nn.GRUCell(1, 4), {"weight_ih", "weight_hh"}),
    "Conv1D of transformers": (lambda: Conv1D(1, 8), {"weight"}),  # type: ignore[no-untyped-call]
    "linear by its name": (lambda: BitLinear(weight=(1, 8), scale=(8, 1)), {"weight"}),
    "linear named like a norm": (lambda: NormalizedLinear(8, 8), {"weight"}),
    "flow named like a norm": (lambda: NormalizingFlow(weight=(8, 8)), {"weight"}),
    "norm of images": (lambda: two(RMSNorm(weight=(1, 8, 1, 1))), {"0.weight"}),
    "norm of heads": (lambda: two(RMSNorm(weight=(4, 8))), {"0.weight"}),
    "norms of transformers": (
        lambda: nn.Sequential(
            nn.Linear(4, 4),
            LlamaRMSNorm(4),
            T5LayerNorm(4),  # type: ignore[no-untyped-call]
            ConvNextV2LayerNorm(4),  # type: ignore[no-untyped-call]
            ConvNextV2GRN(4),
        ),
        {"0.weight"},
    ),
    "adaptive norm": (AdaLayerNorm, {"linear.weight"}),
    "layer scales": (
        lambda: two(
            DirectParameters(gamma=(8, 1, 1), ls1=(2, 8), layer_scale_1=(2, 8), lambda_1=(2, 8))
        ),
        {"0.weight"},
    ),
    "scalars": (lambda: two(DirectParameters(logit_scale=(), temperature=(3, 1, 1))), {"0.weight"}),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True),
        {"in_proj_weight", "out_proj.weight"},
    ),
    "wide biases": (
        lambda: DirectParameters(weight=(4, 8), expert_bias=(4, 8), bias_k=(2, 8), bias_v=(2, 8)),
        {"weight"},
    ),
    "position tables": (
        lambda: DirectParameters(
            weight=(8, 8),
            relative_position_bias_table=(9, 2),
            rel_pos_h=(7, 8),
            attention_biases=(2, 9),
            positional_embedding=(5, 8),
            temporal_pos_embed=(5, 8),
            pos_embed1=(5, 8),
        ),
        {"weight"},
    ),
    "position module": (
        lambda: nn.ModuleDict({"pos_embed": nn.Linear(8, 8)}),
        {"pos_embed.weight"},
    ),
    "list of tokens": (
        lambda: nn.ModuleDict(
            {"linear": nn.Linear(4, 4), "mask_tokens": nn.ParameterList([torch.ones(3, 4)])}
        ),
        {"linear.weight"},
    ),
    "listed by the module": (lambda: two(ListsNoDecay()), {"0.weight", "1.inner.linear.weight"}),
    "listed by a compiled module": (
        lambda: two(torch.compile(ListsNoDecay())),  # type: ignore[arg-type]
        {"0.weight", "1.inner.linear.weight"},
    ),
    "marked as in Mamba": (
        lambda: MarkedNoDecay(weight=(4, 3), log=(4, 3), A_log=(4, 3)),
        {"weight"},
    ),
    "tied to tokens": (lambda: two(Tied()), {"0.weight"}),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(8, 1)),
        {"parametrizations.weight.original1"},
    ),
    "weight norm by rows": (
        lambda: parametrizations.weight_norm(nn.Conv1d(8, 8, 1), dim=1),
        {"parametrizations.weight.original1"},
    ),
    "old weight norm": (lambda: old_weight_norm(nn.Linear(8, 1)), {"weight_v"}),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(8, 1)),
        {"parametrizations.weight.original"},
    ),
    "old spectral norm": (lambda: spectral_norm(nn.Linear(8, 1)), {"weight_orig"}),
    "pruned": (lambda: prune.identity(nn.Linear(8, 1), "weight"), {"weight_orig"}),  # type: ignore[no-untyped-call]
    "parametrized embedding": (
        lambda: two(parametrizations.spectral_norm(nn.Embedding(5, 4))),
        {"0.weight"},
    ),
    "parametrized bias": (
        lambda: nn.Sequential(
            parametrize.register_parametrization(nn.Linear(4, 4), "bias", nn.Identity())
        ),
        {"0.weight"},
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm:FutureWarning")
def test_only_matrices_decay() -> None:
    with each_row() as row:
        for name, (build, expected) in DECAYING.items():
            with row(name):
                assert decaying(build()) == expected


def test_own_patterns_replace_the_default() -> None:
    net = nn.ModuleDict({"net": ViT(), "other": DirectParameters(table=(3, 4), inner_table=(3, 4))})
    everything = {"net.reg_token", "net.pos_embed", "other.table", "other.inner_table"}
    weights = {"net.patch_embed.weight", "net.head.weight"}
    table = [
        ([], everything | weights),
        (["table"], (everything - {"other.table"}) | weights),
        (["*table"], {"net.reg_token", "net.pos_embed"} | weights),
        (["other.*"], {"net.reg_token", "net.pos_embed"} | weights),
        (["net.*"], {"other.table", "other.inner_table"}),
        (
            [*NO_DECAY, "*.head.weight"],
            {"other.table", "other.inner_table", "net.patch_embed.weight"},
        ),
    ]
    with each_row() as row:
        for patterns, expected in table:
            with row(patterns):
                assert decaying(net, no_decay=patterns) == expected


def test_pattern_that_matches_nothing_warns() -> None:
    with pytest.warns(UserWarning, match=r"no_decay: \*tabel matches nothing; .* are table"):
        decaying(DirectParameters(table=(3, 4), weight=(3, 4)), no_decay=["*tabel"])


def test_patterns_without_matrices_are_an_error() -> None:
    expected = r"^no_decay=\['\*table'\] has no effect with weight_decay_on='all'\. .*='matrices'$"
    for node in ({"weight_decay_on": "all"}, {"_target_": "torch.optim.NAdam"}):
        with pytest.raises(ConfigError, match=expected):
            build_optimizer(ViT(), {**node, "no_decay": ["*table"]})
    groups = [{"name": "head", "match": "head.*", "weight_decay_on": "matrices"}]
    config: dict[str, Any] = {
        "weight_decay_on": "all",
        "no_decay": ["head.weight"],
        "groups": groups,
    }
    assert "head.weight" not in decaying(ViT(), **config)


def test_custom_class_decays_as_in_torch_unless_its_owner_asks() -> None:
    node = {"_target_": "torch.optim.NAdam"}
    everything = {name for name, _ in ViT().named_parameters()}
    assert decaying(ViT(), **node) == everything
    matrices = {"patch_embed.weight", "head.weight"}
    assert decaying(ViT(), **node, weight_decay_on="matrices") == matrices


def test_biases_of_a_group_decay_if_the_group_asks() -> None:
    head = {"name": "head", "match": "head.*", "weight_decay": 0.5}
    table: list[tuple[dict[str, Any], dict[str, tuple[float, set[str]]]]] = [
        (
            {"groups": [head]},
            {"head": (0.5, {"head.weight"}), "head_no_decay": (0.0, {"head.bias"})},
        ),
        (
            {"groups": [{**head, "weight_decay_on": "all"}]},
            {"head": (0.5, {"head.weight", "head.bias"})},
        ),
        (
            {"groups": [{**head, "weight_decay_on": "matrices"}], "weight_decay_on": "all"},
            {"head": (0.5, {"head.weight"}), "head_no_decay": (0.0, {"head.bias"})},
        ),
    ]
    with each_row() as row:
        for config, expected in table:
            with row(config):
                optimizer = build_optimizer(ViT(), {"weight_decay": 0.1, **config})
                assert {
                    group["name"]: (group["weight_decay"], set(group["param_names"]))
                    for group in optimizer.param_groups
                    if group["name"].startswith("head")
                } == expected


def test_shape_of_a_partitioned_parameter_is_the_original_one() -> None:
    module = DirectParameters(weight=(8, 4), scale=(1, 4))
    for name, parameter in list(module.named_parameters()):
        partitioned = nn.Parameter(torch.empty(0))
        partitioned.ds_shape = parameter.shape  # type: ignore[attr-defined]
        module.register_parameter(name, partitioned)
    assert decaying(module) == {"weight"}


def test_decayed_weights_shrink_and_the_others_do_not() -> None:
    net = ViT()
    for parameter in net.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(net, {"lr": 0.5, "weight_decay": 0.1, "decoupled_weight_decay": True}).step()
    first = {name: each.detach().flatten()[0].item() for name, each in net.named_parameters()}
    shrunk = {name for name, value in first.items() if math.isclose(value, 0.95, rel_tol=1e-6)}
    assert shrunk == {"patch_embed.weight", "head.weight"}
    assert all(first[name] == 1 for name in first.keys() - shrunk)
