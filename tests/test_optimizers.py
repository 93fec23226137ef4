"""The builder gives exactly the optimizer that torch would by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_adam import ConfigError, build_optimizer
from lightning_adam.optimizers import choose_implementation, describe, settings
from lightning_adam.schema import AdamConfig

IMPLEMENTATIONS = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"fused": False, "foreach": False},
}


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def trained(
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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("extra", [{}, {"amsgrad": True}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bit_identical_to_torch_by_hand(
    implementation: str, decoupled: bool, extra: dict[str, bool], dtype: torch.dtype
) -> None:
    choice = IMPLEMENTATIONS[implementation]
    values: dict[str, Any] = {"lr": 3e-3, "betas": [0.8, 0.95], "eps": 1e-6, **extra, **choice}

    def by_hand(net: nn.Module) -> torch.optim.Optimizer:
        matrices = [each for each in net.parameters() if each.ndim == 2]
        vectors = [each for each in net.parameters() if each.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": 0.1},
            {"params": vectors, "weight_decay": 0.0},
        ]
        adam = torch.optim.AdamW if decoupled else torch.optim.Adam
        return adam(groups, **{**values, "betas": tuple(values["betas"])})

    config = {**values, "weight_decay": 0.1, "decoupled_weight_decay": decoupled}
    ours = trained(network(dtype), lambda net: build_optimizer(net, config))
    theirs = trained(network(dtype), by_hand)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_every_setting_arrives_in_every_group() -> None:
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


def test_fused_is_taken_where_it_works_and_the_reason_is_said() -> None:
    optimizer = build_optimizer(network(), {})
    assert all(group["fused"] for group in optimizer.param_groups)
    chosen = choose_implementation(AdamConfig(), "optimizer", list(network().parameters()), None)
    assert chosen.reason == "fused: float32 on cpu"


def test_fused_is_not_taken_for_parameters_it_cannot_train() -> None:
    chosen = choose_implementation(
        AdamConfig(), "optimizer", [nn.Parameter(torch.zeros(2, dtype=torch.complex64))], None
    )
    assert chosen.fused is False
    assert "floating point" in chosen.reason


def test_fused_is_not_taken_where_the_training_loop_cannot() -> None:
    optimizer = build_optimizer(network(), {}, fused_obstacle="it may not be")
    assert not any(group["fused"] for group in optimizer.param_groups)


def test_fused_that_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.fused=true: .*it may not be"):
        build_optimizer(network(), {"fused": True}, fused_obstacle="it may not be")


@pytest.mark.parametrize(("eps", "works"), [(1e-8, False), (1e-4, True)])
def test_an_eps_that_is_0_in_the_parameters_dtype_is_refused(eps: float, works: bool) -> None:
    if works:
        build_optimizer(network(torch.float16), {"eps": eps})
        return
    with pytest.raises(ConfigError, match=r"optimizer\.eps=1e-08: .*not 0 in float16.*eps=0\.0001"):
        build_optimizer(network(torch.float16), {"eps": eps})


def test_the_table_shows_each_group() -> None:
    table = describe(build_optimizer(network(), {"weight_decay": 0.1})).splitlines()
    assert table[0].split()[:4] == ["group", "tensors", "parameters", "lr"]
    assert table[1].startswith("decay     2        56          0.001  (0.9, 0.999)  1e-08  0.1")
    assert table[2].endswith("0.bias, 1.weight, …")


def test_the_recorded_settings_are_plain_and_hold_the_peak() -> None:
    optimizer = build_optimizer(network(), {"lr": 0.5})
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    recorded = settings(optimizer)
    assert recorded["param_groups"]["decay"]["lr"] == 0.5
    assert recorded["betas"] == (0.9, 0.999)
    assert set(recorded["param_groups"]) == {"decay", "no_decay"}
    assert not any("params" in group for group in recorded["param_groups"].values())


def test_what_torch_would_refuse_at_the_first_step_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"optimizer: .*capturable"):
        build_optimizer(network(), {"capturable": True, "fused": False})


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"fused": False}, "for-loop: optimizer.fused=false"),
        ({"foreach": True}, "foreach: optimizer.foreach=true"),
        ({"foreach": False}, "fused: float32 on cpu"),
        ({"fused": True}, "fused: float32 on cpu"),
    ],
)
def test_what_is_named_is_taken(choice: dict[str, Any], expected: str) -> None:
    parameters = list(network().parameters())
    chosen = choose_implementation(AdamConfig(**choice), "optimizer", parameters, None)
    assert chosen.reason == expected
