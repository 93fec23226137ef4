"""Resuming: whose settings and schedule go on, and which state belongs to which parameter."""

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
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from lightning_adam import ConfigError
from tests.support.training import ADAMW, Lit, loader, loss_of, network, parameters, trainer

LINEAR = {"name": "linear", "total_steps": 20}
HEAD = [{"name": "head", "match": "net.3.*", "lr_scale": 10}]
STEPS = 5
CONFIG = {"resume": "config"}


def trained(
    optimizer: Any,
    scheduler: Any = None,
    epochs: int = 1,
    checkpoint: Path | None = None,
    **flags: Any,
) -> tuple[Lit, L.Trainer]:
    """A training of so many epochs, from a checkpoint if there is one."""
    module, fit = Lit(optimizer, scheduler), trainer(max_epochs=epochs, **flags)
    fit.fit(module, loader(STEPS), ckpt_path=checkpoint)
    return module, fit


def saved(folder: Path, *arguments: Any, **flags: Any) -> Path:
    """The checkpoint of a training of one epoch."""
    _, fit = trained(*arguments, **flags)
    fit.save_checkpoint(folder / "first.ckpt")
    return folder / "first.ckpt"


def are_equal(one: L.LightningModule, other: L.LightningModule) -> bool:
    pairs = zip(parameters(one), parameters(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@contextmanager
def said() -> Iterator[list[str]]:
    """What is said of the resumption."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if message.startswith("resuming: "):
                lines.append(message.removeprefix("resuming: "))

    logger, handler = logging.getLogger("lightning.pytorch.utilities.rank_zero"), Keep()
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
    """Steps with the learning rates of each group as given, over the batches as Lit takes them."""
    for rates, batch in zip(schedule, list(loader(STEPS)) * 2, strict=False):
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(net, (batch[0], batch[1])))
        optimizer.step()


def adamw(net: nn.Sequential, **settings: Any) -> torch.optim.AdamW:
    """The groups of Lit's AdamW, by hand."""
    decay = [net[0].weight, net[3].weight]
    spared = [net[0].bias, *net[1].parameters(), net[3].bias]
    groups = [{"params": decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, fused=True, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"lr": 3e-3}, "lr=0.003: the checkpoint's 0.01"),
        ({"betas": [0.8, 0.9]}, "betas=[0.8,0.9]: the checkpoint's [0.9,0.999]"),
        ({"eps": 1e-6}, "eps=1e-06: the checkpoint's 1e-08"),
        ({"weight_decay": 0.3}, "weight_decay=0.3 (in decay): the checkpoint's 0.1"),
        ({"amsgrad": True}, "amsgrad=true: the checkpoint's false"),
        ({"maximize": True}, "maximize=true: the checkpoint's false"),
        (
            {"decoupled_weight_decay": False},
            "decoupled_weight_decay=false: the checkpoint's true",
        ),
    ],
    ids=str,
)
def test_the_checkpoint_wins_and_the_difference_is_said_once_with_what_to_type(
    changed: dict[str, Any], line: str, tmp_path: Path
) -> None:
    (name, value), checkpoint = *changed.items(), saved(tmp_path, ADAMW, LINEAR)
    whole, _ = trained(ADAMW, LINEAR, epochs=2)
    with said() as lines:
        resumed, _ = trained({**ADAMW, **changed}, LINEAR, epochs=2, checkpoint=checkpoint)
    assert are_equal(resumed, whole)
    (only,) = lines
    assert only.startswith(f"optimizer.{line} is kept; type optimizer.resume=config to train on")
    with said() as lines:
        other, fit = trained({**ADAMW, **changed, **CONFIG}, LINEAR, 2, checkpoint)
    (only,) = lines
    assert only.startswith(f"optimizer.{line.split(':')[0]}: from here on")
    expected = tuple(value) if isinstance(value, list) else value
    assert settings(fit, "initial_lr" if name == "lr" else name)["decay"] == [expected]
    assert not are_equal(other, whole)


def test_nothing_is_said_where_nothing_differs(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, ADAMW, LINEAR)
    with said() as lines:
        trained(ADAMW, LINEAR, epochs=2, checkpoint=checkpoint)
    assert lines == []


def test_the_configs_settings_and_schedule_go_on_from_the_checkpoints_step(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, ADAMW, LINEAR)
    other = {"lr": 3e-3, "weight_decay": 0.1, "decoupled_weight_decay": True, **CONFIG}
    schedule = {"name": "polynomial", "power": 2.0, "total_steps": 10}
    module, _ = trained({**other, "betas": [0.8, 0.9]}, schedule, 2, checkpoint)
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


@pytest.mark.parametrize("resume", ["checkpoint", "config"])
@pytest.mark.parametrize("after", IMPLEMENTATIONS)
@pytest.mark.parametrize("before", IMPLEMENTATIONS)
def test_any_implementation_goes_on_from_any_other(
    before: str, after: str, resume: str, tmp_path: Path
) -> None:
    checkpoint = saved(tmp_path, {**ADAMW, **IMPLEMENTATIONS[before]})
    whole, _ = trained({**ADAMW, **IMPLEMENTATIONS[before]}, epochs=2)
    config = {**ADAMW, **IMPLEMENTATIONS[after], "resume": resume}
    with said() as lines:
        resumed, fit = trained(config, None, 2, checkpoint)
    expected = IMPLEMENTATIONS[after if resume == "config" else before]
    (name, value), *_ = expected.items()
    assert settings(fit, name)["decay"] == [value]
    assert (lines == []) == (before == after or resume == "config")
    if resume == "checkpoint":
        assert are_equal(resumed, whole)
    else:
        for a, b in zip(parameters(resumed), parameters(whole), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("resume", ["checkpoint", "config"])
@pytest.mark.parametrize("fused", [(False, True), (True, False)], ids=str)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_fused_and_not_go_on_from_each_other_under_a_grad_scaler(
    fused: tuple[bool, bool], resume: str, clip: float | None, tmp_path: Path
) -> None:
    """With Lightning alone the first of these ends in an AssertionError."""

    def flags() -> dict[str, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        return {
            "plugins": [MixedPrecision("16-mixed", "cpu", scaler)],
            "gradient_clip_val": clip,
        }

    before, after = ({**ADAMW, "fused": each} for each in fused)
    checkpoint = saved(tmp_path, before, **flags())
    resumed, fit = trained({**after, "resume": resume}, None, 2, checkpoint, **flags())
    assert settings(fit, "fused")["decay"] == [fused[resume == "config"]]
    whole, _ = trained(before, epochs=2, **flags())
    for a, b in zip(parameters(resumed), parameters(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("turned_on", [True, False])
def test_amsgrads_maximum_starts_from_the_second_moment_and_is_left_out_without_it(
    turned_on: bool, tmp_path: Path
) -> None:
    checkpoint = saved(tmp_path, {**ADAMW, "amsgrad": not turned_on})
    moments = [each["exp_avg_sq"] for each in state_of(checkpoint).values()]
    _, fit = trained({**ADAMW, "amsgrad": turned_on, **CONFIG}, None, 2, checkpoint)
    states = list(fit.optimizers[0].state.values())
    assert all(("max_exp_avg_sq" in state) == turned_on for state in states)
    if turned_on:
        for state, moment in zip(states, moments, strict=True):
            assert (state["max_exp_avg_sq"] >= moment).all()


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
@pytest.mark.parametrize("resume", ["checkpoint", "config"])
def test_each_parameter_finds_its_own_state_whatever_the_groups(
    before: list[Any], after: list[Any], resume: str, tmp_path: Path
) -> None:
    """Without decay and with one learning rate groups change nothing."""

    def config(groups: list[Any]) -> dict[str, Any]:
        return {"lr": 1e-2, "groups": [{**group, "lr_scale": 1.0} for group in groups]}

    checkpoint = saved(tmp_path, config(before), LINEAR)
    whole, _ = trained(config(before), LINEAR, epochs=2)
    resumed, _ = trained({**config(after), "resume": resume}, LINEAR, 2, checkpoint)
    assert are_equal(resumed, whole)


def test_groups_that_were_trained_alike_keep_the_checkpoints_settings(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, ADAMW, LINEAR)
    with said() as lines:
        _, fit = trained({**ADAMW, "groups": HEAD}, LINEAR, 2, checkpoint)
    assert settings(fit, "initial_lr")["head"] == [1e-2]
    (only,) = lines
    assert only.startswith("optimizer.lr=0.1 (in head, head_no_decay): the checkpoint's 0.01")


def test_groups_that_were_trained_with_several_settings_take_the_configs(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {**ADAMW, "groups": HEAD}, LINEAR)
    with said() as lines:
        _, fit = trained({**ADAMW, "lr": 2e-3}, LINEAR, 2, checkpoint)
    assert settings(fit, "initial_lr", "lr") == {
        "decay": [2e-3, pytest.approx(2e-3 * 0.5)],
        "no_decay": [2e-3, pytest.approx(2e-3 * 0.5)],
    }
    assert [line.partition(" with several")[0] for line in lines] == [
        f"optimizer: the checkpoint trained what is in the group {name}"
        for name in ("decay", "no_decay")
    ]


class PartlyFrozen(Lit):
    def __init__(self, frozen: bool) -> None:
        super().__init__(ADAMW)
        self.net[0].requires_grad_(not frozen)


@pytest.mark.parametrize("frozen", [True, False], ids=["at first", "later"])
def test_parameters_frozen_at_first_or_later_are_named(frozen: bool, tmp_path: Path) -> None:
    first, again = trainer(max_epochs=1), trainer(max_epochs=2)
    first.fit(PartlyFrozen(frozen), loader(STEPS))
    first.save_checkpoint(tmp_path / "first.ckpt")
    with said() as lines:
        again.fit(PartlyFrozen(not frozen), loader(STEPS), ckpt_path=tmp_path / "first.ckpt")
    (only,) = lines
    assert "net.0.weight, net.0.bias" in only
    assert ("moments start at 0" if frozen else "is not trained") in only
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


def test_a_checkpoint_without_names_is_taken_by_position(tmp_path: Path) -> None:
    first = trainer(max_epochs=1)
    first.fit(Unnamed(), loader(STEPS))
    first.save_checkpoint(tmp_path / "first.ckpt")
    resumed, _ = trained(ADAMW, None, 2, tmp_path / "first.ckpt")
    whole, _ = trained(ADAMW, epochs=2)
    assert are_equal(resumed, whole)


def test_a_checkpoint_without_names_and_of_other_groups_is_refused(tmp_path: Path) -> None:
    first = trainer(max_epochs=1)
    first.fit(Unnamed(groups=1), loader(STEPS))
    first.save_checkpoint(tmp_path / "first.ckpt")
    with pytest.raises(
        ConfigError, match=r"expected the groups of the checkpoint.*\[6\].*\[2, 4\]"
    ):
        trained(ADAMW, None, 2, tmp_path / "first.ckpt")


@pytest.mark.parametrize("nadam_first", [True, False])
def test_another_optimizers_state_is_refused(nadam_first: bool, tmp_path: Path) -> None:
    configs: list[dict[str, Any]] = [ADAMW, {"_target_": "torch.optim.NAdam", "lr": 1e-2}]
    before, after = reversed(configs) if nadam_first else configs
    checkpoint = saved(tmp_path, before)
    with pytest.raises(ConfigError, match=r"expected a checkpoint of .*Adam, but it is of"):
        trained({**after, **CONFIG}, None, 2, checkpoint)


def test_another_optimizers_state_is_refused_by_what_it_holds(tmp_path: Path) -> None:
    class Plain(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    first = trainer(max_epochs=1)
    first.fit(Plain(), loader(STEPS))
    first.save_checkpoint(tmp_path / "first.ckpt")
    config = {**ADAMW, "weight_decay_on": "all"}
    with pytest.raises(ConfigError, match=r"of Adam, but .* is momentum_buffer"):
        trained(config, None, 2, tmp_path / "first.ckpt")


def test_a_custom_optimizer_is_resumed_with_its_own_or_the_configs_settings(tmp_path: Path) -> None:
    config = {"_target_": "torch.optim.NAdam", "lr": 1e-2, "momentum_decay": 1e-3}
    checkpoint = saved(tmp_path, config)
    with said() as lines:
        _, fit = trained({**config, "momentum_decay": 1e-2}, None, 2, checkpoint)
    assert settings(fit, "momentum_decay")["decay"] == [1e-3]
    assert len(lines) == 1
    _, fit = trained({**config, "momentum_decay": 1e-2, **CONFIG}, None, 2, checkpoint)
    assert settings(fit, "momentum_decay")["decay"] == [1e-2]


def test_an_eps_that_is_0_in_the_new_dtype_is_refused(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, ADAMW)
    with pytest.raises(ConfigError, match=r"optimizer\.eps=1e-08: .*not 0 in float16"):
        trained({**ADAMW, "eps": 1e-4}, None, 2, checkpoint, precision="16-true")


SCHEDULES = "torch.optim.lr_scheduler"
ANNEALING = {"_target_": f"{SCHEDULES}.CosineAnnealingLR", "interval": "step"}


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        (LINEAR, {**LINEAR, "min_lr_ratio": 0.5}, "min_lr_ratio=0.5: the checkpoint's 0.0"),
        (LINEAR, {**LINEAR, "name": "cosine"}, "name=cosine: the checkpoint's linear"),
        (LINEAR, {**LINEAR, "total_steps": 40}, "total_steps=40: the checkpoint's 20"),
        ({**ANNEALING, "T_max": 20}, {**ANNEALING, "T_max": 10}, "T_max=10: the checkpoint's 20"),
    ],
    ids=str,
)
def test_the_checkpoints_schedule_goes_on(
    before: Any, after: Any, line: str, tmp_path: Path
) -> None:
    checkpoint = saved(tmp_path, ADAMW, before)
    whole, _ = trained(ADAMW, before, epochs=2)
    with said() as lines:
        resumed, _ = trained(ADAMW, after, 2, checkpoint)
    assert are_equal(resumed, whole)
    assert lines[0].startswith(f"scheduler.{line} is kept; type optimizer.resume=config")


@pytest.mark.parametrize(
    ("before", "after"),
    [(LINEAR, None), (None, LINEAR), (LINEAR, {**ANNEALING, "T_max": 20})],
    ids=str,
)
def test_a_schedule_of_another_kind_is_refused_unless_the_config_wins(
    before: Any, after: Any, tmp_path: Path
) -> None:
    checkpoint = saved(tmp_path, ADAMW, before)
    with pytest.raises(ConfigError, match=r"expected the schedule.*type optimizer\.resume=config"):
        trained(ADAMW, after, 2, checkpoint)
    _, fit = trained({**ADAMW, **CONFIG}, after, 2, checkpoint)
    lr = fit.optimizers[0].param_groups[0]["lr"]
    assert lr == pytest.approx(1e-2 if after is None else 1e-2 / 2), "half of the way of 20 steps"


def test_the_configs_custom_schedule_stands_where_a_fresh_one_would(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, ADAMW, {**ANNEALING, "T_max": 40})
    config = {**ADAMW, "lr": 3e-3, **CONFIG}
    _, fit = trained(config, {**ANNEALING, "T_max": 15}, 2, checkpoint)
    fresh = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=3e-3)
    annealing = CosineAnnealingLR(fresh, T_max=15)
    for _ in range(2 * STEPS):
        fresh.step()
        annealing.step()
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(fresh.param_groups[0]["lr"])


class Stalled(Lit):
    """Validation says that nothing gets better."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", 1.0)


@pytest.mark.parametrize("resume", ["checkpoint", "config"])
def test_a_plateau_goes_on_with_what_it_has_seen(resume: str, tmp_path: Path) -> None:
    plateau = {"name": "plateau", "factor": 0.5, "patience": 1}

    def fitted(config: Any, epochs: int, checkpoint: Path | None = None) -> L.Trainer:
        fit = trainer(max_epochs=epochs)
        fit.fit(Stalled(config, plateau), loader(2), loader(1), ckpt_path=checkpoint)
        return fit

    fitted(ADAMW, 4).save_checkpoint(tmp_path / "first.ckpt")
    fit = fitted({**ADAMW, "lr": 1e-3, "resume": resume}, 6, tmp_path / "first.ckpt")
    peak = 1e-3 if resume == "config" else 1e-2
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(peak * 0.25)
    built = fit.lr_scheduler_configs[0].scheduler
    assert isinstance(built, ReduceLROnPlateau)
    assert built.last_epoch == 6


class Unfreezing(BaseFinetuning):
    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        self.freeze(pl_module.net[0])  # type: ignore[index]

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch > 1:
            # A resumed training begins with `freeze_before_training` too.
            self.make_trainable(pl_module.net[0])
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


def test_a_training_whose_groups_have_grown_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def fitted(epochs: int, checkpoint: Path | None = None) -> tuple[Lit, L.Trainer]:
        module, fit = Lit(ADAMW, LINEAR), trainer(max_epochs=epochs, callbacks=[Unfreezing()])
        fit.fit(module, loader(STEPS), ckpt_path=checkpoint)
        return module, fit

    whole, _ = fitted(4)
    _, first = fitted(2)
    first.save_checkpoint(tmp_path / "first.ckpt")
    with said() as lines:
        resumed, fit = fitted(4, tmp_path / "first.ckpt")
    assert lines == [
        "optimizer: the checkpoint trained net.0.weight, net.0.bias, which are frozen now; they are"
        " not trained until something unfreezes them"
    ]
    assert len(fit.optimizers[0].param_groups) == 4
    assert are_equal(resumed, whole)


class CountsInItsGroups(torch.optim.Optimizer):
    """Steps by the share of its first step that the group's count says, as far as it was opened."""

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


COUNTING = {"_target_": f"{__name__}.CountsInItsGroups", "lr": 1e-2}


@pytest.mark.parametrize("regrouped", [False, True])
@pytest.mark.parametrize("resume", ["checkpoint", "config"])
def test_what_is_counted_in_the_groups_goes_on(
    resume: str, regrouped: bool, tmp_path: Path
) -> None:
    checkpoint = saved(tmp_path, COUNTING, LINEAR)
    whole, uninterrupted = trained(COUNTING, LINEAR, epochs=2)
    on_all = {"weight_decay_on": "all"} if regrouped else {}
    with said() as lines:
        again = {**COUNTING, **on_all, "resume": resume}
        resumed, fit = trained(again, LINEAR, 2, checkpoint)
    assert are_equal(resumed, whole)
    assert lines == []
    counted = settings(fit, "count", "sum", "opened")
    assert counted["decay"] == settings(uninterrupted, "count", "sum", "opened")["decay"]


def test_beside_what_is_counted_the_configs_settings_are_taken(tmp_path: Path) -> None:
    schedule = {"_target_": f"{SCHEDULES}.OneCycleLR", "max_lr": 1e-2, "total_steps": 20}
    one_cycle = {**schedule, "cycle_momentum": False, "interval": "step"}
    checkpoint = saved(tmp_path, COUNTING, one_cycle)
    config = {**COUNTING, **CONFIG, "factor": 2.0}
    with said() as lines:
        _, fit = trained(config, {**one_cycle, "max_lr": 1e-1}, 2, checkpoint)
    group = fit.optimizers[0].param_groups[0]
    assert (group["factor"], group["max_lr"], group["count"]) == (2.0, 1e-1, 2 * STEPS)
    assert lines[0] == "optimizer.factor=2.0: from here on, after the checkpoint's 1.0"
    assert not any("count" in line or "sum" in line for line in lines)
