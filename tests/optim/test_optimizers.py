"""`build_optimizer` builds the same optimizer as plain torch."""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.common_optimizers import optim_db

from lightning_adam import ConfigError, build_optimizer
from lightning_adam.config.errors import ConfigPath
from lightning_adam.config.optimizer import AdamConfig
from lightning_adam.optim.console import group_table
from lightning_adam.optim.optimizers import choose_implementation, optimizer_settings
from tests.support.pairwise import pairwise_params
from tests.support.tables import each_row

IMPLEMENTATIONS = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"fused": False, "foreach": False},
}
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float64)}
DECOUPLED = {"AdamW": True, "Adam": False}
PATH = ConfigPath("optimizer")
EXTRA = {"plain": {}, "amsgrad": {"amsgrad": True}, "maximize": {"maximize": True}}


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def run_training(
    net: nn.Sequential, build: Callable[[nn.Module], torch.optim.Optimizer], steps: int = 20
) -> list[Tensor]:
    optimizer = build(net)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        batch = torch.randn(16, 6, generator=generator).to(next(net.parameters()).dtype)
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in net.parameters()]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def by_ndim(net: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    """Returns groups in plain torch: matrices with the settings, vectors without weight decay."""
    matrices = [each for each in net.parameters() if each.ndim == 2]
    vectors = [each for each in net.parameters() if each.ndim == 1]
    return [{"params": matrices, **settings}, {"params": vectors, "weight_decay": 0.0}]


@pytest.mark.parametrize(
    ("choice", "decoupled", "extra", "dtype"),
    pairwise_params(IMPLEMENTATIONS, DECOUPLED, EXTRA, DTYPES),
)
def test_trains_bit_identically_to_torch(
    choice: dict[str, bool], decoupled: bool, extra: dict[str, bool], dtype: torch.dtype
) -> None:
    values: dict[str, Any] = {"lr": 3e-3, "betas": [0.8, 0.95], "eps": 1e-6, **extra, **choice}

    def by_hand(net: nn.Module) -> torch.optim.Optimizer:
        adam = torch.optim.AdamW if decoupled else torch.optim.Adam
        groups = by_ndim(net, weight_decay=0.1)
        return adam(groups, **{**values, "betas": tuple(values["betas"])})

    config = {**values, "weight_decay": 0.1, "decoupled_weight_decay": decoupled}
    ours = run_training(network(dtype), lambda net: build_optimizer(net, config))
    theirs = run_training(network(dtype), by_hand)
    assert_equal(ours, theirs)


def test_defaults_are_those_of_torch() -> None:
    torchs = inspect.signature(torch.optim.Adam).parameters
    ours = AdamConfig()
    shared = [entry.name for entry in fields(ours) if entry.name in torchs]
    assert len(shared) == 10
    assert {name: getattr(ours, name) for name in shared} == {
        name: list(torchs[name].default) if name == "betas" else torchs[name].default
        for name in shared
    }


def test_every_setting_reaches_every_group() -> None:
    config = {
        "lr": 0.5,
        "betas": [0, 0.5],
        "eps": 1e-3,
        "weight_decay": 2,
        "amsgrad": True,
        "maximize": True,
        "foreach": True,
    }
    optimizer = build_optimizer(network(), config)
    assert type(optimizer) is torch.optim.Adam
    for group in optimizer.param_groups:
        expected = {
            **config,
            "betas": (0.0, 0.5),
            "fused": False,
            "capturable": False,
            "weight_decay": 2.0 if group["name"] == "decay" else 0.0,
            "decoupled_weight_decay": False,
        }
        assert {key: group[key] for key in expected} == expected


def test_implementation_is_the_configured_one_or_else_fused() -> None:
    optimizer = build_optimizer(network(), {})
    assert all(group["fused"] for group in optimizer.param_groups)
    parameters = list(network().parameters())
    table: list[tuple[dict[str, Any], str]] = [
        ({}, "fused: float32 on cpu"),
        ({"fused": False}, "for-loop: optimizer.fused=false"),
        ({"foreach": True}, "foreach: optimizer.foreach=true"),
        ({"foreach": False}, "fused: float32 on cpu"),
        ({"fused": True}, "fused: float32 on cpu"),
    ]
    with each_row() as row:
        for choice, reason in table:
            with row(choice):
                chosen = choose_implementation(AdamConfig(**choice), PATH, parameters)
                assert chosen.reason == reason


def test_fused_is_not_chosen_for_complex_parameters() -> None:
    parameters = [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]
    chosen = choose_implementation(AdamConfig(), PATH, parameters)
    assert chosen.fused is False
    assert "floating point" in chosen.reason


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Creates a device mesh of this process."""
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_dtensors_beside_plain_tensors_train_in_a_for_loop(mesh: DeviceMesh) -> None:
    module = network()
    fully_shard(module[0], mesh=mesh)
    optimizer = build_optimizer(module, {})
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    chosen = choose_implementation(AdamConfig(), PATH, list(module.parameters()))
    assert (chosen.fused, chosen.foreach) == (False, False)
    for name in ("fused", "foreach"):
        with pytest.raises(
            ConfigError, match=rf"^{name}=True is not supported here: .*DTensors and others"
        ):
            build_optimizer(module, {name: True})


def test_fused_for_complex_parameters_is_an_error() -> None:
    module = nn.ParameterList([torch.zeros(2, dtype=torch.complex64)])
    with pytest.raises(ConfigError, match=r"^fused=True .*floating point.*fused=None$"):
        build_optimizer(module, {"fused": True})


def test_eps_that_rounds_to_0_in_the_parameters_dtype_is_an_error() -> None:
    half = network(torch.float16)
    with pytest.raises(ConfigError, match=r"^eps=1e-08 rounds to 0 in float16.*eps=0\.0001$"):
        build_optimizer(half, {"eps": 1e-8})
    build_optimizer(half, {"eps": 1e-4})
    groups = [{"name": "head", "match": "3.*", "eps": 1e-9}]
    with pytest.raises(ConfigError, match=r"^groups\.0\.eps=1e-09 .*float16.*3\.weight"):
        build_optimizer(half, {"eps": 1e-4, "groups": groups})


def test_table_shows_each_group() -> None:
    table = group_table(build_optimizer(network(), {"weight_decay": 0.1})).splitlines()
    assert table[0].split()[:4] == ["group", "tensors", "parameters", "lr"]
    assert table[1].startswith("decay     2        56          0.001  (0.9, 0.999)  1e-08  0.1")
    assert table[2].endswith("0.bias, 1.weight, …")


def test_recorded_settings_are_plain_and_hold_the_peak_lr() -> None:
    optimizer = build_optimizer(network(), {"lr": 0.5})
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    recorded = optimizer_settings(optimizer)
    assert recorded["param_groups"]["decay"]["lr"] == 0.5
    assert recorded["betas"] == (0.9, 0.999)
    assert set(recorded["param_groups"]) == {"decay", "no_decay"}
    assert not any("params" in group for group in recorded["param_groups"].values())


def test_tensor_lr_is_shown_and_recorded_as_a_number() -> None:
    optimizer = build_optimizer(network(), {"lr": 0.5})
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    assert group_table(optimizer).splitlines()[1].split()[3] == "0.5"
    assert optimizer_settings(optimizer)["param_groups"]["decay"]["lr"] == 0.5


def test_capturable_without_fused_is_an_error_when_built() -> None:
    with pytest.raises(ConfigError, match=r"^capturable=True is not .*capturable=False$"):
        build_optimizer(network(), {"capturable": True, "fused": False})


# The inputs of torch's optimizer tests. The import needs expecttest.
CLASSES: dict[Any, dict[str, Any]] = {
    torch.optim.Adam: {},
    torch.optim.AdamW: {"decoupled_weight_decay": True},
}
INFOS: list[Any] = [info for info in optim_db if info.optim_cls in CLASSES]
VALID = {
    f"{info.optim_cls.__name__}: {each.desc}": (info.optim_cls, each.kwargs)
    for info in INFOS
    for each in info.optim_inputs_func(device="cpu")
}
ERRONEOUS = [
    (info.optim_cls, error.optimizer_error_input)
    for info in INFOS
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
]


@pytest.mark.parametrize(
    ("valid", "choice", "dtype"), pairwise_params(VALID, IMPLEMENTATIONS, DTYPES)
)
def test_torchs_own_inputs_train_as_in_torch(
    valid: tuple[Any, dict[str, Any]], choice: dict[str, bool], dtype: torch.dtype
) -> None:
    adam, arguments = valid
    decay = 0.01 if adam is torch.optim.AdamW else 0.0
    config = {
        "weight_decay": decay,
        **CLASSES[adam],
        **arguments,
        **choice,
        "weight_decay_on": "all",
    }
    ours = run_training(network(dtype), lambda net: build_optimizer(net, config))
    theirs = run_training(network(dtype), lambda net: adam(net.parameters(), **arguments, **choice))
    assert_equal(ours, theirs)


def test_what_torch_rejects_is_an_error() -> None:
    with each_row() as row:
        for adam, erroneous in ERRONEOUS:
            module = network() if erroneous.params is None else erroneous.params
            with row(f"{adam.__name__}: {erroneous.desc}"), pytest.raises(ConfigError):
                build_optimizer(module, {**CLASSES[adam], **erroneous.kwargs})


def test_torch_has_inputs_to_test_with() -> None:
    assert len(VALID) == 10
    assert len(ERRONEOUS) >= 20


NADAM = {"_target_": "torch.optim.NAdam", "_partial_": True, "lr": 0.02, "betas": [0.8, 0.9]}
ARGUMENTS: Any = {
    "lr": 0.02,
    "betas": (0.8, 0.9),
    "weight_decay": 0.1,
    "weight_decay_on": "matrices",
}
MATRICES = {**NADAM, **ARGUMENTS, "betas": [0.8, 0.9]}


@pytest.mark.parametrize(
    "node",
    [
        MATRICES,
        OmegaConf.create(MATRICES),
        functools.partial(torch.optim.NAdam, **ARGUMENTS),
        instantiate(MATRICES),
    ],
    ids=["dict", "DictConfig", "functools.partial", "instantiated"],
)
def test_custom_class_trains_as_by_hand(node: Any) -> None:
    def by_hand(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.NAdam(by_ndim(net, weight_decay=0.1), lr=0.02, betas=(0.8, 0.9))

    ours = run_training(network(), lambda net: build_optimizer(net, node))
    assert_equal(ours, run_training(network(), by_hand))


class Forwarding(torch.optim.NAdam):
    """Passes on all keyword arguments, like many subclasses."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)


def test_custom_class_that_takes_any_keyword_gets_all_arguments() -> None:
    config = {"_target_": f"{__name__}.Forwarding", "lr": 0.02, "momentum_decay": 1e-3}
    optimizer = build_optimizer(network(), config)
    assert type(optimizer).__name__ == "Forwarding"
    for group in optimizer.param_groups:
        assert (group["lr"], group["momentum_decay"]) == (0.02, 1e-3)


def test_group_keys_work_for_a_custom_class() -> None:
    optimizer = build_optimizer(
        network(),
        {
            **NADAM,
            "weight_decay": 0.1,
            "weight_decay_on": "all",
            "groups": [{"name": "head", "match": "3.*", "lr_scale": 0.5, "eps": 1e-6}],
            "layer_decay": {"pattern": "*", "rate": 0.5},
        },
    )
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [
        ("layer_0", 0.02 * 0.125),
        ("layer_1", 0.02 * 0.25),
        ("head_layer_3", 0.02 * 0.25),
    ]
    assert [group["eps"] for group in optimizer.param_groups] == [1e-8, 1e-8, 1e-6]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}


def test_groups_scale_the_default_lr_of_a_custom_class() -> None:
    groups = [{"name": "head", "match": "3.*", "lr_scale": 10}]
    optimizer = build_optimizer(network(), {"_target_": "torch.optim.RAdam", "groups": groups})
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-2]


def test_custom_class_without_weight_decay_gets_none() -> None:
    optimizer = build_optimizer(network(), {"_target_": "torch.optim.SparseAdam", "lr": 0.1})
    assert not any("weight_decay" in group for group in optimizer.param_groups)


class Counter:
    def __init__(self, groups: Any, lr: float = 0.1) -> None:
        pass


BAD_CLASSES: list[tuple[dict[str, Any], str]] = [
    (
        {"_target_": "torch.optim.NAdm"},
        r"^_target_='torch\.optim\.NAdm' cannot be imported.*NAdm.*Set _target_=",
    ),
    (
        {"_target_": "no_such.Adam"},
        r"^_target_='no_such\.Adam' cannot be imported.*no_such.*Set _target_=",
    ),
    ({"_target_": "torch.optim.NAdam", "beta": 1}, r"^beta=1 is not a setting.*betas=1$"),
    (
        {"_target_": "torch.optim.NAdam", "lr": -1.0},
        r"^lr=-1\.0 is not accepted by torch\.optim\.NAdam: Invalid .*: -1\.0\. .*lr=0\.002$",
    ),
    (
        {"_target_": "torch.optim.NAdam", "lr": "fast"},
        r"^lr='fast' is not accepted by torch\.optim\.NAdam: .*lr=0\.002$",
    ),
    (
        {
            "_target_": "torch.optim.SparseAdam",
            "groups": [{"name": "head", "match": "3.*", "weight_decay": 0.1}],
        },
        r"^groups\.0\.weight_decay=0\.1 is not a setting of torch\.optim\.SparseAdam",
    ),
    ({"_target_": f"{__name__}.Counter"}, "must be a torch.optim.Optimizer"),
    (
        {"_target_": "torch.optim.NAdam", "betas": [0.9]},
        r"^betas=\[0\.9\] is not accepted by .*betas=\[0\.9, 0\.999\]$",
    ),
    ({"_target_": "torch.optim.NAdam", "groups": 3}, r"^groups=3 must be a list\."),
    ({"_target_": "???"}, r"^_target_ is required\. Set _target_=VALUE$"),
]


def test_custom_class_that_cannot_be_built_raises_one_line() -> None:
    with each_row() as row:
        for values, expected in BAD_CLASSES:
            with row(values):
                with pytest.raises(ConfigError, match=expected) as raised:
                    build_optimizer(network(), values)
                assert "\n" not in str(raised.value)


@pytest.mark.parametrize("form", [dict, OmegaConf.create])
def test_target_merged_with_a_preset_is_an_error(form: Any) -> None:
    node = OmegaConf.merge(
        {"_target_": "torch.optim.SGD", "lr": 0.1}, OmegaConf.structured(AdamConfig)
    )
    merged = form(OmegaConf.to_container(node, enum_to_str=True))
    expected = (
        r"^_target_='torch\.optim\.SGD' is merged with .* your own class, use lightning_adam/"
    )
    for each in (node, merged, instantiate(merged, _partial_=True)):
        with pytest.raises(ConfigError, match=expected):
            build_optimizer(network(), each)


def test_omegaconf_values_in_a_partial_become_plain() -> None:
    betas: Any = OmegaConf.create([0.8, 0.9])
    node = functools.partial(torch.optim.NAdam, betas=betas)
    (group,) = build_optimizer(nn.Linear(2, 2, bias=False), node).param_groups
    assert type(group["betas"]) is list
