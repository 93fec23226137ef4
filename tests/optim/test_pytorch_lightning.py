"""AdamMixin with `pytorch_lightning` trains like with `lightning.pytorch`."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_adam import AdamMixin, ConfigError, build_adam
from tests.support.packages import PACKAGES, QUIET, mixin_module, plain_module, trainer
from tests.support.tables import each_row
from tests.support.training import ADAMW, loader, parameters

BATCHES, EPOCHS = 7, 3
LINEAR = {"name": "linear"}
FOREIGN = PACKAGES[1]


class TrainingResult(NamedTuple):
    """The result of a run, or the error that ended it."""

    steps: int
    rates: list[list[float]]
    parameters: list[Tensor]
    flags: list[Any]
    error: str


Call = Callable[[Any, Any], Any]


def train(
    fit: Any, module: Any, path: str | None = None, call: Call | None = None
) -> TrainingResult:
    error = ""
    try:
        if call is None:
            fit.fit(module, loader(BATCHES), loader(1), ckpt_path=path, weights_only=False)
        else:
            call(fit, module)
    except (ConfigError, RuntimeError, ValueError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    flags = [group.get("fused") for each in fit.optimizers for group in each.param_groups]
    rates = [] if module is None else module.rates
    return TrainingResult(fit.global_step, rates, parameters(module), flags, error)


def assert_same(found: TrainingResult, expected: TrainingResult) -> None:
    assert found.error == expected.error
    assert (found.steps, found.flags) == (expected.steps, expected.flags)
    assert found.rates == expected.rates
    assert all(map(torch.equal, found.parameters, expected.parameters))


def scaled(package: str) -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return import_module(f"{package}.plugins").MixedPrecision("16-mixed", "cpu", scaler)


def callback(name: str, *arguments: Any, **named: Any) -> Callable[[str], dict[str, Any]]:
    def flags(package: str) -> dict[str, Any]:
        kind = getattr(import_module(f"{package}.callbacks"), name)
        return {"callbacks": [kind(*arguments, **named)]}

    return flags


CLIPPED = {"gradient_clip_val": 0.1}
FLAGS: dict[str, Callable[[str], dict[str, Any]]] = {
    "epochs": lambda package: {},
    "accumulation": lambda package: {"accumulate_grad_batches": 2},
    "growing accumulation": callback("GradientAccumulationScheduler", {0: 1, 1: 2, 2: 4}),
    "bf16 clipped": lambda package: {"precision": "bf16-mixed", **CLIPPED},
    "loss scale": lambda package: {"plugins": [scaled(package)]},
    "loss scale, clipped": lambda package: {"plugins": [scaled(package)], **CLIPPED},
    "smoke test": lambda package: {"fast_dev_run": 2},
    "learning rate finder": callback("LearningRateFinder", num_training_steps=12),
    "averaged weights": callback("StochasticWeightAveraging", swa_lrs=0.01, swa_epoch_start=1),
    "unfrozen backbone": callback("BackboneFinetuning", 1, lambda epoch: 1.5, verbose=False),
}
"""The flags of a Trainer that trains for some epochs."""
LENGTHS = {"epochs": 21, "accumulation": 12, "growing accumulation": 13, "bf16 clipped": 21}
"""The optimizer steps of some of these."""


def run(
    package: str, flags: dict[str, Any], scheduler: Any = None, **settings: Any
) -> TrainingResult:
    kind: Any = mixin_module(package)

    class Found(kind):  # type: ignore[misc]
        lr = kind.optimizer_lr

    module = Found({**ADAMW, **settings}, scheduler)
    return train(trainer(package, max_epochs=EPOCHS, **flags), module)


def test_module_trains_as_with_lightning() -> None:
    with each_row() as row:
        for name, flags in FLAGS.items():
            with row(name):
                expected, found = (run(package, flags(package), LINEAR) for package in PACKAGES)
                assert_same(found, expected)
                assert found.error == ""
                assert found.steps == LENGTHS.get(name, found.steps)


@pytest.mark.parametrize("package", PACKAGES)
def test_schedule_ends_with_the_run(package: str) -> None:
    with each_row() as row:
        for name, steps in LENGTHS.items():
            module = mixin_module(package)(ADAMW, LINEAR)
            fit = trainer(package, max_epochs=EPOCHS, **FLAGS[name](package))
            with row(name):
                fit.fit(module, loader(BATCHES))
                assert fit.global_step == steps
                assert [group["lr"] for group in fit.optimizers[0].param_groups] == [0.0, 0.0]


@pytest.mark.parametrize("package", PACKAGES)
def test_wrong_order_of_bases_raises_when_the_class_is_defined(package: str) -> None:
    base: Any = import_module(package).LightningModule
    with pytest.raises(TypeError, match=r"class Wrong\(AdamMixin, LightningModule\)"):

        class Wrong(base, AdamMixin):  # type: ignore[misc]
            pass

    type("Right", (AdamMixin, base), {})


@pytest.mark.parametrize("package", PACKAGES)
def test_metric_that_validation_does_not_log_raises(package: str) -> None:
    fit = trainer(package, max_epochs=EPOCHS)
    found = train(fit, mixin_module(package)(ADAMW, {"name": "plateau", "monitor": "val/los"}))
    assert "monitor='val/los' is not logged" in found.error
    assert found.steps == 0


@pytest.mark.parametrize("lr", [0.01, 0.003])
def test_run_is_resumed_as_with_lightning(lr: float, tmp_path: Path) -> None:
    runs = {}
    for package in PACKAGES:
        path = str(tmp_path / f"{package}.ckpt")
        first = trainer(package, max_epochs=1)
        train(first, mixin_module(package)(ADAMW, LINEAR))
        first.save_checkpoint(path)
        module = mixin_module(package)({**ADAMW, "lr": lr}, LINEAR)
        runs[package] = train(trainer(package, max_epochs=2), module, path)
    assert_same(runs[FOREIGN], runs[PACKAGES[0]])
    assert (runs[FOREIGN].error, runs[FOREIGN].steps) == ("", 2 * BATCHES)


def test_checkpoint_of_one_package_is_resumed_with_the_other(tmp_path: Path) -> None:
    path, (one, other) = str(tmp_path / "last.ckpt"), PACKAGES
    first = trainer(one, max_epochs=1)
    train(first, mixin_module(one)(ADAMW, LINEAR))
    first.save_checkpoint(path)
    expected, found = (
        train(trainer(package, max_epochs=2), mixin_module(package)(ADAMW, LINEAR), path)
        for package in (one, other)
    )
    assert_same(found, expected)
    assert (found.error, found.steps) == ("", 2 * BATCHES)


@pytest.mark.parametrize("package", PACKAGES)
def test_learning_rate_finder_keeps_the_scales_of_groups(package: str) -> None:
    groups = [{"name": "head", "match": "head.*", "lr_scale": 10.0}]
    module = mixin_module(package)({**ADAMW, "groups": groups}, LINEAR)
    tuner = import_module(f"{package}.tuner.tuning").Tuner

    def find(fit: Any, searched: Any) -> None:
        tuner(fit).lr_find(searched, loader(12), num_training=12, attr_name="optimizer_lr")

    found = train(trainer(package), module, call=find)
    assert found.error == ""
    assert len(found.rates) >= 12
    assert len(found.rates[0]) == 4
    for rates in found.rates:
        assert max(rates) == pytest.approx(10 * min(rates), rel=1e-6)


@pytest.mark.parametrize("package", PACKAGES)
def test_lightning_cli_names_its_options_in_errors(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--model.optimizer.lr=-0.5"])
    cli = import_module(f"{package}.cli")
    with pytest.raises(ConfigError, match=r"^--model\.optimizer\.lr=-0\.5 must be above 0\."):
        cli.LightningCLI(
            mixin_module(package), run=False, save_config_callback=None, trainer_defaults=QUIET
        )


def test_build_adam_clips_and_schedules_as_with_lightning() -> None:
    with each_row() as row:
        for name in ("growing accumulation", "bf16 clipped", "loss scale, clipped"):
            trained = []
            for package in PACKAGES:
                module = plain_module(package)
                type(module).configure_optimizers = lambda self: build_adam(
                    self, ADAMW, LINEAR, trainer=self.trainer
                )
                module.rates = []
                fit = trainer(package, max_epochs=EPOCHS, **FLAGS[name](package))
                trained.append(train(fit, module))
            with row(name):
                assert_same(trained[1], trained[0])
                assert trained[1].error == ""
