"""The schedules against values of transformers and torch, and configs that are errors."""

import functools
import inspect
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.optim import Adam
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lightning_adam import ConfigError, build_scheduler
from lightning_adam.config.schedule import PlateauConfig
from lightning_adam.optim.param_groups import peak_lr
from lightning_adam.optim.schedulers import scheduler_settings, set_peak
from tests.support.tables import each_row

TORCH = "torch.optim.lr_scheduler"
# transformers 5.23, get_scheduler with peak 10, 2 warm-up steps and 10 in all (constant: 4). From
# the peak on. Before it, transformers starts with 0, and this package is one step ahead.
LINEAR = [10 / 3, 20 / 3, 10, 8.75, 7.5, 6.25, 5, 3.75, 2.5, 1.25]
COSINE = [10 / 3, 20 / 3, 10, 9.619398, 8.535534, 6.913417, 5, 3.086583, 1.464466, 0.380602]
CONSTANT: list[float] = [2, 4, 6, 8, 10, 10, 10, 10, 10, 10]
POLYNOMIAL = [10 / 3, 20 / 3, 10, 7.65625, 5.625, 3.90625, 2.5, 1.40625, 0.625, 0.15625]
INVERSE_SQRT = [10 / 3, 20 / 3, 10, 8.164966, 7.071068, 6.324555, 5.773503, 5.345225, 5, 4.714045]
WSD = [10 / 3, 20 / 3, 10, 10, 10, 10, 10, 10, 7.5, 2.5]


def optimizer(*peaks: float) -> Adam:
    return Adam([{"params": [torch.zeros(1, requires_grad=True)], "lr": peak} for peak in peaks])


def rates(
    config: dict[str, Any], steps: int, total_steps: int | None, epoch_steps: float | None = None
) -> list[float]:
    adam = optimizer(10.0)
    scheduler = build_scheduler(adam, config, total_steps, epoch_steps)
    seen = []
    for _ in range(steps):
        seen.append(adam.param_groups[0]["lr"])
        adam.step()
        scheduler.step()
    return seen


def custom(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": "custom", "_target_": f"{TORCH}.{name}", **arguments}


def partial(name: str, **arguments: Any) -> functools.partial[Any]:
    return functools.partial(getattr(torch.optim.lr_scheduler, name), **arguments)


def steps(adam: Adam, scheduler: LRScheduler, count: int) -> list[list[float]]:
    """Returns the learning rates of each group at each step."""
    seen = []
    for _ in range(count):
        seen.append([group["lr"] for group in adam.param_groups])
        adam.step()
        scheduler.step()
    return seen


TABLE: list[tuple[dict[str, Any], list[float]]] = [
    ({"name": "linear", "warmup_steps": 2}, LINEAR),
    ({"name": "cosine", "warmup_steps": 2}, COSINE),
    ({"name": "cosine", "warmup_ratio": 0.2}, COSINE),
    ({"name": "cosine", "warmup_epochs": 0.5}, COSINE),
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
                assert rates(config, 10, 10, 4) == pytest.approx(expected, abs=1e-6)


def test_groups_keep_their_lr_scales() -> None:
    adam = optimizer(10.0, 1.0)
    scheduler = build_scheduler(adam, {"name": "linear", "warmup_steps": 4}, 10)
    adam.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [4.0, 0.4]


def test_constant_schedule_needs_no_length() -> None:
    seen = rates({"name": "constant", "warmup_steps": 4}, 10, None)
    assert seen == pytest.approx(CONSTANT)


MINIMA: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("cosine", {}),
    ("polynomial", {"power": 2.0}),
    ("cosine_restarts", {"num_cycles": 2}),
    ("exponential", {"gamma": 0.1, "decay_steps": 3}),
    ("wsd", {"decay_steps": 3}),
]


def test_min_lr_is_the_ratio_times_the_peak_of_each_group() -> None:
    with each_row() as row:
        for name, settings in MINIMA:
            with row(name):
                seen = []
                for minimum in ({"min_lr": 1.0}, {"min_lr_ratio": 0.1}):
                    adam = optimizer(10.0, 2.0)
                    adam.param_groups[1]["lr_scale"] = 0.2
                    config = {"name": name, "warmup_steps": 2, **settings, **minimum}
                    scheduler = build_scheduler(adam, config, 10)
                    rates = [scheduler.get_last_lr()]
                    for _ in range(12):
                        adam.step()
                        scheduler.step()
                        rates.append(scheduler.get_last_lr())
                    seen.append(rates)
                assert seen[0] == seen[1]
                assert seen[0][10:] == [pytest.approx([1.0, 0.2])] * 3


def test_steps_beyond_the_run_are_shortened_with_a_warning() -> None:
    constant: dict[str, Any] = {"name": "constant"}
    wsd: dict[str, Any] = {"name": "wsd", "decay": "linear", "decay_steps": 9}
    table: list[tuple[dict[str, Any], list[float], str]] = [
        ({**constant, "warmup_steps": 101}, [2, 4, 6, 8], "warmup_steps=101 .* 101 steps, of .* 4"),
        ({**constant, "warmup_epochs": 2}, [2, 4, 6, 8], "warmup_epochs=2.0 .* 10 steps, of .* 4"),
        ({**wsd, "warmup_steps": 2}, [10 / 3, 20 / 3, 10, 5], "decay_steps=9 .* 9 steps, of .* 2"),
        ({**wsd, "warmup_steps": 9}, [2, 4, 6, 8], "warmup_steps=9 .* 9 steps, of .* 4"),
    ]
    with each_row() as row:
        for config, expected, message in table:
            with row(config):
                with pytest.warns(UserWarning, match=f"^{message}"):
                    seen = rates(config, 4, 4, 5)
                assert seen == pytest.approx(expected)


def test_warmup_as_long_as_the_run_is_not_shortened(recwarn: pytest.WarningsRecorder) -> None:
    seen = rates({"name": "constant", "warmup_steps": 4}, 4, 4)
    assert seen == pytest.approx([2, 4, 6, 8])
    assert not recwarn.list


def test_sequence_of_schedulers_equals_torch_by_hand() -> None:
    cosine, linear = partial("CosineAnnealingLR", T_max=7), partial("LinearLR", total_iters=3)
    parts: list[tuple[Any, Callable[[Adam], LRScheduler]]] = [
        (
            partial("SequentialLR", schedulers=[linear, cosine], milestones=[3]),
            lambda adam: SequentialLR(
                adam, [LinearLR(adam, total_iters=3), CosineAnnealingLR(adam, 7)], [3]
            ),
        ),
        (
            partial(
                "SequentialLR",
                schedulers=[linear, partial("CosineAnnealingLR", T_max="total_steps")],
                milestones=[3],
            ),
            lambda adam: SequentialLR(
                adam, [LinearLR(adam, total_iters=3), CosineAnnealingLR(adam, 10)], [3]
            ),
        ),
        (
            partial("ChainedScheduler", schedulers=[linear, partial("ExponentialLR", gamma=0.9)]),
            lambda adam: ChainedScheduler(
                [LinearLR(adam, total_iters=3), ExponentialLR(adam, 0.9)]
            ),
        ),
        (
            partial(
                "ChainedScheduler",
                schedulers=[
                    partial("LinearLR", total_iters="total_steps"),
                    partial("StepLR", step_size=2),
                ],
            ),
            lambda adam: ChainedScheduler([LinearLR(adam, total_iters=10), StepLR(adam, 2)]),
        ),
    ]
    with each_row() as row:
        for (config, by_hand), saved_after in itertools.product(parts, range(0, 10, 3)):
            with row((config, saved_after)):
                theirs = optimizer(10.0, 1.0)
                expected = steps(theirs, by_hand(theirs), 10)
                ours = optimizer(10.0, 1.0)
                first = build_scheduler(ours, config, 10)
                seen = steps(ours, first, saved_after)
                file = io.BytesIO()
                torch.save([ours.state_dict(), first.state_dict()], file)
                file.seek(0)
                loaded = torch.load(file, weights_only=True)
                resumed = optimizer(10.0, 1.0)
                second = build_scheduler(resumed, config, 10)
                resumed.load_state_dict(loaded[0])
                second.load_state_dict(loaded[1])
                assert seen + steps(resumed, second, 10 - saved_after) == expected


def test_sequence_takes_partials_of_hydra() -> None:
    node = OmegaConf.create(
        {
            "scheduler": custom(
                "SequentialLR",
                _partial_=True,
                schedulers=[
                    {"_target_": f"{TORCH}.LinearLR", "_partial_": True, "total_iters": 3},
                    {"_target_": f"{TORCH}.StepLR", "_partial_": True, "step_size": 2},
                ],
                milestones=[3],
            )
        }
    ).scheduler
    theirs = optimizer(10.0)
    by_hand = SequentialLR(theirs, [LinearLR(theirs, total_iters=3), StepLR(theirs, 2)], [3])
    expected = steps(theirs, by_hand, 9)
    with each_row() as row:
        for form in (node, instantiate(node), OmegaConf.to_container(node)):
            with row(type(form)):
                ours = optimizer(10.0)
                assert steps(ours, build_scheduler(ours, form, None), 9) == expected


def test_ended_torch_schedule_keeps_its_last_value() -> None:
    config = custom("OneCycleLR", max_lr=10.0, total_steps=6, cycle_momentum=False)
    ours, theirs = optimizer(10.0), optimizer(10.0)
    by_hand = OneCycleLR(theirs, 10.0, 6, cycle_momentum=False)
    expected = steps(theirs, by_hand, 6)
    scheduler = build_scheduler(ours, config, None)
    with pytest.warns(UserWarning, match=r"OneCycleLR.* has ended after 6 steps"):
        seen = steps(ours, scheduler, 9)
    assert seen == [*expected, *[expected[-1]] * 3]
    resumed = optimizer(10.0)
    second = build_scheduler(resumed, config, None)
    resumed.load_state_dict(ours.state_dict())
    with pytest.warns(UserWarning, match="has ended after 6 steps"):
        second.load_state_dict(scheduler.state_dict())
    assert steps(resumed, second, 2) == seen[-2:]


def test_ended_part_of_a_sequence_keeps_its_last_value() -> None:
    config = partial(
        "SequentialLR",
        schedulers=[
            partial("ConstantLR", total_iters=2),
            partial("OneCycleLR", max_lr=10.0, total_steps=5, anneal_strategy="linear"),
        ],
        milestones=[2],
    )
    adam = optimizer(10.0)
    with pytest.warns(UserWarning, match="OneCycleLR has ended after 5 steps"):
        seen = [lr for (lr,) in steps(adam, build_scheduler(adam, config, None), 10)]
    by_hand = optimizer(10.0)
    expected = steps(by_hand, OneCycleLR(by_hand, 10.0, 5, anneal_strategy="linear"), 5)
    assert seen[2:] == pytest.approx([lr for (lr,) in [*expected, *[expected[-1]] * 3]])


PEAKS: list[dict[str, Any]] = [
    {"name": "cosine", "warmup_steps": 3},
    {"name": "cosine", "warmup_steps": 3, "min_lr": 0.5},
    {"name": "one_cycle"},
    {
        "_target_": "torch.optim.lr_scheduler.OneCycleLR",
        "max_lr": 10.0,
        "total_steps": "total_steps",
        "cycle_momentum": False,
    },
    {
        "_target_": "torch.optim.lr_scheduler.CyclicLR",
        "base_lr": 2.0,
        "max_lr": 10.0,
        "step_size_up": 3,
        "cycle_momentum": False,
    },
    {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 2},
    {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": 6},
]


def test_peak_set_during_a_run_moves_the_whole_curve() -> None:
    with each_row() as row:
        for config in PEAKS:
            with row(config):
                first, second = optimizer(10.0), optimizer(5.0)
                moved = build_scheduler(first, config, 10)
                begun = dict(config)
                if "max_lr" in begun:
                    begun["max_lr"] = 5.0
                if "base_lr" in begun:
                    begun["base_lr"] = 1.0
                expected = steps(second, build_scheduler(second, begun, 10), 10)
                steps(first, moved, 4)
                set_peak(first, moved, 5.0)
                assert steps(first, moved, 6) == [pytest.approx(each) for each in expected[4:]]


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
BAD_SCHEDULES: list[tuple[Any, int | None, str]] = [
    # The length of the run is unknown.
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
    # The minimum is above the peak, or the length of an epoch is unknown.
    (
        {"name": "cosine", "min_lr": 1.5},
        10,
        r"^min_lr=1\.5 is above the peak learning rate, 1\. Use for example min_lr=0\.01$",
    ),
    (
        {"name": "constant", "warmup_epochs": 2},
        None,
        r"^warmup_epochs=2\.0 needs the number of steps of an epoch.*Set warmup_steps=N$",
    ),
    (
        {"name": "exponential"},
        10,
        r"^name='exponential' needs the number of steps of an epoch.*Set decay_steps=N$",
    ),
    # Settings that cannot be combined.
    (
        {"name": "cosine", "warmup_steps": 0, "warmup_epochs": 1},
        10,
        r"^warmup_epochs=1\.0 cannot be combined with warmup_steps",
    ),
    (
        {"name": "cosine", "warmup_ratio": 0.1, "warmup_epochs": 1},
        10,
        r"^warmup_epochs=1\.0 cannot be combined with warmup_ratio",
    ),
    (
        {"name": "cosine", "warmup_steps": 1, "warmup_ratio": 0.1},
        10,
        r"^warmup_ratio=0\.1 cannot be combined with warmup_steps",
    ),
    (
        {"name": "cosine", "min_lr_ratio": 0.1, "min_lr": 0.0},
        10,
        r"^min_lr=0\.0 cannot be combined with min_lr_ratio",
    ),
    (
        {"name": "wsd", "decay_steps": 1, "decay_ratio": 0.1},
        10,
        r"^decay_ratio=0\.1 cannot be combined with decay_steps",
    ),
    # A scheduler or a child of it cannot be built.
    (
        partial("SequentialLR", schedulers=[partial("StepLR", step_sise=1)], milestones=[]),
        10,
        r"^schedulers\.0\.step_sise=1 is not a setting\. Use .*schedulers\.0\.step_size=1$",
    ),
    (
        partial("ChainedScheduler", schedulers=[partial("StepLR")]),
        10,
        r"^schedulers\.0\.step_size is required",
    ),
    (
        partial("ChainedScheduler", schedulers=[partial("LinearLR")], milestones=[3]),
        10,
        r"^milestones=\[3\] is not a setting",
    ),
    (
        custom("CosineAnnealingLR"),
        10,
        r"^T_max is required by .*CosineAnnealingLR\. Set T_max='total_steps'$",
    ),
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


def test_invalid_schedule_raises_one_line() -> None:
    with each_row() as row:
        for config, steps, expected in BAD_SCHEDULES:
            with row((config, steps)):
                with pytest.raises(ConfigError, match=expected) as raised:
                    build_scheduler(optimizer(1.0), config, steps)
                assert "\n" not in str(raised.value)


def test_scheduler_that_cycles_the_momentum_warns() -> None:
    config = custom("OneCycleLR", max_lr=1.0, total_steps=10)
    composed = OmegaConf.create({"scheduler": config}).scheduler
    table = [(config, "cycle_momentum=False"), (composed, r"cfg\.scheduler\.cycle_momentum=False")]
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
        scheduler.step(metric)
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


def test_floor_of_a_plateau_moves_with_the_peak() -> None:
    adam = optimizer(10.0, 2.0)
    adam.param_groups[1]["lr_scale"] = 0.2
    config = custom("ReduceLROnPlateau", patience=0, factor=0.5, min_lr=[4.0, 0.8])
    scheduler = build_scheduler(adam, config, None)
    set_peak(adam, scheduler, 20.0)
    for metric in (1.0, 2.0, 3.0, 4.0, 5.0):
        scheduler.step(metric)
    assert [group["lr"] for group in adam.param_groups] == pytest.approx([8.0, 1.6])


LATER: list[Any] = [
    {"name": "linear", "total_steps": 10},
    partial("StepLR", step_size=3, gamma=0.5),
    partial("LambdaLR", lr_lambda=lambda step: 1 / (1 + step)),
    partial("CosineAnnealingLR", T_max=10),
    partial("ExponentialLR", gamma=0.5),
]


def test_group_that_is_added_later_keeps_its_ratio_to_the_first() -> None:
    with each_row() as row:
        for config in LATER:
            with row(config):
                adam = optimizer(10.0)
                scheduler = build_scheduler(adam, config, None)
                steps(adam, scheduler, 4)
                lr = adam.param_groups[0]["lr"]
                later = {"params": [torch.zeros(1, requires_grad=True)], "lr": lr / 5}
                adam.add_param_group({**later, "initial_lr": 2.0})
                rates = steps(adam, scheduler, 6)
                assert [each[1] for each in rates] == pytest.approx([e[0] / 5 for e in rates])
                assert rates[0] != rates[-1]
