"""Parameter groups: which tensors decay, and which train with their own settings."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.ao.quantization import QuantWrapper
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel

from lightning_adam import ConfigError, build_optimizer
from lightning_adam.config.errors import ConfigPath
from lightning_adam.config.optimizer import AdamConfig, GroupConfig, LayerDecayConfig, WeightDecayOn
from lightning_adam.optim.optimizers import plan_of
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


def test_all_parameters_decay_with_weight_decay_on_all() -> None:
    net = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3))
    assert names(net, weight_decay_on=WeightDecayOn.all) == {
        "decay": {"0.weight", "1.weight", "1.bias"}
    }


def test_matrix_shared_with_an_embedding_is_listed_once_and_does_not_decay() -> None:
    assert names(Tied()) == {"no_decay": {"head.weight", "head.bias"}}


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


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.compile": torch.compile,
    "activation checkpointing": checkpoint_wrapper,
    "activation offloading": offload_wrapper,
    "DataParallel": DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "AveragedModel": AveragedModel,
    "QuantWrapper": QuantWrapper,
    "two": lambda module: torch.compile(checkpoint_wrapper(module)),
    "three": lambda module: DistributedDataParallel(torch.compile(checkpoint_wrapper(module))),
}


@pytest.fixture
def process_group() -> Iterator[None]:
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_wrapped_modules_keep_their_names() -> None:
    expected = {"decay": {"net.0.weight"}, "no_decay": {"net.0.bias"}}
    with each_row() as row:
        for name, wrap in WRAPPERS.items():
            with row(name):
                part = nn.ModuleDict({"net": nn.Sequential(wrap(nn.Linear(2, 3)))})
                assert names(part) == expected
                whole = wrap(nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 3))}))
                assert names(whole) == expected


def test_names_that_resemble_those_of_wrappers_are_kept() -> None:
    net = nn.ModuleDict({"module": nn.ModuleDict({"my_orig_mod": nn.Linear(2, 3)})})
    assert names(net)["decay"] == {"module.my_orig_mod.weight"}


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
    """Returns the learning rate and the weight decay of each group."""
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


def test_group_without_remaining_parameters_is_an_error() -> None:
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
    """`lr_find` sets the same lr for all groups; the scales then multiply it."""
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
        ConfigError,
        match=r"groups\.0\.name=stem is already used by the group of a layer\. .*name=stem_0$",
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


class Backbone(nn.Module):
    """A head and a scale that are registered before the layers, and modules between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.ones(()))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.head = nn.Linear(4, 2, bias=False)
        self.patch_embed = nn.Conv2d(3, 4, 2, bias=False)
        self.stages = nn.ModuleList(
            nn.ModuleDict(
                {
                    "blocks": nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2)),
                    "downsample": nn.Linear(4, 4, bias=False),
                }
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(4, bias=False)


class Task(nn.Module):
    """A training module, with parameters outside of its network."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.ones(()))
        self.probe = nn.Linear(4, 2, bias=False)
        self.net = Backbone()
        self.proj = nn.Linear(4, 2, bias=False)


class Bert(nn.Module):
    """Has its embeddings one level above the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(4, 2, bias=False)
        self.embeddings = nn.Embedding(9, 4)
        layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.pooler = nn.Linear(4, 4, bias=False)


def layers(module: nn.Module, pattern: str) -> dict[str, str]:
    """Returns the layer of each parameter."""
    decay = LayerDecayConfig(pattern=pattern, rate=0.5)
    groups = grouped(module, layer_decay=decay, weight_decay_on=WeightDecayOn.all)
    return {
        name: group["name"].replace("decay", "head")
        for group in groups
        for name in group["param_names"]
    }


def test_parameters_outside_of_layers_are_stem_or_head() -> None:
    layer = "layer_{}_{}".format
    backbone = {
        "logit_scale": "head",
        "cls_token": "stem",
        "head.weight": "head",
        "patch_embed.weight": "stem",
        **{
            f"stages.{stage}.blocks.{block}.weight": layer(stage, block)
            for stage in range(2)
            for block in range(2)
        },
        "stages.0.downsample.weight": layer(0, 1),
        "stages.1.downsample.weight": "head",
        "norm.weight": "head",
    }
    around = {"logit_scale": "head", "probe.weight": "head", "proj.weight": "head"}
    inside = {f"net.{name}": layer for name, layer in backbone.items()}
    assert layers(Backbone(), "stages.*.blocks.*") == backbone
    assert layers(Task(), "net.stages.*.blocks.*") == {**around, **inside}


def test_embeddings_above_the_layers_are_stem() -> None:
    bert = Bert()
    expected = {
        "classifier.weight": "head",
        "embeddings.weight": "stem",
        "encoder.layer.0.weight": "layer_0",
        "encoder.layer.1.weight": "layer_1",
        "pooler.weight": "head",
    }
    assert layers(bert, "encoder.layer.*") == expected
    held = {f"bert.{name}": layer for name, layer in expected.items()}
    assert layers(nn.ModuleDict({"bert": bert}), "bert.encoder.layer.*") == held


def test_stem_and_head_of_the_layer_decay_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    layer_decay = {"pattern": "net.stages.*.blocks.*", "rate": 0.5}
    build_optimizer(Task(), {"layer_decay": layer_decay})
    lines = [line for line in caplog.text.splitlines() if line.startswith("layer_decay")]
    assert lines == [
        "layer_decay: stem (lr * 0.0312): net.cls_token, net.patch_embed",
        "layer_decay: head (lr * 1): logit_scale, probe, net.logit_scale, net.head,"
        " net.stages.1, net.norm, proj",
    ]


LAYERED = {
    "lr": 1e-3,
    "weight_decay": 0.1,
    "groups": [{"name": "linear", "match": "*.linear.*", "lr_scale": 4, "eps": 1e-5}],
    "layer_decay": {"pattern": "blocks.*", "rate": 0.5},
}


def frozen_below_the_head() -> tuple[Transformer, torch.optim.Optimizer]:
    net = Transformer(2)
    net.requires_grad_(False)
    net.head.requires_grad_(True)
    return net, build_optimizer(net, LAYERED)


def added(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> list[tuple[Any, ...]]:
    first = len(optimizer.param_groups)
    optimizer.add_param_group(group)
    keys = ("name", "lr", "eps", "weight_decay")
    return [tuple(each[key] for key in keys) for each in optimizer.param_groups[first:]]


def test_parameters_unfrozen_later_get_the_rate_of_their_layer_and_the_eps_of_their_group() -> None:
    net, optimizer = frozen_below_the_head()
    net.requires_grad_(True)
    everything = [each for part in (net.tokens, net.blocks) for each in part.parameters()]
    assert added(optimizer, {"params": everything}) == [
        ("group_2_stem_no_decay", 1e-3 / 8, 1e-8, 0.0),
        ("group_2_layer_0_no_decay", 1e-3 / 4, 1e-8, 0.0),
        ("group_2_layer_1_no_decay", 1e-3 / 2, 1e-8, 0.0),
        ("group_2_linear_layer_0", 1e-3, 1e-5, 0.1),
        ("group_2_linear_layer_0_no_decay", 1e-3, 1e-5, 0.0),
        ("group_2_linear_layer_1", 1e-3 * 2, 1e-5, 0.1),
        ("group_2_linear_layer_1_no_decay", 1e-3 * 2, 1e-5, 0.0),
    ]
    found = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted([*found, "norm.weight", "norm.bias"]) == sorted(plan_of(optimizer).names)


def test_keys_of_a_later_group_take_precedence() -> None:
    table: list[tuple[dict[str, Any], list[tuple[Any, ...]]]] = [
        ({"lr": 0.5, "eps": 1e-3}, [("group_2", 0.5, 1e-3, 0.1)]),
        ({"weight_decay": 0.3}, [("group_2", 1e-3, 1e-5, 0.3)]),
        ({"name": "late"}, [("late", 1e-3, 1e-5, 0.1)]),
        ({"lr_scale": 3.0}, [("group_2", 1e-3 * 3, 1e-5, 0.1)]),
    ]
    with each_row() as row:
        for group, expected in table:
            with row(group):
                net, optimizer = frozen_below_the_head()
                params = net.get_parameter("blocks.0.linear.weight").requires_grad_(True)
                assert added(optimizer, {"params": params, **group}) == expected


def test_lr_of_a_later_group_is_that_of_its_uppermost_layer() -> None:
    for named in (False, True):
        net, optimizer = frozen_below_the_head()
        paths = [f"blocks.{index}.norm.weight" for index in range(2)]
        params: list[Any] = [net.get_parameter(path).requires_grad_(True) for path in paths]
        if named:
            params = [(str(index), each) for index, each in enumerate(params)]
        assert added(optimizer, {"params": params, "lr": 0.1}) == [
            ("group_2_layer_0_no_decay", 0.05, 1e-8, 0.0),
            ("group_2_layer_1_no_decay", 0.1, 1e-8, 0.0),
        ]
        assert optimizer.param_groups[2]["param_names"] == ["blocks.0.norm.weight"]


def test_parameters_of_a_group_that_starts_frozen_join_it_later() -> None:
    net = Transformer()
    net.tokens.requires_grad_(False)
    tokens = {"name": "tokens", "match": "tokens.*", "lr_scale": 0.1, "weight_decay_on": "all"}
    optimizer = build_optimizer(net, {"lr": 1e-3, "weight_decay": 0.1, "groups": [tokens]})
    net.tokens.requires_grad_(True)
    assert added(optimizer, {"params": net.tokens.parameters()}) == [("group_2", 1e-4, 1e-8, 0.1)]


def test_modules_registered_later_are_planned_and_other_tensors_named_by_position() -> None:
    net = Transformer()
    optimizer = build_optimizer(net, {"weight_decay": 0.1})
    net.extra = nn.Linear(4, 4)
    loose = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(1, 4))]
    optimizer.add_param_group({"params": [*net.extra.parameters(), *loose]})
    assert [(each["name"], each["param_names"]) for each in optimizer.param_groups[2:]] == [
        ("group_2", ["extra.weight", "group_2.2"]),
        ("group_2_no_decay", ["extra.bias", "group_2.3"]),
    ]
    assert plan_of(optimizer).names == [name for name, _ in net.named_parameters()]


def test_eps_of_a_later_group_that_rounds_to_0_is_an_error() -> None:
    net, _ = frozen_below_the_head()
    net.blocks.to(torch.float16)
    expected = r"^groups\.0\.eps=1e-08 rounds to 0 in float16 \(blocks\.0\.linear\.weight\)"
    config = {**LAYERED, "groups": [{**LAYERED["groups"][0], "eps": 1e-8}]}  # type: ignore[index]
    optimizer = build_optimizer(net, config)
    params = net.get_parameter("blocks.0.linear.weight").requires_grad_(True)
    with pytest.raises(ConfigError, match=expected):
        optimizer.add_param_group({"params": params})


def test_eps_that_rounds_to_0_is_named_by_the_group_that_sets_it() -> None:
    """One group's name is a prefix of the other's, and both have the same eps."""
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2).half()})
    groups = [
        {"name": "head", "match": "a.*", "eps": 1e-9},
        {"name": "head_b", "match": "b.*", "eps": 1e-9},
    ]
    with pytest.raises(ConfigError, match=r"^groups\.1\.eps=1e-09 .*float16 \(b\.weight\)"):
        build_optimizer(net, {"groups": groups})


def test_plan_names_all_parameters_in_the_order_in_which_torch_numbers_them() -> None:
    net = Transformer(2)
    net.tokens.requires_grad_(False)
    net.head.weight = net.tokens.weight
    plan = plan_of(build_optimizer(net, LAYERED))
    assert plan.names == [name for name, _ in net.named_parameters()]
    assert len(plan.names) == len(AdamW(net.parameters()).param_groups[0]["params"])


def test_saved_groups_contain_only_names_and_settings() -> None:
    optimizer = build_optimizer(Transformer(2), LAYERED)
    by_torch = AdamW(Transformer(2).named_parameters()).state_dict()["param_groups"][0]
    for group in optimizer.state_dict()["param_groups"]:
        assert set(group) == {*by_torch, "name", LR_SCALE}
