"""The schedules against values of transformers and torch, and configs that are errors."""

import inspect
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.optim import Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_adam import ConfigError, build_scheduler
from lightning_adam.config.schedule import PlateauConfig
from lightning_adam.optim.param_groups import peak_lr
from lightning_adam.optim.schedulers import scheduler_settings, set_peak
from tests.support.tables import each_row

# transformers 5.23, get_scheduler with peak 10, 2 warm-up steps and 10 in all (constant: 4).
LINEAR = [0, 5, 10, 8.75, 7.5, 6.25, 5, 3.75, 2.5, 1.25]
COSINE = [0, 5, 10, 9.619398, 8.535534, 6.913417, 5, 3.086583, 1.464466, 0.380602]
CONSTANT = [0, 2.5, 5, 7.5, 10, 10, 10, 10, 10, 10]
POLYNOMIAL = [0, 5, 10, 7.65625, 5.625, 3.90625, 2.5, 1.40625, 0.625, 0.15625]
INVERSE_SQRT = [0, 5, 10, 8.164966, 7.071068, 6.324555, 5.773503, 5.345225, 5, 4.714045]
WSD = [0, 5, 10, 10, 10, 10, 10, 10, 7.5, 2.5]


def optimizer(*peaks: float) -> Adam:
    return Adam([{"params": [torch.zeros(1, requires_grad=True)], "lr": peak} for peak in peaks])


def rates(config: dict[str, Any], steps: int, total_steps: int | None) -> list[float]:
    adam = optimizer(10.0)
    scheduler = build_scheduler(adam, config, total_steps)
    seen = []
    for _ in range(steps):
        seen.append(adam.param_groups[0]["lr"])
        adam.step()
        scheduler.step()
    return seen


TABLE: list[tuple[dict[str, Any], list[float]]] = [
    ({"name": "linear", "warmup_steps": 2}, LINEAR),
    ({"name": "cosine", "warmup_steps": 2}, COSINE),
    ({"name": "cosine", "warmup_ratio": 0.2}, COSINE),
    ({"name": "constant", "warmup_steps": 4}, CONSTANT),
    ({"name": "constant"}, [10.0] * 10),
    ({"name": "linear", "warmup_steps": 0, "min_lr_ratio": 1.0}, [10.0] * 10),
    ({"name": "polynomial", "power": 2.0, "warmup_steps": 2}, POLYNOMIAL),
    ({"name": "inverse_sqrt", "warmup_steps": 2}, INVERSE_SQRT),
    ({"name": "wsd", "decay_steps": 3, "warmup_steps": 2}, WSD),
]


def test_agrees_with_the_values_of_transformers() -> None:
    with each_row() as row:
        for config, expected in TABLE:
            with row(config):
                assert rates(config, 10, 10) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedule_ends_at_the_minimum_and_stays_there(name: str) -> None:
    seen = rates({"name": name, "warmup_steps": 3, "min_lr_ratio": 0.1}, 25, 20)
    assert seen[20:] == pytest.approx([1.0] * 5)
    assert min(seen[3:]) >= 1.0


def test_total_steps_of_the_config_takes_precedence() -> None:
    assert rates({"name": "linear", "total_steps": 4}, 5, 100) == [10, 7.5, 5, 2.5, 0]


def test_groups_keep_their_lr_scales() -> None:
    adam = optimizer(10.0, 1.0)
    scheduler = build_scheduler(adam, {"name": "linear", "warmup_steps": 4}, 10)
    adam.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [2.5, 0.25]


def test_constant_schedule_needs_no_length() -> None:
    assert rates({"name": "constant", "warmup_steps": 4}, 10, None) == CONSTANT


def test_loaded_state_continues_the_schedule() -> None:
    adam = optimizer(10.0)
    first = build_scheduler(adam, {"name": "cosine", "warmup_steps": 2}, 10)
    for _ in range(4):
        adam.step()
        first.step()
    second = build_scheduler(optimizer(10.0), {"name": "cosine", "warmup_steps": 2}, 10)
    second.load_state_dict(first.state_dict())
    first.step()
    second.step()
    assert second.get_last_lr() == first.get_last_lr()


def test_recorded_settings_are_resolved() -> None:
    scheduler = build_scheduler(optimizer(1.0), {"name": "linear", "warmup_ratio": 0.1}, 50)
    assert scheduler_settings(scheduler) == {
        "name": "linear",
        "warmup_steps": 5,
        "total_steps": 50,
        "min_lr_ratio": 0.0,
    }
    other = torch.optim.lr_scheduler.StepLR(optimizer(1.0), 3)
    assert scheduler_settings(other) == {"name": "StepLR", "step_size": 3, "gamma": 0.1}


def custom(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": "custom", "_target_": f"torch.optim.lr_scheduler.{name}", **arguments}


def test_total_steps_argument_of_a_custom_scheduler_is_the_length() -> None:
    config = custom("OneCycleLR", max_lr=10.0, total_steps="total_steps", cycle_momentum=False)
    scheduler = build_scheduler(optimizer(10.0), config, 10)
    expected = torch.optim.lr_scheduler.OneCycleLR(
        optimizer(10.0), max_lr=10.0, total_steps=10, cycle_momentum=False
    )
    for _ in range(9):
        assert scheduler.get_last_lr() == expected.get_last_lr()
        scheduler.optimizer.step()
        scheduler.step()
        expected.optimizer.step()
        expected.step()


SET_LENGTH = r"Set total_steps=N, or give the Trainer max_steps$"
WARMUP_OF_101 = r"^warmup_steps=101 is longer than the run, which has 100 optimizer steps\. .*=10$"
BAD_SCHEDULES: list[tuple[dict[str, Any], int | None, str]] = [
    # A length that is not known.
    ({"name": "cosine"}, None, rf"^name='cosine' needs .*{SET_LENGTH}"),
    ({"name": "linear"}, None, rf"^name='linear' needs .*{SET_LENGTH}"),
    ({"name": "constant", "warmup_ratio": 0.1}, None, rf"^name='constant' needs .*{SET_LENGTH}"),
    (
        custom("OneCycleLR", max_lr=1.0, total_steps="total_steps"),
        None,
        rf"^total_steps='total_steps' needs .*{SET_LENGTH}",
    ),
    (
        custom("CosineAnnealingLR", T_max="total_steps"),
        None,
        r"^T_max='total_steps' needs .*Set T_max=N, ",
    ),
    # A warm-up longer than the run.
    ({"name": "cosine", "warmup_steps": 101}, 100, WARMUP_OF_101),
    ({"name": "constant", "warmup_steps": 101}, 100, WARMUP_OF_101),
    ({"name": "linear", "warmup_steps": 101, "total_steps": 1000}, 100, WARMUP_OF_101),
    # A decay that overlaps the warm-up.
    (
        {"name": "wsd", "warmup_steps": 8, "decay_steps": 3},
        10,
        r"^decay_steps=3 is more than the 2 st",
    ),
    (
        {"name": "wsd", "warmup_ratio": 0.8, "decay_ratio": 0.3},
        10,
        r"^decay_steps=3 is more than the 2 st",
    ),
    (
        {"name": "wsd", "warmup_steps": 10},
        10,
        r"^warmup_steps=10 leaves none of the 10.*steps=1$",
    ),
    # A class that cannot be built.
    (custom("CosineAnnealingLR"), 10, "missing 1 required positional argument: 'T_max'"),
    (
        custom("StpLR", step_size=1),
        10,
        r"^_target_='torch\.optim\.lr_scheduler\.StpLR' cannot be imported",
    ),
    (
        {"_target_": "torch.optim.Adam", "lr": 0.1},
        10,
        "^_target_='torch.optim.Adam' cannot be called .*: TypeError",
    ),
    ({"_target_": "builtins.id"}, 10, "must be a torch.optim.lr_scheduler.LRScheduler"),
]
"""Configs, the steps of the run, and the error's message."""


def test_schedule_that_cannot_work_raises_one_line() -> None:
    with each_row() as row:
        for config, steps, expected in BAD_SCHEDULES:
            with row((config, steps)):
                with pytest.raises(ConfigError, match=expected) as raised:
                    build_scheduler(optimizer(1.0), config, steps)
                assert "\n" not in str(raised.value)


def test_scheduler_that_cycles_the_momentum_warns() -> None:
    config = custom("OneCycleLR", max_lr=1.0, total_steps=10)
    composed = OmegaConf.create({"scheduler": config}).scheduler
    table = [(config, "cycle_momentum=False"), (composed, r"\+scheduler\.cycle_momentum=false")]
    with each_row() as row:
        for node, setting in table:
            expected = rf"replaces betas=\(0\.9, 0\.999\)\. To keep them, set {setting}$"
            with row(setting), pytest.warns(UserWarning, match=expected):
                build_scheduler(optimizer(1.0), node, 10)


def test_scheduler_that_ignores_the_lr_of_groups_warns() -> None:
    config = custom("OneCycleLR", max_lr=1.0, total_steps=10, cycle_momentum=False)
    with pytest.warns(
        UserWarning, match="same learning rate for all groups, which discards the scales"
    ):
        build_scheduler(optimizer(1.0, 0.1), config, 10)


def test_scheduler_that_keeps_the_groups_does_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    build_scheduler(optimizer(1.0, 0.1), custom("StepLR", step_size=3), 10)
    # Hydra 1.4 warns of every `_target_` that a program lets a config name.
    ours = [each for each in recwarn if "_execution_whitelist_" not in str(each.message)]
    assert not ours


def test_plateau_falls_to_min_lr_ratio_of_the_peak_of_each_group() -> None:
    adam = optimizer(10.0, 1.0)
    config = {"name": "plateau", "patience": 1, "factor": 0.5, "min_lr_ratio": 0.3}
    scheduler = build_scheduler(adam, config, None)
    rates = []
    for metric in [1.0, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]:
        scheduler.step(metric)  # type: ignore[arg-type]
        rates.append([group["lr"] for group in adam.param_groups])
    assert rates[:3] == [[10.0, 1.0]] * 3
    assert rates[3:5] == [[5.0, 0.5]] * 2
    assert rates[-1] == pytest.approx([3.0, 0.3])


def test_inverse_sqrt_without_a_warmup_has_a_timescale() -> None:
    assert rates({"name": "inverse_sqrt", "timescale": 1}, 4, None) == pytest.approx(
        [10.0, 10 / 2**0.5, 10 / 3**0.5, 5.0]
    )
    scheduler = build_scheduler(optimizer(1.0), {"name": "inverse_sqrt"}, None)
    assert scheduler_settings(scheduler)["timescale"] == 10_000


PLATEAUS: list[dict[str, Any]] = [
    {},
    {"mode": "max"},
    {"factor": 0.3, "patience": 0},
    {"threshold": 0.2, "patience": 1},
    {"threshold": 0.2, "threshold_mode": "abs", "patience": 1},
    {"cooldown": 3, "patience": 0},
]


def test_defaults_of_plateau_are_those_of_torch() -> None:
    torchs = inspect.signature(ReduceLROnPlateau).parameters
    ours = PlateauConfig()
    shared = ("mode", "factor", "patience", "threshold", "threshold_mode", "cooldown")
    assert [getattr(ours, name) for name in shared] == [torchs[name].default for name in shared]


def test_plateau_agrees_with_torch() -> None:
    metrics = torch.rand(60, generator=torch.Generator().manual_seed(0)).add(0.3).tolist()
    with each_row() as row:
        for arguments in PLATEAUS:
            with row(arguments):
                ours, theirs = optimizer(10.0), optimizer(10.0)
                settings = {"patience": 3, **arguments}
                scheduler = build_scheduler(ours, {"name": "plateau", **settings}, None)
                expected = ReduceLROnPlateau(theirs, **settings)
                seen = set()
                for metric in metrics:
                    scheduler.step(metric)
                    expected.step(metric)
                    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
                    seen.add(ours.param_groups[0]["lr"])
                assert len(seen) > 1


@pytest.mark.parametrize(
    "config",
    [
        {"name": "plateau", "patience": 0},
        {"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau", "patience": 0},
    ],
    ids=["ours", "torch's"],
)
def test_plateau_keeps_its_factor_when_the_peak_changes(config: dict[str, Any]) -> None:
    adam = optimizer(10.0)
    scheduler = build_scheduler(adam, config, None)
    for metric in (1.0, 2.0):
        scheduler.step(metric)
    group = adam.param_groups[0]
    assert (group["lr"], peak_lr(group)) == (1.0, 10.0)
    set_peak(adam, scheduler, 100.0)
    assert (group["lr"], peak_lr(group)) == (10.0, 100.0)
