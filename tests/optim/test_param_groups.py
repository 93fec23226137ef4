"""Parameter groups: which tensors decay, and which train with their own settings."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from lightning_adam import ConfigError
from lightning_adam.config.errors import ConfigPath
from lightning_adam.config.optimizer import AdamConfig, GroupConfig, LayerDecayConfig, WeightDecayOn
from lightning_adam.optim.param_groups import LR_SCALE, make_plan
from tests.support.tables import each_row

PATH = ConfigPath("optimizer")


def grouped(module: nn.Module, **config: Any) -> list[dict[str, Any]]:
    hyperparameters = {"lr": 1e-3, "weight_decay": 0.1}
    return make_plan(module, AdamConfig(**config), PATH, hyperparameters).first_groups()


def names(module: nn.Module, **config: Any) -> dict[str, set[str]]:
    return {group["name"]: set(group["param_names"]) for group in grouped(module, **config)}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 20)
        self.tokens = nn.Embedding(20, 8)
        self.head.weight = self.tokens.weight


def test_only_matrices_decay() -> None:
    net = nn.ModuleDict(
        {
            "convolution": nn.Conv2d(1, 2, 3),
            "batch_norm": nn.BatchNorm2d(2),
            "image_norm": nn.LayerNorm((2, 4, 4)),
            "tokens": nn.Embedding(5, 3),
            "bag": nn.EmbeddingBag(5, 3),
            "linear": nn.Linear(3, 4),
            "recurrent": nn.GRU(3, 4),
        }
    )
    found = names(net)
    assert found["decay"] == {
        "convolution.weight",
        "linear.weight",
        "recurrent.weight_ih_l0",
        "recurrent.weight_hh_l0",
    }
    assert found["decay"] | found["no_decay"] == {name for name, _ in net.named_parameters()}


def test_everything_decays_under_weight_decay_on_all() -> None:
    net = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3))
    assert names(net, weight_decay_on=WeightDecayOn.all) == {
        "decay": {"0.weight", "1.weight", "1.bias"}
    }


def test_matrix_shared_with_an_embedding_is_listed_once_and_does_not_decay() -> None:
    assert names(Tied()) == {"no_decay": {"head.weight", "head.bias"}}


def test_shared_matrix_is_listed_once() -> None:
    layer = nn.Linear(3, 3)
    assert names(nn.Sequential(layer, layer)) == {"decay": {"0.weight"}, "no_decay": {"0.bias"}}


def test_frozen_parameters_are_in_no_group() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    net[0].requires_grad_(False)
    assert names(net) == {"decay": {"1.weight"}, "no_decay": {"1.bias"}}


def test_groups_are_the_same_without_weight_decay() -> None:
    plan = make_plan(nn.Linear(2, 3), AdamConfig(), PATH, {"weight_decay": 0.0})
    assert [(group["name"], group["weight_decay"]) for group in plan.first_groups()] == [
        ("decay", 0.0),
        ("no_decay", 0.0),
    ]


def test_compiled_modules_keep_their_names() -> None:
    net = nn.ModuleDict({"0": torch.compile(nn.Linear(2, 3))})  # type: ignore[dict-item]
    assert names(net) == {"decay": {"0.weight"}, "no_decay": {"0.bias"}}


def test_module_without_trainable_parameters_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"^Linear has no parameter with requires_grad=True"):
        names(nn.Linear(2, 3).requires_grad_(False))


def test_uninitialized_parameter_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"^weight is uninitialized\. Run one batch"):
        names(nn.LazyLinear(3))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)


class Transformer(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 10)


def settings(module: nn.Module, **config: Any) -> dict[str, tuple[float, float]]:
    """The learning rate and the weight decay of each group."""
    return {
        group["name"]: (group.get("lr", 1e-3), group["weight_decay"])
        for group in grouped(module, **config)
    }


def test_named_group_puts_what_does_not_decay_into_a_second_group() -> None:
    matchers: list[dict[str, Any]] = [{"match": "head.*"}, {"regex": r"^head\."}, {"regex": "ead"}]
    with each_row() as row:
        for matcher in matchers:
            with row(matcher):
                head = GroupConfig(name="head", lr_scale=10, **matcher)
                found = names(Transformer(), groups=[head])
                assert found["head"] == {"head.weight"}
                assert found["head_no_decay"] == {"head.bias"}
                assert settings(Transformer(), groups=[head]) == {
                    "decay": (1e-3, 0.1),
                    "no_decay": (1e-3, 0.0),
                    "head": (1e-3 * 10, 0.1),
                    "head_no_decay": (1e-3 * 10, 0.0),
                }


def test_module_class_is_found_with_or_without_its_path() -> None:
    for name in ("LayerNorm", "torch.nn.LayerNorm"):
        norms = GroupConfig(name="norms", module_class=name)
        found = names(Transformer(), groups=[norms], weight_decay_on=WeightDecayOn.all)
        assert found["norms"] == {
            f"{owner}.{kind}"
            for owner in ("blocks.0.norm", "blocks.1.norm", "blocks.2.norm", "norm")
            for kind in ("weight", "bias")
        }, name


def test_module_class_includes_submodules_and_subclasses() -> None:
    class Expert(Block):
        pass

    net = nn.ModuleDict({"expert": Expert(), "rest": nn.Linear(4, 4)})
    found = names(net, groups=[GroupConfig(name="blocks", module_class="Block")])
    assert found["blocks"] == {"expert.linear.weight"}
    assert found["blocks_no_decay"] == {
        "expert.norm.weight",
        "expert.norm.bias",
        "expert.linear.bias",
    }


def test_first_match_wins() -> None:
    first = GroupConfig(name="first", match="blocks.0.*")
    rest = GroupConfig(name="rest", match="blocks.*")
    found = names(Transformer(2), groups=[first, rest])
    assert found["first"] == {"blocks.0.linear.weight"}
    assert found["rest"] == {"blocks.1.linear.weight"}


def test_named_groups_with_equal_settings_are_not_merged() -> None:
    groups = [GroupConfig(name=f"block_{n}", match=f"blocks.{n}.linear.weight") for n in range(3)]
    assert names(Transformer(), groups=groups)["block_1"] == {"blocks.1.linear.weight"}


def test_settings_of_a_group_take_precedence() -> None:
    own = GroupConfig(name="own", match="head.*", weight_decay=0.5, betas=[0.8, 0.9], eps=1e-5)
    groups = {group["name"]: group for group in grouped(Transformer(), groups=[own])}
    assert groups["own"]["weight_decay"] == 0.5
    assert groups["own_no_decay"]["weight_decay"] == 0.0
    assert groups["own"]["betas"] == (0.8, 0.9)
    assert groups["own_no_decay"]["eps"] == 1e-5
    assert not {"lr", "betas", "eps"} & set(groups["decay"])


def test_shared_parameter_is_matched_by_any_of_its_names() -> None:
    tokens = GroupConfig(name="tokens", match="tokens.*", lr_scale=0.1)
    assert names(Tied(), groups=[tokens]) == {
        "tokens_no_decay": {"head.weight"},
        "no_decay": {"head.bias"},
    }


MATCH_NOTHING: list[tuple[dict[str, Any], str]] = [
    ({"match": "haed.*"}, r"^optimizer\.groups\.0\.match=haed\.\* matches nothing; .* are head\."),
    ({"regex": "blocks\\.9"}, r"groups\.0\.regex=.* nothing; the nearest are blocks\.\d\.norm"),
    (
        {"module_class": "LayerNrm"},
        r"module_class=LayerNrm matches nothing; .*are LayerNorm.*=LayerNorm$",
    ),
    ({"module_class": "torch.nn.LayrNorm"}, r"module_class=torch\.nn\.LayrNorm cannot be imported"),
    ({"module_class": "torch.nn.Conv2d"}, r"module_class=torch\.nn\.Conv2d matches nothing"),
]


def test_matcher_without_a_match_is_an_error() -> None:
    with each_row() as row:
        for matcher, expected in MATCH_NOTHING:
            with row(matcher), pytest.raises(ConfigError, match=expected):
                grouped(Transformer(), groups=[GroupConfig(name="head", **matcher)])


def test_group_whose_parameters_are_all_taken_is_an_error() -> None:
    groups = [GroupConfig(name="all", match="*"), GroupConfig(name="head", match="head.*")]
    with pytest.raises(
        ConfigError,
        match=r"groups\.1 \(head\) matches only .* belong to all\. Put head before all$",
    ):
        grouped(Transformer(), groups=groups)


def test_group_of_frozen_parameters_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    net = Transformer()
    net.tokens.requires_grad_(False)
    tokens = GroupConfig(name="tokens", match="tokens.*", lr_scale=0.1)
    assert set(names(net, groups=[tokens])) == {"decay", "no_decay"}
    assert re.search(r"tokens\) has only frozen parameters, such as tokens\.weight", caplog.text)


def test_weight_decay_of_a_group_without_decaying_parameters_is_an_error() -> None:
    tokens = GroupConfig(name="tokens", match="tokens.*", weight_decay=0.1)
    expected = (
        r"groups\.0\.weight_decay=0\.1 .* no parameter of tokens decays\. .*"
        r"groups\.0\.weight_decay_on=all$"
    )
    with pytest.raises(ConfigError, match=expected):
        grouped(Transformer(), groups=[tokens])
    found = settings(Transformer(), groups=[tokens], weight_decay_on=WeightDecayOn.all)
    assert found["tokens"] == (1e-3, 0.1)


def test_layer_decay_lowers_the_lr_toward_the_input() -> None:
    decay = LayerDecayConfig(pattern="blocks.*", rate=0.5)
    assert settings(Transformer(), layer_decay=decay) == {
        "stem_no_decay": (1e-3 / 16, 0.0),
        "layer_0": (1e-3 / 8, 0.1),
        "layer_0_no_decay": (1e-3 / 8, 0.0),
        "layer_1": (1e-3 / 4, 0.1),
        "layer_1_no_decay": (1e-3 / 4, 0.0),
        "layer_2": (1e-3 / 2, 0.1),
        "layer_2_no_decay": (1e-3 / 2, 0.0),
        "decay": (1e-3, 0.1),
        "no_decay": (1e-3, 0.0),
    }
    found = names(Transformer(), layer_decay=decay)
    assert found["stem_no_decay"] == {"tokens.weight"}
    assert found["layer_1"] == {"blocks.1.linear.weight"}
    assert found["no_decay"] == {"norm.weight", "norm.bias", "head.bias"}


def test_ten_or_more_layers_are_in_numeric_order() -> None:
    found = settings(Transformer(12), layer_decay=LayerDecayConfig(pattern="blocks.*", rate=0.5))
    assert found["layer_11"][0] == 1e-3 / 2
    assert found["layer_9"][0] == 1e-3 / 8


def test_layers_in_stages_are_ordered_by_both_numbers() -> None:
    net = nn.ModuleDict(
        {"stages": nn.ModuleList(nn.Sequential(*map(nn.Linear, (2, 2), (2, 2))) for _ in range(2))}
    )
    found = settings(net, layer_decay=LayerDecayConfig(pattern="stages.*.*", rate=0.5))
    rates = {name: lr for name, (lr, _) in found.items() if not name.endswith("no_decay")}
    assert rates == {
        "layer_0_0": 1e-3 / 16,
        "layer_0_1": 1e-3 / 8,
        "layer_1_0": 1e-3 / 4,
        "layer_1_1": 1e-3 / 2,
    }


def test_named_group_keeps_the_layer_decay() -> None:
    matrices = GroupConfig(name="linear", match="*.linear.weight", lr_scale=4)
    decay = LayerDecayConfig(pattern="blocks.*", rate=0.5)
    found = settings(Transformer(2), groups=[matrices], layer_decay=decay)
    assert found["linear_layer_0"] == (1e-3, 0.1)
    assert found["linear_layer_1"] == (1e-3 * 2, 0.1)


def test_lr_scale_of_a_group_in_a_layer_is_the_product_of_both_scales() -> None:
    """`lr_find` gives all groups one lr, which is then multiplied by their scales."""
    matrices = GroupConfig(name="linear", match="*.linear.weight", lr_scale=4)
    decay = LayerDecayConfig(pattern="blocks.*", rate=0.5)
    groups = grouped(Transformer(2), groups=[matrices], layer_decay=decay)
    assert {group["name"]: group[LR_SCALE] for group in groups} == {
        "stem_no_decay": 1 / 8,
        "layer_0_no_decay": 1 / 4,
        "linear_layer_0": 4 / 4,
        "layer_1_no_decay": 1 / 2,
        "linear_layer_1": 4 / 2,
        "decay": 1.0,
        "no_decay": 1.0,
    }


def test_layer_pattern_without_a_match_is_an_error() -> None:
    decay = LayerDecayConfig(pattern="blcks.*", rate=0.5)
    with pytest.raises(ConfigError, match=r"layer_decay\.pattern=blcks.*nothing; .*are blocks\.\*"):
        grouped(Transformer(), layer_decay=decay)


def test_group_name_of_a_layer_is_an_error() -> None:
    stem = GroupConfig(name="stem", match="head.*")
    decay = LayerDecayConfig(pattern="blocks.*", rate=0.5)
    with pytest.raises(
        ConfigError, match=r"groups\.0\.name=stem is taken by the group of a layer\. .*name=stem_0$"
    ):
        grouped(Transformer(), groups=[stem], layer_decay=decay)


def test_every_trained_parameter_is_in_exactly_one_group() -> None:
    net = Transformer()
    groups = grouped(
        net,
        groups=[GroupConfig(name="head", match="head.*"), GroupConfig(name="b", regex="norm")],
        layer_decay=LayerDecayConfig(pattern="blocks.*", rate=0.5),
    )
    found = [name for group in groups for name in group["param_names"]]
    assert sorted(found) == sorted(name for name, _ in net.named_parameters())
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in net.parameters())
