"""Resume: the settings and the schedule that apply, and the state of each parameter."""

import itertools
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_adam import ConfigError, build_adam
from lightning_adam.config.optimizer import Resume
from lightning_adam.optim.schedulers import set_peak
from tests.support.loops import Manual
from tests.support.tables import each_row
from tests.support.training import (
    ADAMW,
    Lit,
    assert_same_parameters,
    loader,
    loss_of,
    network,
    parameters,
    trainer,
)

LINEAR = {"name": "linear", "total_steps": 20}
SCHEDULES = "torch.optim.lr_scheduler"
HEAD = [{"name": "head", "match": "net.3.*", "lr_scale": 10}]
STEPS = 5
CONFIG = {"resume": "config"}
DEFAULTS = {"betas": (0.9, 0.999), "eps": 1e-8}


def run_training(
    optimizer: Any,
    scheduler: Any = None,
    epochs: int = 1,
    checkpoint: Path | None = None,
    **flags: Any,
) -> tuple[Lit, L.Trainer]:
    """Trains until a number of epochs, from a checkpoint if there is one."""
    module, fit = Lit(optimizer, scheduler), trainer(max_epochs=epochs, **flags)
    fit.fit(module, loader(STEPS), ckpt_path=checkpoint)
    return module, fit


def saved(folder: Path, *arguments: Any, **flags: Any) -> Path:
    """Returns the checkpoint of a run of one epoch."""
    _, fit = run_training(*arguments, **flags)
    fit.save_checkpoint(folder / "first.ckpt")
    return folder / "first.ckpt"


def are_equal(one: L.LightningModule, other: L.LightningModule) -> bool:
    pairs = zip(parameters(one), parameters(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def assert_close(
    one: L.LightningModule, other: L.LightningModule, rtol: float, atol: float
) -> None:
    for a, b in zip(parameters(one), parameters(other), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@contextmanager
def log_lines() -> Iterator[list[str]]:
    """The log lines about resuming."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if message.startswith("resuming: "):
                lines.append(message.removeprefix("resuming: "))

    logger, handler = logging.getLogger("lightning_adam"), Keep()
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def settings(fit: L.Trainer, *names: str) -> dict[str, list[Any]]:
    """Settings of the groups, by the groups' names."""
    groups = fit.optimizers[0].param_groups
    return {group["name"]: [group[name] for name in names] for group in groups}


def by_hand(optimizer: torch.optim.Optimizer, net: nn.Module, schedule: list[list[float]]) -> None:
    """Trains over the batches of Lit in a plain loop, with the learning rates of each group."""
    for rates, batch in zip(schedule, list(loader(STEPS)) * 2, strict=False):
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(net, (batch[0], batch[1])))
        optimizer.step()


def adamw(net: nn.Sequential, **settings: Any) -> torch.optim.AdamW:
    """Returns the groups of Lit's AdamW in plain torch."""
    decay = [net[0].weight, net[3].weight]
    no_decay = [net[0].bias, *net[1].parameters(), net[3].bias]
    groups = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, fused=True, **settings)  # type: ignore[arg-type]


CHANGED: list[tuple[dict[str, Any], str, str]] = [
    ({"lr": 3e-3}, "lr=0.003", "0.01"),
    ({"betas": [0.8, 0.9]}, "betas=[0.8, 0.9]", "[0.9, 0.999]"),
    ({"eps": 1e-6}, "eps=1e-06", "1e-08"),
    ({"weight_decay": 0.3}, "weight_decay=0.3 (in decay)", "0.1"),
    ({"amsgrad": True}, "amsgrad=True", "False"),
    ({"maximize": True}, "maximize=True", "False"),
    ({"decoupled_weight_decay": False}, "decoupled_weight_decay=False", "True"),
]
"""A setting of the config, how it is logged, and the checkpoint's value."""
USE_CONFIG = "To use the config's, set resume='config'"


def changed_by_hand(name: str, value: Any) -> nn.Module:
    """Trains two epochs of Lit in a plain loop; a setting changes between them."""
    net = network()
    optimizer = adamw(net, lr=1e-2, weight_decay=0.1)
    by_hand(optimizer, net, [[1e-2 * (1 - step / 20)] * 2 for step in range(STEPS)])
    for group in optimizer.param_groups:
        if group["weight_decay"] or name != "weight_decay":
            group[name] = tuple(value) if isinstance(value, list) else value
    if name == "amsgrad":
        for state in optimizer.state.values():
            state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()
    peak = value if name == "lr" else 1e-2
    later = range(STEPS, 2 * STEPS)
    by_hand(optimizer, net, [[peak * (1 - step / 20)] * 2 for step in later])
    return net


def test_changed_setting_applies_and_all_others_continue(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, ADAMW, LINEAR)
    with each_row() as row:
        for (changed, setting, before), resume in itertools.product(CHANGED, Resume):
            with row((changed, resume)):
                config = {**ADAMW, **changed, "resume": resume.value}
                with log_lines() as lines:
                    resumed, _ = run_training(config, LINEAR, 2, checkpoint)
                assert lines == [f"{setting} replaces the checkpoint's {before}"]
                expected = changed_by_hand(*next(iter(changed.items())))
                assert_same_parameters(resumed, expected)


def without_record(checkpoint: Path) -> Path:
    """Returns the checkpoint without the recorded settings, like one of a torch optimizer."""
    loaded = torch.load(checkpoint, weights_only=True)
    for group in loaded["optimizer_states"][0]["param_groups"]:
        del group["configured"]
    torch.save(loaded, checkpoint)
    return checkpoint


def test_checkpoint_without_a_record_applies_and_each_difference_is_logged_once(
    tmp_path: Path,
) -> None:
    checkpoint = without_record(saved(tmp_path, ADAMW, LINEAR))
    uninterrupted_run, _ = run_training(ADAMW, LINEAR, epochs=2)
    with each_row() as row:
        for changed, setting, kept in CHANGED:
            with row(changed):
                with log_lines() as lines:
                    resumed, _ = run_training({**ADAMW, **changed}, LINEAR, 2, checkpoint)
                assert are_equal(resumed, uninterrupted_run)
                line = f"{setting} is not used: the checkpoint's {kept} is kept. {USE_CONFIG}"
                assert lines == [line]


def test_config_applies_to_a_checkpoint_without_a_record_on_request(tmp_path: Path) -> None:
    checkpoint = without_record(saved(tmp_path, ADAMW, LINEAR))
    with each_row() as row:
        for changed, setting, before in CHANGED:
            with row(changed):
                config = {**ADAMW, **changed, **CONFIG}
                with log_lines() as lines:
                    resumed, _ = run_training(config, LINEAR, 2, checkpoint)
                assert lines == [f"{setting} replaces the checkpoint's {before}"]
                expected = changed_by_hand(*next(iter(changed.items())))
                assert_same_parameters(resumed, expected)


class Setting(L.Callback):
    """Changes a setting at run time, at the end of the first epoch."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 0:
            for group in trainer.optimizers[0].param_groups:
                group.update(self.values)


SET_AT_RUN_TIME = [
    ("lr", 4e-3, 3e-3),
    ("betas", (0.5, 0.9), (0.8, 0.9)),
    ("eps", 1e-5, 1e-6),
    ("weight_decay", 0.7, 0.3),
]
"""A setting, what a callback sets, and another value of the config."""


def test_value_set_by_a_callback_is_kept_unless_the_config_changes_it(tmp_path: Path) -> None:
    unset = {**ADAMW, "weight_decay_on": "all"}
    with each_row() as row:
        for name, found, other in SET_AT_RUN_TIME:
            callback = Setting(**{name: found})
            checkpoint = saved(tmp_path, unset, callbacks=[callback])
            uninterrupted_run, _ = run_training(
                unset, None, 2, callbacks=[Setting(**{name: found})]
            )
            cases: list[tuple[str, dict[str, Any], Any]] = [
                ("same config", {}, found),
                ("another setting changed", {"maximize": True}, found),
                ("changed", {name: other}, other),
                ("config on request", {"resume": "config"}, {**DEFAULTS, **unset}[name]),
            ]
            for case, changed, expected in cases:
                with row((name, case)):
                    with log_lines() as lines:
                        resumed, fit = run_training({**unset, **changed}, None, 2, checkpoint)
                    (group,) = fit.optimizers[0].param_groups
                    assert group[name] == expected
                    assert any(line.startswith(name) for line in lines) == (expected != found)
                    if case == "same config":
                        assert lines == []
                        assert are_equal(resumed, uninterrupted_run)


def test_recorded_settings_are_those_of_the_last_run(tmp_path: Path) -> None:
    """A changed value is not a change when the run is resumed again."""
    first = saved(tmp_path, ADAMW, LINEAR)
    _, second = run_training({**ADAMW, "lr": 3e-3}, LINEAR, 2, first)
    second.save_checkpoint(tmp_path / "second.ckpt")
    with each_row() as row:
        for lr, expected in ((3e-3, []), (1e-2, ["lr=0.01 replaces the checkpoint's 0.003"])):
            with row(lr):
                with log_lines() as lines:
                    config = {**ADAMW, "lr": lr}
                    _, fit = run_training(config, LINEAR, 3, tmp_path / "second.ckpt")
                assert lines == expected
                assert settings(fit, "initial_lr")["decay"] == [lr]


def test_logged_difference_names_its_config_path(tmp_path: Path) -> None:
    folder = tmp_path / "conf"
    folder.mkdir()
    content = {"model": {"optimizer": ADAMW, "scheduler": LINEAR}}
    OmegaConf.save(OmegaConf.create(content), folder / "config.yaml")
    checkpoint = saved(tmp_path, ADAMW, LINEAR)
    overrides = ["+model.optimizer.amsgrad=true", "model.scheduler.name=cosine"]
    with initialize_config_dir(str(folder), version_base="1.3"):
        model = compose("config", overrides=overrides).model
    changed = "model.optimizer.amsgrad=true"
    schedule = "model.scheduler.name=cosine replaces the checkpoint's linear"
    with log_lines() as lines:
        run_training(model.optimizer, model.scheduler, 2, checkpoint)
    assert lines == [f"{changed} replaces the checkpoint's false", schedule]
    with log_lines() as lines:
        run_training(model.optimizer, model.scheduler, 2, without_record(checkpoint))
    use_config = "To use the config's, set +model.optimizer.resume=config"
    assert lines == [
        f"{changed} is not used: the checkpoint's false is kept. {use_config}",
        schedule,
    ]


def test_nothing_is_logged_if_nothing_differs(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, ADAMW, LINEAR)
    with log_lines() as lines:
        run_training(ADAMW, LINEAR, epochs=2, checkpoint=checkpoint)
    assert lines == []


def test_settings_and_schedule_of_the_config_continue_from_the_checkpoints_step(
    tmp_path: Path,
) -> None:
    checkpoint = saved(tmp_path, ADAMW, LINEAR)
    other = {"lr": 3e-3, "weight_decay": 0.1, "decoupled_weight_decay": True, **CONFIG}
    schedule = {"name": "polynomial", "power": 2.0, "total_steps": 10}
    module, _ = run_training({**other, "betas": [0.8, 0.9]}, schedule, 2, checkpoint)
    net = network()
    first = [1e-2 * (1 - step / 20) for step in range(STEPS)]
    second = [3e-3 * (1 - step / 10) ** 2 for step in range(STEPS, 2 * STEPS)]
    optimizer = adamw(net, weight_decay=0.1)
    by_hand(optimizer, net, [[lr, lr] for lr in first])
    for group in optimizer.param_groups:
        group["betas"] = (0.8, 0.9)
    by_hand(optimizer, net, [[lr, lr] for lr in second])
    assert all(torch.equal(a, b) for a, b in zip(parameters(module), parameters(net), strict=True))


IMPLEMENTATIONS = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"fused": False},
}


@pytest.mark.parametrize("before", IMPLEMENTATIONS)
def test_implementation_is_the_current_one_and_resumes_any_other(
    before: str, tmp_path: Path
) -> None:
    config = {**ADAMW, **IMPLEMENTATIONS[before]}
    checkpoint = saved(tmp_path, config)
    uninterrupted_run, _ = run_training(config, epochs=2)
    with each_row() as row:
        for after, resume in itertools.product(IMPLEMENTATIONS, Resume):
            with row((after, resume)):
                changed = {**ADAMW, **IMPLEMENTATIONS[after], "resume": resume.value}
                with log_lines() as lines:
                    resumed, fit = run_training(changed, None, 2, checkpoint)
                (name, value), *_ = IMPLEMENTATIONS[after].items()
                assert settings(fit, name)["decay"] == [value]
                assert lines == []
                if after == before:
                    assert are_equal(resumed, uninterrupted_run)
                else:
                    assert_close(resumed, uninterrupted_run, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_fused_and_not_fused_resume_each_other_under_a_grad_scaler(
    fused: bool, clip: float | None, tmp_path: Path
) -> None:
    """With Lightning alone, a fused run that resumes another raises an AssertionError."""

    def flags() -> dict[str, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        return {
            "plugins": [MixedPrecision("16-mixed", "cpu", scaler)],
            "gradient_clip_val": clip,
        }

    before, after = {**ADAMW, "fused": fused}, {**ADAMW, "fused": not fused}
    checkpoint = saved(tmp_path, before, **flags())
    uninterrupted_run, _ = run_training(before, epochs=2, **flags())
    resumed, fit = run_training(after, None, 2, checkpoint, **flags())
    assert settings(fit, "fused")["decay"] == [not fused]
    assert_close(resumed, uninterrupted_run, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("turned_on", [True, False])
def test_amsgrad_maximum_starts_from_the_second_moment_or_is_dropped(
    turned_on: bool, tmp_path: Path
) -> None:
    checkpoint = saved(tmp_path, {**ADAMW, "amsgrad": not turned_on})
    moments = [each["exp_avg_sq"] for each in state_of(checkpoint).values()]
    _, fit = run_training({**ADAMW, "amsgrad": turned_on, **CONFIG}, None, 2, checkpoint)
    states = list(fit.optimizers[0].state.values())
    assert all(("max_exp_avg_sq" in state) == turned_on for state in states)
    if turned_on:
        for state, moment in zip(states, moments, strict=True):
            assert (state["max_exp_avg_sq"] >= moment).all()


def test_amsgrad_maximum_of_the_checkpoint_continues(tmp_path: Path) -> None:
    # The second moment decays fast, so it falls below its maximum.
    config = {**ADAMW, "amsgrad": True, "betas": [0.9, 0.5]}
    checkpoint = saved(tmp_path, config)
    states = state_of(checkpoint).values()
    assert any((state["max_exp_avg_sq"] > state["exp_avg_sq"]).any() for state in states)
    uninterrupted_run, _ = run_training(config, epochs=2)
    resumed, _ = run_training(config, None, 2, checkpoint)
    assert are_equal(resumed, uninterrupted_run)


def state_of(checkpoint: Path) -> dict[int, dict[str, Tensor]]:
    loaded = torch.load(checkpoint, weights_only=True)
    states: dict[int, dict[str, Tensor]] = loaded["optimizer_states"][0]["state"]
    return states


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], HEAD),
        (HEAD, []),
        (HEAD, [{"name": "norm", "match": "net.1.*", "lr_scale": 10}]),
        ([{"name": "head", "match": "net.3.weight"}], [{"name": "head", "match": "net.0.weight"}]),
    ],
    ids=["more", "fewer", "as many, other parameters", "as many, as large, other parameters"],
)
def test_each_parameter_keeps_its_state_in_any_groups(
    before: list[Any], after: list[Any], tmp_path: Path
) -> None:
    """Groups change nothing without decay and with the same learning rate."""

    def config(groups: list[Any]) -> dict[str, Any]:
        return {"lr": 1e-2, "groups": [{**group, "lr_scale": 1.0} for group in groups]}

    checkpoint = saved(tmp_path, config(before), LINEAR)
    uninterrupted_run, _ = run_training(config(before), LINEAR, epochs=2)
    for resume in ("checkpoint", "config"):
        resumed, _ = run_training({**config(after), "resume": resume}, LINEAR, 2, checkpoint)
        assert are_equal(resumed, uninterrupted_run), resume


def test_new_groups_keep_the_settings_their_parameters_shared(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, ADAMW, LINEAR, callbacks=[Setting(eps=1e-5)])
    with log_lines() as lines:
        _, fit = run_training({**ADAMW, "groups": HEAD}, LINEAR, 2, checkpoint)
    assert settings(fit, "initial_lr", "eps") == {
        "head": [1e-1, 1e-5],
        "head_no_decay": [1e-1, 1e-5],
        "decay": [1e-2, 1e-5],
        "no_decay": [1e-2, 1e-5],
    }
    assert lines == ["lr=0.1 (in head, head_no_decay) replaces the checkpoint's 0.01"]


def test_new_groups_keep_the_lr_of_a_checkpoint_without_a_record(tmp_path: Path) -> None:
    checkpoint = without_record(saved(tmp_path, ADAMW, LINEAR))
    with log_lines() as lines:
        _, fit = run_training({**ADAMW, "groups": HEAD}, LINEAR, 2, checkpoint)
    assert settings(fit, "initial_lr")["head"] == [1e-2]
    (only,) = lines
    setting = "lr=0.1 (in head, head_no_decay)"
    assert only == f"{setting} is not used: the checkpoint's 0.01 is kept. {USE_CONFIG}"


MERGED: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "the lr is changed for all of them",
        {"lr": 2e-3},
        ["lr=0.002 replaces the checkpoint's 0.01"],
    ),
    (
        "the config has one value where a callback has set several",
        {},
        [
            "optimizer: the checkpoint has several settings for the parameters of the group"
            f" {name}, so the config's apply"
            for name in ("decay", "no_decay")
        ],
    ),
]


class SettingHead(L.Callback):
    """Sets the rate of the head alone, as callbacks that unfreeze do."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for group in trainer.optimizers[0].param_groups:
            if group["name"].startswith("head"):
                group["initial_lr"] = 3e-3


def test_groups_merged_from_different_settings_take_those_of_the_config(tmp_path: Path) -> None:
    groups = [{**HEAD[0], "lr_scale": 1.0}]
    with each_row() as row:
        for case, changed, expected in MERGED:
            before = {**ADAMW, "groups": groups if not changed else HEAD}
            callbacks = [] if changed else [SettingHead()]
            checkpoint = saved(tmp_path, before, LINEAR, callbacks=callbacks)
            with row(case):
                with log_lines() as lines:
                    _, fit = run_training({**ADAMW, **changed}, LINEAR, 2, checkpoint)
                peak = changed.get("lr", 1e-2)
                assert settings(fit, "initial_lr", "lr") == {
                    "decay": [peak, pytest.approx(peak * 0.5)],
                    "no_decay": [peak, pytest.approx(peak * 0.5)],
                }
                assert lines == expected


def test_groups_merged_from_different_settings_continue_a_schedule_that_multiplies_the_lr(
    tmp_path: Path,
) -> None:
    """Such a schedule computes each lr from the one before it, and not from the peak."""
    schedule = {"_target_": f"{SCHEDULES}.ExponentialLR", "gamma": 0.9, "interval": "step"}
    checkpoint = saved(tmp_path, {**ADAMW, "groups": HEAD}, schedule)
    _, fit = run_training({**ADAMW, "lr": 2e-3}, schedule, 2, checkpoint)
    expected = [2e-3, pytest.approx(2e-3 * 0.9 ** (2 * STEPS))]
    assert settings(fit, "initial_lr", "lr") == {"decay": expected, "no_decay": expected}


class PartlyFrozen(Lit):
    def __init__(self, frozen: bool) -> None:
        super().__init__(ADAMW)
        self.net[0].requires_grad_(not frozen)


@pytest.mark.parametrize("frozen", [True, False], ids=["at first", "later"])
def test_parameters_frozen_before_or_after_resuming_are_logged(
    frozen: bool, tmp_path: Path
) -> None:
    first, again = trainer(max_epochs=1), trainer(max_epochs=2)
    first.fit(PartlyFrozen(frozen), loader(STEPS))
    first.save_checkpoint(tmp_path / "first.ckpt")
    with log_lines() as lines:
        again.fit(PartlyFrozen(not frozen), loader(STEPS), ckpt_path=tmp_path / "first.ckpt")
    (only,) = lines
    assert "net.0.weight, net.0.bias" in only
    assert ("moments start at 0" if frozen else "is discarded: not trained here") in only
    steps = {float(state["step"]) for state in again.optimizers[0].state.values()}
    assert steps == ({10.0, 5.0} if frozen else {10.0})


class Unnamed(Lit):
    """Builds groups without names: like the mixin's, or of other sizes."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(ADAMW)
        self.sizes = sizes

    def configure_optimizers(self) -> Any:
        if not self.sizes:
            return adamw(self.net, lr=1e-2, weight_decay=0.1)
        remaining = iter(self.parameters())
        groups = [{"params": [*itertools.islice(remaining, size)]} for size in self.sizes]
        return torch.optim.AdamW(groups, lr=1e-2)


def test_checkpoint_without_names_is_matched_by_position(tmp_path: Path) -> None:
    first = trainer(max_epochs=1)
    first.fit(Unnamed(), loader(STEPS))
    first.save_checkpoint(tmp_path / "first.ckpt")
    resumed, _ = run_training(ADAMW, None, 2, tmp_path / "first.ckpt")
    uninterrupted_run, _ = run_training(ADAMW, epochs=2)
    assert are_equal(resumed, uninterrupted_run)


def test_checkpoint_without_names_and_of_other_groups_is_an_error(tmp_path: Path) -> None:
    with each_row() as row:
        for sizes in ((1, 1, 4), (3, 3), (4, 2), (5,)):
            first = trainer(max_epochs=1)
            first.fit(Unnamed(*sizes), loader(STEPS))
            first.save_checkpoint(tmp_path / "first.ckpt")
            own = r"^optimizer has groups of \[2, 4\] parameters"
            expected = rf"{own}, .* groups of {re.escape(str([*sizes]))}\."
            with row(sizes), pytest.raises(ConfigError, match=expected):
                run_training(ADAMW, None, 2, tmp_path / "first.ckpt")


@pytest.mark.parametrize("nadam_first", [True, False])
def test_state_of_another_optimizer_is_an_error(nadam_first: bool, tmp_path: Path) -> None:
    configs: list[dict[str, Any]] = [ADAMW, {"_target_": "torch.optim.NAdam", "lr": 1e-2}]
    before, after = reversed(configs) if nadam_first else configs
    checkpoint = saved(tmp_path, before)
    adam, nadam = r"torch\.optim\.adam\.Adam", r"torch\.optim\.nadam\.NAdam"
    own, other = (adam, nadam) if nadam_first else (nadam, adam)
    expected = rf"^optimizer is {own}, .* was trained with {other}\. Resume it with {other}"
    with pytest.raises(ConfigError, match=expected):
        run_training({**after, **CONFIG}, None, 2, checkpoint)


def test_state_of_another_optimizer_without_a_name_is_an_error(tmp_path: Path) -> None:
    class Plain(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    first = trainer(max_epochs=1)
    first.fit(Plain(), loader(STEPS))
    first.save_checkpoint(tmp_path / "first.ckpt")
    config = {**ADAMW, "weight_decay_on": "all"}
    with pytest.raises(ConfigError, match=r"^optimizer is Adam, but .* has momentum_buffer"):
        run_training(config, None, 2, tmp_path / "first.ckpt")


def test_changed_setting_of_a_custom_optimizer_applies(tmp_path: Path) -> None:
    config = {"_target_": "torch.optim.NAdam", "lr": 1e-2, "momentum_decay": 1e-3}
    checkpoint = saved(tmp_path, config)
    changed = {**config, "momentum_decay": 1e-2}
    with each_row() as row:
        for has_record, resume in itertools.product((True, False), Resume):
            with row((has_record, resume)):
                if not has_record:
                    without_record(saved(tmp_path, config))
                with log_lines() as lines:
                    _, fit = run_training({**changed, "resume": resume.value}, None, 2, checkpoint)
                is_applied = has_record or resume is Resume.config
                assert settings(fit, "momentum_decay")["decay"] == [1e-2 if is_applied else 1e-3]
                said = "replaces" if is_applied else "is not used"
                assert len(lines) == 1
                assert lines[0].startswith(f"momentum_decay=0.01 {said}")


def test_eps_that_rounds_to_0_in_the_new_dtype_is_an_error(tmp_path: Path) -> None:
    """Also for an eps that a callback has set."""
    sentence = r"^eps=1e-08 rounds to 0 in float16"
    small = {**ADAMW, "eps": 1e-4}
    unchanged = saved(tmp_path, small, callbacks=[Setting(eps=1e-8)])
    with pytest.raises(ConfigError, match=sentence):
        run_training(small, None, 2, unchanged, precision="16-true")
    without = without_record(saved(tmp_path, ADAMW))
    with pytest.raises(ConfigError, match=sentence):
        run_training(small, None, 2, without, precision="16-true")
    changed = saved(tmp_path, ADAMW)
    _, fit = run_training(small, None, 2, changed, precision="16-true")
    assert settings(fit, "eps")["decay"] == [1e-4]


ANNEALING = {"_target_": f"{SCHEDULES}.CosineAnnealingLR", "interval": "step"}


def falling(total: int, end: float = 0.0) -> Any:
    return lambda step: 1 - (1 - end) * min(step / total, 1)


def cosine(total: int) -> Any:
    return lambda step: (1 + math.cos(math.pi * min(step / total, 1))) / 2


T_MAX_20, T_MAX_10 = {**ANNEALING, "T_max": 20}, {**ANNEALING, "T_max": 10}
EXPONENTIAL = {"_target_": f"{SCHEDULES}.ExponentialLR", "gamma": 0.9, "interval": "step"}
CHANGED_SCHEDULES: list[tuple[Any, Any, Any, list[str]]] = [
    (
        LINEAR,
        {**LINEAR, "min_lr_ratio": 0.5},
        falling(20, 0.5),
        ["min_lr_ratio=0.5 replaces the checkpoint's 0.0"],
    ),
    (LINEAR, {**LINEAR, "name": "cosine"}, cosine(20), ["name='cosine' replaces {}'linear'"]),
    (
        LINEAR,
        {**LINEAR, "total_steps": 40},
        falling(40),
        ["total_steps=40 replaces the checkpoint's 20"],
    ),
    (T_MAX_20, T_MAX_10, cosine(10), ["T_max=10 replaces the checkpoint's 20"]),
    (LINEAR, T_MAX_10, cosine(10), ["name"]),
    (T_MAX_20, LINEAR, falling(20), ["name"]),
    (LINEAR, EXPONENTIAL, lambda step: 0.9**step, ["name"]),
    (EXPONENTIAL, LINEAR, falling(20), ["name"]),
    (EXPONENTIAL, T_MAX_10, cosine(10), ["name"]),
    (None, LINEAR, falling(20), []),
    (None, T_MAX_10, cosine(10), []),
    (LINEAR, None, lambda step: 1.0, []),
    (T_MAX_20, None, lambda step: 1.0, []),
]
"""The schedules of checkpoint and config, the expected factor, and the log line."""


class Rates(L.Callback):
    def __init__(self) -> None:
        self.used = list[float]()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        optimizer.register_step_pre_hook(
            lambda *_: self.used.append(optimizer.param_groups[0]["lr"])
        )


def test_configured_schedule_continues_at_the_checkpoints_step(tmp_path: Path) -> None:
    with each_row() as row:
        for (before, after, factor, said), resume in itertools.product(CHANGED_SCHEDULES, Resume):
            checkpoint = saved(tmp_path, ADAMW, before)
            with row((before, after, resume)):
                rates = Rates()
                config = {**ADAMW, "resume": resume.value}
                with log_lines() as lines:
                    run_training(config, after, 2, checkpoint, callbacks=[rates])
                expected = [1e-2 * factor(step) for step in range(STEPS, 2 * STEPS)]
                assert rates.used == pytest.approx(expected)
                assert len(lines) == len(said)
                for line, words in zip(lines, said, strict=True):
                    assert line.startswith(words.format("the checkpoint's "))


def test_custom_schedule_of_the_config_continues_at_the_current_step(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, ADAMW, {**ANNEALING, "T_max": 40})
    config = {**ADAMW, "lr": 3e-3, **CONFIG}
    _, fit = run_training(config, {**ANNEALING, "T_max": 15}, 2, checkpoint)
    fresh = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=3e-3)
    annealing = CosineAnnealingLR(fresh, T_max=15)
    for _ in range(2 * STEPS):
        fresh.step()
        annealing.step()
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(fresh.param_groups[0]["lr"])


class Stalled(Lit):
    """Validation never improves."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", 1.0)


PLATEAU = {"name": "plateau", "factor": 0.5, "patience": 1}


def fit_stalled(
    config: Any, plateau: Any, epochs: int, checkpoint: Path | None = None
) -> L.Trainer:
    fit = trainer(max_epochs=epochs)
    fit.fit(Stalled(config, plateau), loader(2), loader(1), ckpt_path=checkpoint)
    return fit


@pytest.mark.parametrize("resume", Resume)
@pytest.mark.parametrize("lr", [1e-2, 1e-3])
def test_plateau_resumes_with_its_metric_history(resume: Resume, lr: float, tmp_path: Path) -> None:
    checkpoint = tmp_path / "first.ckpt"
    fit_stalled(ADAMW, PLATEAU, 4).save_checkpoint(checkpoint)
    fit = fit_stalled({**ADAMW, "lr": lr, "resume": resume.value}, PLATEAU, 6, checkpoint)
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(lr * 0.25)
    built: Any = fit.lr_scheduler_configs[0].scheduler
    assert built.plateau.last_epoch == 6


def test_plateau_of_another_mode_keeps_the_lr_but_not_the_history(tmp_path: Path) -> None:
    """A best value has no meaning in the other mode."""
    checkpoint = tmp_path / "first.ckpt"
    fit_stalled(ADAMW, PLATEAU, 4).save_checkpoint(checkpoint)
    fit = fit_stalled(ADAMW, {**PLATEAU, "mode": "max"}, 6, checkpoint)
    halved_once = ADAMW["lr"] * 0.5
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(halved_once)


KINDS: dict[str, Any] = {
    "none": None,
    "linear": LINEAR,
    "plateau": {"name": "plateau", "factor": 0.5, "patience": 0},
    "ExponentialLR of steps": EXPONENTIAL,
    "StepLR of epochs": {"_target_": f"{SCHEDULES}.StepLR", "step_size": 1, "gamma": 0.5},
    "ReduceLROnPlateau": {
        "_target_": f"{SCHEDULES}.ReduceLROnPlateau",
        "factor": 0.5,
        "patience": 0,
        "monitor": "val/loss",
    },
}
"""Schedules that count steps, epochs or comparisons."""
FACTORS: dict[str, Any] = {
    "linear": lambda step, epoch: 1 - step / 20,
    "ExponentialLR of steps": lambda step, epoch: 0.9**step,
    "StepLR of epochs": lambda step, epoch: 0.5**epoch,
}
"""Factors by completed optimizer steps and epochs; a plateau starts again."""


@pytest.mark.parametrize("saved_by", ["the trainer", "a callback"])
def test_schedule_that_replaces_another_kind_continues_at_the_equivalent_step(
    saved_by: str, tmp_path: Path
) -> None:
    """The learning rate of the first step; the checkpoint is of 3 epochs of 2 steps."""
    with each_row() as row:
        for before, old in KINDS.items():
            saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
            flags = {"enable_checkpointing": True, "callbacks": [saving]}
            first = trainer(max_epochs=3, **flags)
            first.fit(Stalled(ADAMW, old), loader(2), loader(1))
            checkpoint = tmp_path / "epoch=2.ckpt"
            if saved_by == "the trainer":
                first.save_checkpoint(checkpoint)
            for after, new in KINDS.items():
                if "plateau" in before.lower() and after == before:
                    continue
                with row((before, after)):
                    rates = Rates()
                    again = trainer(max_epochs=4, callbacks=[rates])
                    again.fit(Stalled(ADAMW, new), loader(2), loader(1), ckpt_path=checkpoint)
                    factor = FACTORS.get(after, lambda step, epoch: 1.0)(6, 3)
                    assert rates.used[0] == pytest.approx(1e-2 * factor)
            checkpoint.unlink()


class Unfreezing(BaseFinetuning):
    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        self.freeze(pl_module.net[0])  # type: ignore[index]

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch > 1:
            # `freeze_before_training` has frozen it again in a resumed run.
            self.make_trainable(pl_module.net[0])
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


def test_run_with_added_groups_is_resumed_bit_identically(tmp_path: Path) -> None:
    def run_epochs(epochs: int, checkpoint: Path | None = None) -> tuple[Lit, L.Trainer]:
        module, fit = Lit(ADAMW, LINEAR), trainer(max_epochs=epochs, callbacks=[Unfreezing()])
        fit.fit(module, loader(STEPS), ckpt_path=checkpoint)
        return module, fit

    uninterrupted_run, _ = run_epochs(4)
    _, first = run_epochs(2)
    first.save_checkpoint(tmp_path / "first.ckpt")
    with log_lines() as lines:
        resumed, fit = run_epochs(4, tmp_path / "first.ckpt")
    assert lines == [
        "optimizer: net.0.weight, net.0.bias were trained in the checkpoint and are now frozen."
        " They are not trained until they are unfrozen"
    ]
    assert len(fit.optimizers[0].param_groups) == 4
    assert are_equal(resumed, uninterrupted_run)


class CountingOptimizer(torch.optim.Optimizer):
    """Keeps its step count and a running sum in its groups, as some optimizers do."""

    def __init__(self, params: Any, lr: float, factor: float = 1.0, opened: bool | None = None):
        super().__init__(params, {"lr": lr, "factor": factor, "opened": opened, "count": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            group["count"] += 1
            group["opened"] = group["opened"] or group["count"] == 1
            group["sum"] = group.get("sum", 0.0) + group["factor"] / group["count"]
            for parameter in group["params"]:
                if group["opened"] and parameter.grad is not None:
                    parameter.sub_(parameter.grad * group["lr"] / group["sum"])
        return loss


COUNTING = {"_target_": f"{__name__}.CountingOptimizer", "lr": 1e-2}


@pytest.mark.parametrize("resume", ["checkpoint", "config"])
def test_counters_kept_in_groups_continue(resume: str, tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, COUNTING, LINEAR)
    uninterrupted_run, uninterrupted_fit = run_training(COUNTING, LINEAR, epochs=2)
    with each_row() as row:
        for regrouping in ({}, {"weight_decay_on": "all"}):
            with row(regrouping):
                config = {**COUNTING, **regrouping, "resume": resume}
                with log_lines() as lines:
                    resumed, fit = run_training(config, LINEAR, 2, checkpoint)
                assert are_equal(resumed, uninterrupted_run)
                assert lines == []
                counters = ("count", "sum", "opened")
                expected = settings(uninterrupted_fit, *counters)["decay"]
                assert settings(fit, *counters)["decay"] == expected


def test_counters_continue_beside_the_settings_of_the_config(tmp_path: Path) -> None:
    schedule = {"_target_": f"{SCHEDULES}.OneCycleLR", "max_lr": 1e-2, "total_steps": 20}
    one_cycle = {**schedule, "cycle_momentum": False, "interval": "step"}
    checkpoint = saved(tmp_path, COUNTING, one_cycle)
    config = {**COUNTING, **CONFIG, "factor": 2.0}
    with log_lines() as lines:
        _, fit = run_training(config, {**one_cycle, "max_lr": 1e-1}, 2, checkpoint)
    group = fit.optimizers[0].param_groups[0]
    assert (group["factor"], group["max_lr"], group["count"]) == (2.0, 1e-1, 2 * STEPS)
    assert lines[0] == "factor=2.0 replaces the checkpoint's 1.0"
    assert not any("count" in line or "sum" in line for line in lines)


class WithoutMixin(L.LightningModule):
    """Builds the optimizer without the mixin."""

    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        super().__init__()
        self.configs = optimizer, scheduler
        self.net = network()

    def configure_optimizers(self) -> Any:
        return build_adam(self, *self.configs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)


class OwnHooks(Lit):
    """Overrides hooks without `super()`."""

    def setup(self, stage: str) -> None:
        pass

    def on_fit_start(self) -> None:
        pass

    def on_train_start(self) -> None:
        pass

    def on_train_epoch_start(self) -> None:
        pass

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["own"] = 1

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["own"] == 1

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:  # type: ignore[override]
        optimizer.step(closure=closure)


class ManualWithoutMixin(Manual):
    """Manual optimization without the mixin's `configure_optimizers`."""

    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        super().__init__()
        self.configs = optimizer, scheduler

    def configure_optimizers(self) -> Any:
        return build_adam(self, *self.configs, trainer=self.trainer)


class TwoOptimizers(Manual):
    """Has one optimizer for part of the matrices, and one for all other parameters."""

    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        super().__init__()
        self.configs = optimizer, scheduler

    def configure_optimizers(self) -> Any:
        parts = (self.net[:2], self.net[2:])
        return [build_adam(part, *self.configs, trainer=self.trainer) for part in parts]

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        schedulers: Any = self.lr_schedulers()
        for each in optimizers:
            each.zero_grad()
        self.manual_backward(loss_of(self.net, batch))
        for each in (*optimizers, *schedulers):
            each.step()


ROUTES = (Lit, OwnHooks, Manual, WithoutMixin, ManualWithoutMixin, TwoOptimizers)


def test_changed_settings_apply_in_every_way_to_build_and_step_the_optimizer(
    tmp_path: Path,
) -> None:
    changed = {"lr": 3e-3, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.3}
    net = network()
    optimizer = adamw(net, lr=1e-2, weight_decay=0.1)
    by_hand(optimizer, net, [[1e-2 * (1 - step / 20)] * 2 for step in range(STEPS)])
    for group in optimizer.param_groups:
        group.update(betas=(0.8, 0.9), eps=1e-6, weight_decay=group["weight_decay"] * 3)
    later = range(STEPS, 2 * STEPS)
    by_hand(optimizer, net, [[3e-3 * (1 - step / 20)] * 2 for step in later])
    with each_row() as row:
        for kind in ROUTES:
            with row(kind.__name__):
                first, again = trainer(max_epochs=1), trainer(max_epochs=2)
                first.fit(kind(ADAMW, LINEAR), loader(STEPS))
                first.save_checkpoint(tmp_path / "first.ckpt")
                resumed = kind({**ADAMW, **changed}, LINEAR)
                with log_lines() as lines:
                    again.fit(resumed, loader(STEPS), ckpt_path=tmp_path / "first.ckpt")
                for each, expected in zip(parameters(resumed), parameters(net), strict=True):
                    torch.testing.assert_close(each, expected, rtol=0, atol=1e-7)
                assert len(set(lines)) == 4
                assert "lr=0.003 replaces the checkpoint's 0.01" in lines


def stepped(name: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"{SCHEDULES}.{name}", "interval": "step", **arguments}


CHILDREN = [
    {"_target_": f"{SCHEDULES}.LinearLR", "_partial_": True, "total_iters": 3},
    {"_target_": f"{SCHEDULES}.ExponentialLR", "_partial_": True, "gamma": 0.9},
]
STEPPED: dict[str, Any] = {
    "linear": LINEAR,
    "cosine": {"name": "cosine", "total_steps": 20, "warmup_steps": 5},
    "ExponentialLR": EXPONENTIAL,
    "MultiStepLR": stepped("MultiStepLR", milestones=[2, 5, 6]),
    "restarts": stepped("CosineAnnealingWarmRestarts", T_0=3),
    "SequentialLR": stepped("SequentialLR", milestones=[3], schedulers=CHILDREN),
}
ONE_CYCLE = stepped("OneCycleLR", max_lr=1e-2, total_steps=20, cycle_momentum=False)
"""Has a peak that is not the optimizer's lr."""


class HandLoop:
    """A training loop without a Trainer."""

    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        self.net = network()
        built = build_adam(self.net, optimizer, scheduler, 20)
        self.optimizer = built["optimizer"]
        self.scheduler = built["lr_scheduler"]["scheduler"] if scheduler else None
        self.rates = list[float]()

    def train(self, first: int, last: int) -> None:
        for batch in (list(loader(STEPS)) * 4)[first:last]:
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            self.optimizer.zero_grad()
            torch.autograd.backward(loss_of(self.net, (batch[0], batch[1])))
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()

    def load(self, other: "HandLoop", order: str) -> None:
        self.net.load_state_dict(other.net.state_dict())
        for each in order:
            if each == "o":
                self.optimizer.load_state_dict(deepcopy(other.optimizer.state_dict()))
            elif self.scheduler is not None and other.scheduler is not None:
                self.scheduler.load_state_dict(deepcopy(other.scheduler.state_dict()))


ORDERS = {"os": "optimizer, schedule", "so": "schedule, optimizer", "o": "optimizer alone"}


def test_parameters_that_were_never_trained_are_not_logged_as_frozen() -> None:
    first, again = HandLoop(ADAMW, None), HandLoop(ADAMW, None)
    for loop in (first, again):
        # Frozen after the optimizer was built, so its groups contain them.
        loop.net[0].requires_grad_(False)
    first.train(0, 2)
    with log_lines() as lines:
        again.load(first, "o")
    assert lines == []


def test_manual_loop_resumes_bit_identically_in_any_order_of_loading() -> None:
    every = {**STEPPED, "OneCycleLR": ONE_CYCLE}
    with each_row() as row:
        for (name, schedule), order in itertools.product(every.items(), ORDERS):
            with row((name, ORDERS[order])):
                uninterrupted, first, again = (HandLoop(ADAMW, schedule) for _ in range(3))
                uninterrupted.train(0, 8)
                first.train(0, 4)
                again.load(first, order)
                again.train(4, 8)
                assert again.rates == uninterrupted.rates[4:]
                assert_same_parameters(again.net, uninterrupted.net)


def test_manual_loop_applies_a_changed_config_in_any_order_of_loading() -> None:
    with each_row() as row:
        earlier = [(name, STEPPED[name]) for name in ("linear", "SequentialLR")]
        pairs = itertools.product(earlier, STEPPED.items())
        for ((before, old), (after, new)), order in itertools.product(pairs, ORDERS):
            with row((before, after, ORDERS[order])):
                expected = HandLoop({**ADAMW, "lr": 4e-3}, new)
                expected.train(0, 8)
                first, again = HandLoop(ADAMW, old), HandLoop({**ADAMW, "lr": 4e-3}, new)
                first.train(0, 4)
                again.load(first, order)
                again.train(4, 8)
                assert again.rates == pytest.approx(expected.rates[4:])


def test_found_peak_is_kept_by_one_cycle() -> None:
    """The scheduler's `max_lr` is the peak, unless the config changes it."""
    longer, higher = {**ONE_CYCLE, "total_steps": 30}, {**ONE_CYCLE, "max_lr": 5e-3}
    cycle = stepped("CyclicLR", base_lr=1e-3, max_lr=1e-2, step_size_up=3, cycle_momentum=False)
    table = [
        ("the same", ONE_CYCLE, ONE_CYCLE, {"max_lr": 4e-3}),
        ("another length", ONE_CYCLE, longer, {"max_lr": 4e-3}),
        ("another peak", ONE_CYCLE, higher, {}),
        ("a cycle", cycle, cycle, {"max_lr": 4e-3, "base_lr": 4e-4}),
    ]
    with each_row() as row:
        for (name, old, new, found), order in itertools.product(table, ("os", "so")):
            with row((name, ORDERS[order])):
                expected = HandLoop(ADAMW, {**new, **found})
                expected.train(0, 8)
                first, again = HandLoop(ADAMW, old), HandLoop(ADAMW, new)
                set_peak(first.optimizer, first.scheduler, 4e-3)
                first.train(0, 4)
                again.load(first, order)
                again.train(4, 8)
                assert again.rates == pytest.approx(expected.rates[4:])


def test_found_lr_is_kept_by_every_schedule() -> None:
    """With the schedule of the checkpoint, another schedule, or none."""
    every: dict[str, Any] = {"none": None, **STEPPED}
    earlier = [(name, every[name]) for name in ("none", "cosine", "ExponentialLR")]
    pairs = itertools.product(earlier, every.items())
    with each_row() as row:
        for ((before, old), (after, new)), order in itertools.product(pairs, ORDERS):
            with row((before, after, ORDERS[order])):
                expected = HandLoop({**ADAMW, "lr": 4e-3}, new)
                expected.train(0, 8)
                first, again = HandLoop(ADAMW, old), HandLoop(ADAMW, new)
                set_peak(first.optimizer, first.scheduler, 4e-3)
                first.train(0, 4)
                again.load(first, order)
                again.train(4, 8)
                assert again.rates == pytest.approx(expected.rates[4:])


def all_checkpointed(net: Any) -> Any:
    apply_activation_checkpointing(net, check_fn=lambda each: isinstance(each, nn.Linear))
    return net


def with_first(wrap: Any) -> Any:
    def wrapped(net: Any) -> Any:
        net[0] = wrap(net[0])
        return net

    return wrapped


def compiled(module: Any) -> Any:
    return torch.compile(module, backend="eager")


def compiled_in_place(module: Any) -> Any:
    module.compile(backend="eager")
    return module


WRAPPERS: dict[str, Any] = {
    "none": lambda net: net,
    "activation checkpointing": with_first(checkpoint_wrapper),
    "activation checkpointing everywhere": all_checkpointed,
    "activation offloading": with_first(offload_wrapper),
    "compiled submodule": with_first(compiled),
    "compiled net": compiled,
    "compiled in place": compiled_in_place,
    "compiled, with activation checkpointing": lambda net: compiled(all_checkpointed(net)),
    "DataParallel": nn.DataParallel,
}


class Wrapped(Lit):
    def __init__(self, wrap: Any) -> None:
        super().__init__({**ADAMW, "groups": [{**HEAD[0], "match": "*net.3.*"}]}, LINEAR)
        self.net = wrap(self.net)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        # Wrappers also rename the weights. Loading them is up to the user.
        weights = dict(zip(self.state_dict(), state_dict.values(), strict=True))
        return super().load_state_dict(weights, *args, **kwargs)


def test_moments_are_kept_if_modules_are_wrapped_between_two_runs(tmp_path: Path) -> None:
    def fit(module: Any, epochs: int, checkpoint: Path | None = None) -> L.Trainer:
        run = trainer(max_epochs=epochs)
        run.fit(module, loader(STEPS), ckpt_path=checkpoint)
        return run

    uninterrupted_run = Wrapped(WRAPPERS["none"])
    fit(uninterrupted_run, 2)
    others = [name for name in WRAPPERS if name != "none"]
    pairs = [pair for name in others for pair in (("none", name), (name, "none"))]
    with each_row() as row:
        for before, after in [*pairs, ("compiled net", "activation checkpointing everywhere")]:
            with row((before, after)):
                first = fit(Wrapped(WRAPPERS[before]), 1)
                first.save_checkpoint(tmp_path / "first.ckpt")
                resumed = Wrapped(WRAPPERS[after])
                with log_lines() as lines:
                    fit(resumed, 2, tmp_path / "first.ckpt")
                assert lines == []
                assert_same_parameters(resumed, uninterrupted_run)
        with row("the whole module is compiled"):
            fit(Wrapped(WRAPPERS["none"]), 1).save_checkpoint(tmp_path / "first.ckpt")
            whole = WithoutLogging(WRAPPERS["none"])
            fit(compiled(whole), 2, tmp_path / "first.ckpt")
            assert_same_parameters(whole, uninterrupted_run)


class WithoutLogging(Wrapped):
    """Lightning's `log` cannot be compiled."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)


class Plain(Lit):
    """Uses an optimizer of plain torch, without names."""

    def __init__(self, make: Any, frozen: Sequence[int] = (), schedule: bool = False) -> None:
        super().__init__(ADAMW, T_MAX_20 if schedule else None)
        self.make = make
        self.schedule = schedule
        for index in frozen:
            self.net[index].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        if self.make is None:
            return super().configure_optimizers()
        optimizer = self.make(self)
        if not self.schedule:
            return optimizer
        annealing = {"scheduler": CosineAnnealingLR(optimizer, 20), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": annealing}


def of_all(module: Any) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1, fused=True)


def of_trained(module: Any) -> Any:
    trained = [each for each in module.parameters() if each.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1, fused=True)


def of_names(module: Any) -> Any:
    return torch.optim.AdamW(module.named_parameters(), lr=1e-2, weight_decay=0.1, fused=True)


def of_two_groups(module: Any) -> Any:
    return adamw(module.net, lr=1e-2, weight_decay=0.1)


def of_two_tuples(module: Any) -> Any:
    """Returns groups as in nanoGPT and the examples of transformers."""
    trained = [each for each in module.parameters() if each.requires_grad]
    decay = [each for each in trained if each.ndim >= 2]
    rest = [each for each in trained if each.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, fused=True)


PLAIN: list[tuple[Any, tuple[int, ...], bool]] = [
    (of_all, (), False),
    (of_all, (), True),
    (of_all, (0,), True),
    (of_all, (1, 3), False),
    (of_trained, (0,), True),
    (of_trained, (1,), False),
    (of_names, (0,), True),
    (of_two_groups, (), True),
    (of_two_tuples, (), False),
    (of_two_tuples, (0,), True),
]
"""A function that builds the optimizer, the frozen modules, and whether there is a schedule."""


def test_checkpoint_of_torchs_own_optimizer_is_resumed_bit_identically(tmp_path: Path) -> None:
    with each_row() as row:
        for make, frozen, schedule in PLAIN:
            with row((make.__name__, frozen, schedule)):
                first, whole, again = (trainer(max_epochs=epochs) for epochs in (1, 2, 2))
                first.fit(Plain(make, frozen, schedule), loader(STEPS))
                first.save_checkpoint(tmp_path / "first.ckpt")
                uninterrupted_run = Plain(make, frozen, schedule)
                whole.fit(uninterrupted_run, loader(STEPS))
                resumed = Plain(None, frozen, schedule)
                with log_lines() as lines:
                    again.fit(resumed, loader(STEPS), ckpt_path=tmp_path / "first.ckpt")
                assert_same_parameters(resumed, uninterrupted_run)
                decays_all = make not in (of_two_groups, of_two_tuples)
                setting = "weight_decay=0.0 (in no_decay)"
                kept = f"{setting} is not used: the checkpoint's 0.1 is kept. {USE_CONFIG}"
                assert lines == [kept] * decays_all
                steps = {float(each["step"]) for each in again.optimizers[0].state.values()}
                assert steps == {2.0 * STEPS}
