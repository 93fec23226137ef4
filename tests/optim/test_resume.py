"""Resume: which settings and schedule apply, and which state belongs to which parameter."""

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.plugins import MixedPrecision
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from lightning_adam import ConfigError
from tests.support.tables import each_row
from tests.support.training import ADAMW, Lit, loader, loss_of, network, parameters, trainer

LINEAR = {"name": "linear", "total_steps": 20}
SCHEDULES = "torch.optim.lr_scheduler"
HEAD = [{"name": "head", "match": "net.3.*", "lr_scale": 10}]
STEPS = 5
CONFIG = {"resume": "config"}


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
    """The checkpoint of a run of one epoch."""
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
    """Steps over the batches of Lit with the given learning rates of each group."""
    for rates, batch in zip(schedule, list(loader(STEPS)) * 2, strict=False):
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(net, (batch[0], batch[1])))
        optimizer.step()


def adamw(net: nn.Sequential, **settings: Any) -> torch.optim.AdamW:
    """The groups of Lit's AdamW, by hand."""
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


def test_checkpoint_applies_by_default_and_each_difference_is_logged_once(
    tmp_path: Path,
) -> None:
    checkpoint = saved(tmp_path, ADAMW, LINEAR)
    uninterrupted_run, _ = run_training(ADAMW, LINEAR, epochs=2)
    with each_row() as row:
        for changed, setting, kept in CHANGED:
            with row(changed):
                with log_lines() as lines:
                    resumed, _ = run_training({**ADAMW, **changed}, LINEAR, 2, checkpoint)
                assert are_equal(resumed, uninterrupted_run)
                line = f"{setting} is not used: the checkpoint's {kept} is kept. {USE_CONFIG}"
                assert lines == [line]


def test_config_applies_on_request_and_each_difference_is_logged_once(
    tmp_path: Path,
) -> None:
    checkpoint = saved(tmp_path, ADAMW, LINEAR)
    uninterrupted_run, _ = run_training(ADAMW, LINEAR, epochs=2)
    with each_row() as row:
        for changed, setting, kept in CHANGED:
            with row(changed):
                with log_lines() as lines:
                    resumed, fit = run_training(
                        {**ADAMW, **changed, **CONFIG}, LINEAR, 2, checkpoint
                    )
                assert lines == [f"{setting} replaces the checkpoint's {kept}"]
                ((name, value),) = changed.items()
                expected = tuple(value) if isinstance(value, list) else value
                kept_as = "initial_lr" if name == "lr" else name
                assert settings(fit, kept_as)["decay"] == [expected]
                assert not are_equal(resumed, uninterrupted_run)


def test_logged_difference_names_its_place_in_the_config(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, ADAMW, LINEAR)
    changed = {"optimizer": {**ADAMW, "amsgrad": True}, "scheduler": {**LINEAR, "name": "cosine"}}
    model = OmegaConf.create({"model": changed}).model
    with log_lines() as lines:
        run_training(model.optimizer, model.scheduler, 2, checkpoint)
    use_config = "To use the config's, set model.optimizer.resume=config"
    assert lines == [
        f"model.optimizer.amsgrad=true is not used: the checkpoint's false is kept. {use_config}",
        f"model.scheduler.name=cosine is not used: the checkpoint's linear is kept. {use_config}",
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
def test_any_implementation_is_resumed_by_any_other(before: str, tmp_path: Path) -> None:
    config = {**ADAMW, **IMPLEMENTATIONS[before]}
    checkpoint = saved(tmp_path, config)
    uninterrupted_run, _ = run_training(config, epochs=2)
    with each_row() as row:
        for after, resume in itertools.product(IMPLEMENTATIONS, ["checkpoint", "config"]):
            with row((after, resume)):
                changed = {**ADAMW, **IMPLEMENTATIONS[after], "resume": resume}
                with log_lines() as lines:
                    resumed, fit = run_training(changed, None, 2, checkpoint)
                expected = IMPLEMENTATIONS[after if resume == "config" else before]
                (name, value), *_ = expected.items()
                assert settings(fit, name)["decay"] == [value]
                assert (lines == []) == (before == after or resume == "config")
                if resume == "checkpoint":
                    assert are_equal(resumed, uninterrupted_run)
                else:
                    assert_close(resumed, uninterrupted_run, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_fused_and_not_fused_resume_each_other_under_a_grad_scaler(
    fused: bool, clip: float | None, tmp_path: Path
) -> None:
    """With Lightning alone a fused run that resumes another ends in an AssertionError."""

    def flags() -> dict[str, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        return {
            "plugins": [MixedPrecision("16-mixed", "cpu", scaler)],
            "gradient_clip_val": clip,
        }

    before, after = {**ADAMW, "fused": fused}, {**ADAMW, "fused": not fused}
    checkpoint = saved(tmp_path, before, **flags())
    uninterrupted_run, _ = run_training(before, epochs=2, **flags())
    with each_row() as row:
        for resume in ("checkpoint", "config"):
            with row(resume):
                changed = {**after, "resume": resume}
                resumed, fit = run_training(changed, None, 2, checkpoint, **flags())
                is_fused = fused if resume == "checkpoint" else not fused
                assert settings(fit, "fused")["decay"] == [is_fused]
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
    # The second moment forgets fast, so that it falls below its maximum.
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
    """Without decay and with one learning rate groups change nothing."""

    def config(groups: list[Any]) -> dict[str, Any]:
        return {"lr": 1e-2, "groups": [{**group, "lr_scale": 1.0} for group in groups]}

    checkpoint = saved(tmp_path, config(before), LINEAR)
    uninterrupted_run, _ = run_training(config(before), LINEAR, epochs=2)
    for resume in ("checkpoint", "config"):
        resumed, _ = run_training({**config(after), "resume": resume}, LINEAR, 2, checkpoint)
        assert are_equal(resumed, uninterrupted_run), resume


def test_new_groups_keep_the_settings_their_parameters_shared(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, ADAMW, LINEAR)
    with log_lines() as lines:
        _, fit = run_training({**ADAMW, "groups": HEAD}, LINEAR, 2, checkpoint)
    assert settings(fit, "initial_lr")["head"] == [1e-2]
    (only,) = lines
    setting = "lr=0.1 (in head, head_no_decay)"
    assert only == f"{setting} is not used: the checkpoint's 0.01 is kept. {USE_CONFIG}"


def test_groups_merged_from_different_settings_take_those_of_the_config(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {**ADAMW, "groups": HEAD}, LINEAR)
    with log_lines() as lines:
        _, fit = run_training({**ADAMW, "lr": 2e-3}, LINEAR, 2, checkpoint)
    assert settings(fit, "initial_lr", "lr") == {
        "decay": [2e-3, pytest.approx(2e-3 * 0.5)],
        "no_decay": [2e-3, pytest.approx(2e-3 * 0.5)],
    }
    assert lines == [
        "optimizer: the checkpoint has several settings for the parameters of the group"
        f" {name}, so the config's apply"
        for name in ("decay", "no_decay")
    ]


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
    """The groups of the mixin, built by hand: without names."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__(ADAMW)
        self.groups = groups

    def configure_optimizers(self) -> Any:
        if self.groups == 1:
            return torch.optim.AdamW(self.parameters(), weight_decay=0.1, lr=1e-2, fused=True)
        return adamw(self.net, lr=1e-2, weight_decay=0.1)


def test_checkpoint_without_names_is_matched_by_position(tmp_path: Path) -> None:
    first = trainer(max_epochs=1)
    first.fit(Unnamed(), loader(STEPS))
    first.save_checkpoint(tmp_path / "first.ckpt")
    resumed, _ = run_training(ADAMW, None, 2, tmp_path / "first.ckpt")
    uninterrupted_run, _ = run_training(ADAMW, epochs=2)
    assert are_equal(resumed, uninterrupted_run)


def test_checkpoint_without_names_and_of_other_groups_is_an_error(tmp_path: Path) -> None:
    first = trainer(max_epochs=1)
    first.fit(Unnamed(groups=1), loader(STEPS))
    first.save_checkpoint(tmp_path / "first.ckpt")
    with pytest.raises(
        ConfigError, match=r"^optimizer has groups of \[2, 4\] parameters, .* groups of \[6\]\."
    ):
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


def test_custom_optimizer_resumes_with_either_settings(tmp_path: Path) -> None:
    config = {"_target_": "torch.optim.NAdam", "lr": 1e-2, "momentum_decay": 1e-3}
    checkpoint = saved(tmp_path, config)
    with log_lines() as lines:
        _, fit = run_training({**config, "momentum_decay": 1e-2}, None, 2, checkpoint)
    assert settings(fit, "momentum_decay")["decay"] == [1e-3]
    assert len(lines) == 1
    _, fit = run_training({**config, "momentum_decay": 1e-2, **CONFIG}, None, 2, checkpoint)
    assert settings(fit, "momentum_decay")["decay"] == [1e-2]


def test_eps_that_rounds_to_0_in_the_new_dtype_is_an_error(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, ADAMW)
    with pytest.raises(ConfigError, match=r"^eps=1e-08 rounds to 0 in float16"):
        run_training({**ADAMW, "eps": 1e-4}, None, 2, checkpoint, precision="16-true")


ANNEALING = {"_target_": f"{SCHEDULES}.CosineAnnealingLR", "interval": "step"}


OTHER_SCHEDULES: list[tuple[Any, Any, str, str]] = [
    (LINEAR, {**LINEAR, "min_lr_ratio": 0.5}, "min_lr_ratio=0.5", "0.0"),
    (LINEAR, {**LINEAR, "name": "cosine"}, "name='cosine'", "'linear'"),
    (LINEAR, {**LINEAR, "total_steps": 40}, "total_steps=40", "20"),
    ({**ANNEALING, "T_max": 20}, {**ANNEALING, "T_max": 10}, "T_max=10", "20"),
]


def test_schedule_of_the_checkpoint_continues_by_default(tmp_path: Path) -> None:
    with each_row() as row:
        for before, after, setting, kept in OTHER_SCHEDULES:
            with row(after):
                checkpoint = saved(tmp_path, ADAMW, before)
                uninterrupted_run, _ = run_training(ADAMW, before, epochs=2)
                with log_lines() as lines:
                    resumed, _ = run_training(ADAMW, after, 2, checkpoint)
                assert are_equal(resumed, uninterrupted_run)
                line = f"{setting} is not used: the checkpoint's {kept} is kept. {USE_CONFIG}"
                assert lines[0] == line


@pytest.mark.parametrize(
    ("before", "after"),
    [(LINEAR, None), (None, LINEAR), (LINEAR, {**ANNEALING, "T_max": 20})],
    ids=str,
)
def test_schedule_of_another_kind_is_an_error_unless_the_config_applies(
    before: Any, after: Any, tmp_path: Path
) -> None:
    checkpoint = saved(tmp_path, ADAMW, before)
    with pytest.raises(ConfigError, match=rf"^scheduler.* the checkpoint.*{USE_CONFIG}$"):
        run_training(ADAMW, after, 2, checkpoint)
    _, fit = run_training({**ADAMW, **CONFIG}, after, 2, checkpoint)
    lr = fit.optimizers[0].param_groups[0]["lr"]
    assert lr == pytest.approx(1e-2 if after is None else 1e-2 / 2), "half of the way of 20 steps"


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


@pytest.mark.parametrize("resume", ["checkpoint", "config"])
def test_plateau_continues_with_its_history(resume: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "first.ckpt"
    fit_stalled(ADAMW, PLATEAU, 4).save_checkpoint(checkpoint)
    fit = fit_stalled({**ADAMW, "lr": 1e-3, "resume": resume}, PLATEAU, 6, checkpoint)
    peak = 1e-3 if resume == "config" else 1e-2
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(peak * 0.25)
    built = fit.lr_scheduler_configs[0].scheduler
    assert isinstance(built, ReduceLROnPlateau)
    assert built.last_epoch == 6


def test_plateau_of_another_mode_keeps_the_lr_but_not_the_history(tmp_path: Path) -> None:
    """The best value of the one mode is no best value of the other."""
    checkpoint = tmp_path / "first.ckpt"
    fit_stalled(ADAMW, PLATEAU, 4).save_checkpoint(checkpoint)
    fit = fit_stalled({**ADAMW, **CONFIG}, {**PLATEAU, "mode": "max"}, 6, checkpoint)
    halved_once = ADAMW["lr"] * 0.5
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(halved_once)


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
