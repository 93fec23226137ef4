"""The schedules against transformers' figures, and what they are refused for."""

from typing import Any

import pytest
import torch
from torch.optim import Adam

from lightning_adam import ConfigError, build_scheduler
from lightning_adam.schedulers import settings

# transformers 5.23, get_scheduler with peak 10, 2 warm-up steps and 10 in all (constant: 4).
LINEAR = [0, 5, 10, 8.75, 7.5, 6.25, 5, 3.75, 2.5, 1.25]
COSINE = [0, 5, 10, 9.619398, 8.535534, 6.913417, 5, 3.086583, 1.464466, 0.380602]
CONSTANT = [0, 2.5, 5, 7.5, 10, 10, 10, 10, 10, 10]


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


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"name": "linear", "warmup_steps": 2}, LINEAR),
        ({"name": "cosine", "warmup_steps": 2}, COSINE),
        ({"name": "cosine", "warmup_ratio": 0.2}, COSINE),
        ({"name": "constant", "warmup_steps": 4}, CONSTANT),
        ({"name": "constant"}, [10.0] * 10),
        ({"name": "linear", "warmup_steps": 0, "min_lr_ratio": 1.0}, [10.0] * 10),
    ],
    ids=str,
)
def test_agrees_with_transformers(config: dict[str, Any], expected: list[float]) -> None:
    assert rates(config, 10, 10) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_ends_at_the_minimum_and_stays_there(name: str) -> None:
    seen = rates({"name": name, "warmup_steps": 3, "min_lr_ratio": 0.1}, 25, 20)
    assert seen[20:] == pytest.approx([1.0] * 5)
    assert min(seen[3:]) >= 1.0


def test_the_configs_own_length_goes_before_the_trainers() -> None:
    assert rates({"name": "linear", "total_steps": 4}, 5, 100) == [10, 7.5, 5, 2.5, 0]


def test_groups_keep_their_ratios() -> None:
    adam = optimizer(10.0, 1.0)
    scheduler = build_scheduler(adam, {"name": "linear", "warmup_steps": 4}, 10)
    adam.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [2.5, 0.25]


@pytest.mark.parametrize(
    "config", [{"name": "cosine"}, {"name": "linear"}, {"name": "constant", "warmup_ratio": 0.1}]
)
def test_a_shape_that_needs_an_end_is_refused_without_one(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"scheduler\.name=.*scheduler\.total_steps=N"):
        build_scheduler(optimizer(1.0), config, None)


def test_a_constant_rate_needs_no_end() -> None:
    assert rates({"name": "constant", "warmup_steps": 4}, 10, None) == CONSTANT


@pytest.mark.parametrize(
    "config",
    [
        {"name": "cosine", "warmup_steps": 101},
        {"name": "constant", "warmup_steps": 101},
        {"name": "linear", "warmup_steps": 101, "total_steps": 1000},
    ],
)
def test_a_warm_up_longer_than_the_run_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"scheduler\.warmup_steps=101: .*within the 100 opt"):
        build_scheduler(optimizer(1.0), config, 100)


def test_saved_and_loaded_it_goes_on_where_it_was() -> None:
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


def test_the_recorded_settings_are_resolved() -> None:
    scheduler = build_scheduler(optimizer(1.0), {"name": "linear", "warmup_ratio": 0.1}, 50)
    assert settings(scheduler) == {
        "name": "linear",
        "warmup_steps": 5,
        "total_steps": 50,
        "min_lr_ratio": 0.0,
    }
    other = torch.optim.lr_scheduler.StepLR(optimizer(1.0), 3)
    assert settings(other) == {"name": "StepLR", "step_size": 3, "gamma": 0.1}
