"""LIGHTNING_ADAM_MONITOR in code that does not use the package; tests/e2e has whole scripts."""

import copy
import pickle
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor

from lightning_adam import AdamMonitor
from lightning_adam.callbacks import callbacks
from lightning_adam.config.variables import MONITOR_VARIABLE as VARIABLE
from lightning_adam.monitor.environment import settings
from tests.support.commands import run
from tests.support.memory_logger import MemoryLogger
from tests.support.monitored import KEY, TwoOptimizers, scoped
from tests.support.tables import each_row
from tests.support.training import (
    LR,
    TrainingRun,
    assert_same_parameters,
    loader,
    loss_of,
    network,
    run_training,
    trainer,
)


class Plain(L.LightningModule):
    """A module without the mixin and without named groups."""

    def __init__(self, own: Sequence[L.Callback] = ()) -> None:
        super().__init__()
        self.net = network()
        self.lr = LR
        self.own = own

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def configure_callbacks(self) -> Sequence[L.Callback]:
        return self.own

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)

    validation_step = training_step


class WithoutOptimizer(BoringModel):
    def configure_optimizers(self) -> None:  # type: ignore[override]
        return None


@pytest.fixture(autouse=True)
def _every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "every_n_steps=1")


@pytest.fixture
def log_lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that are logged."""
    lines: list[str] = []
    for place in ("monitor.environment", "monitor.preconditions"):
        monkeypatch.setattr(f"lightning_adam.{place}.log_info", lines.append)
    return lines


@contextmanager
def warnings_about_callbacks() -> Iterator[list[str]]:
    """Collects the warnings about the variable or a missing callback, by the end of the block."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    texts = [str(each.message) for each in caught]
    messages += [each for each in texts if VARIABLE in each or "callback" in each]


def test_no_monitor_is_added_unless_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    assert callbacks() == []
    with each_row() as row:
        for value in ("", " ", "0", "false", "OFF"):
            monkeypatch.setenv(VARIABLE, value)
            with row(repr(value)):
                assert callbacks() == []


def test_script_without_the_variable_imports_no_library(tmp_path: Path) -> None:
    """Lightning imports the file whenever a Trainer is created in the environment."""
    heavy = "{'hydra', 'lightning', 'numpy', 'omegaconf', 'pytorch_lightning', 'torch'}"
    lines = (
        "import sys, lightning_adam.callbacks as ours",
        f"print(ours.callbacks(), {heavy} & {{*sys.modules}})",
    )
    finished = run([sys.executable, "-c", "\n".join(lines)], tmp_path, cold=True)
    assert finished.output == "[] set()\n"


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((value, {}) for value in ("1", "true", "on", "True", "ON", " 1 ")),
    ("every_n_steps=10", {"every_n_steps": 10}),
    ("adam_monitor.every_n_steps=10 layer_depth=1", {"every_n_steps": 10, "layer_depth": 1}),
    ("+layer_table=true  ++statistics=all", {"layer_table": True, "statistics": "all"}),
    ("scopes=[model,layer]", {"scopes": ["model", "layer"]}),
    ("'statistics=[headline, eps_*]'", {"statistics": ["headline", "eps_*"]}),
    ('adam_monitor.statistics="[headline, eps_*]"', {"statistics": ["headline", "eps_*"]}),
    ("worst={eps_energy_loss:3} every_n_steps=null", {"worst": {"eps_energy_loss": 3}}),
    ("worst.eps_energy_loss=3", {"worst": {"eps_energy_loss": 3}}),
    ("every_n_steps=${layer_depth} layer_depth=7", {"every_n_steps": 7, "layer_depth": 7}),
]


def test_settings_mean_the_same_as_on_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with each_row() as row:
        for value, arguments in SETTINGS:
            monkeypatch.setenv(VARIABLE, value)
            with row(value):
                (attached,) = callbacks()
                assert isinstance(attached, AdamMonitor)
                assert attached.config == AdamMonitor(**arguments).config


BAD_VALUES = [
    ("every_n_steps=0", "every_n_steps=0 must be at least 1. Use"),
    ("adam_monitor.every_n_step=3", "every_n_step=3 is not a setting. Use"),
    ("scopes=[tensors]", "'tensors', which must be 'model', 'group', 'layer' or 'tensor'. Use"),
    ("statistics=[epsilon_*]", "statistics=[epsilon_*] matches no statistic: epsilon_*. Use"),
    ("worst={eps_loss:3}", "worst.eps_loss=3 is not a statistic. Use"),
    ("yes", "yes must be 1, 0, or settings of the monitor"),
    ("every_n_steps", " every_n_steps must be 1, 0, or settings"),
    ("~every_n_steps", "~every_n_steps must be 1, 0, or settings"),
    ("every_n_steps=1,2", "each with one value"),
    ("statistics=[headline, eps_*]", "without spaces"),
    ("statistics='headline", "without spaces"),
    ("a@b=3", "a@b=3 must be 1, 0, or settings"),
    ("worst={a:1} worst={", "worst={ must be 1, 0, or settings"),
]


def test_bad_value_is_one_warning_that_suggests_a_valid_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with each_row() as row:
        for given, sentence in BAD_VALUES:
            monkeypatch.setenv(VARIABLE, given)
            with row(given):
                with warnings_about_callbacks() as messages:
                    run_training(Plain(), data=1)
                (message,) = messages
                assert message.startswith(f"{VARIABLE} is ignored: ")
                assert sentence in message
                _, _, suggestion = message.partition(". Use for example ")
                # Parsed as a shell does.
                (assignment,) = shlex.split(suggestion)
                name, _, value = assignment.partition("=")
                assert name == VARIABLE
                assert AdamMonitor(**settings(value))


def test_unreadable_value_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    values = ("_target_=my.Monitor", "optimizer.lr=1", "every_n_steps=${oc.env:NO_SUCH_VARIABLE}")
    with each_row() as row:
        for value in values:
            monkeypatch.setenv(VARIABLE, value)
            with row(value), pytest.warns(UserWarning, match=f"{VARIABLE} is ignored: "):
                assert callbacks() == []


@pytest.mark.filterwarnings("error:.*(AdamMonitor|LIGHTNING_ADAM_MONITOR)")
@pytest.mark.parametrize("given", ["yes", "every_n_steps=0", "kernel=triton", "every_n_steps=1"])
def test_training_continues_if_warnings_are_errors(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of these warns that there is no logger."""
    monkeypatch.setenv(VARIABLE, given)
    run_training(Plain(), data=4, logger=False)


def test_import_error_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning_adam.monitor.environment", None)
    with pytest.warns(UserWarning, match="ignored; training is not affected(?s:.*)import of"):
        assert callbacks() == []


@pytest.mark.parametrize(
    "place",
    [
        "monitor.environment.EnvironmentMonitor._is_first",
        "monitor.environment.is_measurable",
        "monitor.preconditions._check_kernel",
    ],
)
def test_failure_at_the_start_is_a_warning(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(f"lightning_adam.{place}")
    with warnings_about_callbacks() as messages:
        run_training(Plain(), data=4)
    (message,) = messages
    assert "ignored; training is not affected" in message


def test_kernel_for_another_device_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "kernel=triton")
    monkeypatch.setattr("lightning_adam.monitor.preconditions.is_installed", lambda kernel: True)
    with pytest.warns(
        UserWarning, match=rf"the parameters, cpu\. Use for example {VARIABLE}=kernel=auto"
    ):
        run_training(Plain(), data=4, accelerator="cpu")


def test_run_is_measured_and_bit_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    without = run_training(Plain(), data=4)
    assert without.steps_of(KEY) == []
    monkeypatch.setenv(VARIABLE, "every_n_steps=2")
    watched = run_training(Plain(), data=4)
    assert watched.steps_of(KEY) == [0, 1, 3]
    assert_same_parameters(without.module, watched.module)


def test_several_optimizers_and_several_trainers_are_measured() -> None:
    for _ in range(2):
        run = run_training(TwoOptimizers(torch.optim.Adam), data=4)
        assert run.steps_of(scoped("optimizer/second")) == [0, 1, 2, 3]


@pytest.mark.parametrize("module", [BoringModel, WithoutOptimizer])
def test_module_without_adam_is_reported_in_one_line(
    module: type[L.LightningModule], log_lines: list[str]
) -> None:
    with warnings_about_callbacks() as messages:
        trainer(max_epochs=1, limit_train_batches=2, logger=MemoryLogger()).fit(module())
    assert messages == []
    assert log_lines == [f"{VARIABLE} is ignored: no optimizer is Adam-like."]


@pytest.mark.parametrize("is_of_module", [False, True])
def test_monitor_of_the_script_takes_precedence(is_of_module: bool, log_lines: list[str]) -> None:
    own = [AdamMonitor(3)]
    run = run_training(Plain(own), data=4) if is_of_module else run_training(Plain(), *own, data=4)
    assert run.steps_of(KEY) == [0, 2]
    assert log_lines == [f"{VARIABLE} is ignored: an AdamMonitor in the script takes precedence."]


def test_trainer_with_the_callbacks_of_another_measures_once() -> None:
    first = run_training(Plain(), data=2).trainer
    second = run_training(Plain(), *first.callbacks, data=4)  # type: ignore[attr-defined]
    assert second.steps_of(KEY) == [0, 1, 2, 3]


def test_trainer_that_fits_again_measures_again() -> None:
    fit, module, recorder = run_training(Plain(), data=2)
    fit.fit_loop.max_epochs = 2
    fit.validate(module, loader(2), verbose=False)
    fit.fit(Plain(), loader(2))
    assert recorder.steps_of(KEY) == [0, 1, 2, 3]


def test_nothing_is_logged_without_training(log_lines: list[str]) -> None:
    with warnings_about_callbacks() as messages:
        for call in ("validate", "test", "predict"):
            module = Plain()
            module.test_step = module.predict_step = module.validation_step  # type: ignore[method-assign]
            getattr(trainer(logger=False), call)(module, loader(1))
    assert messages == log_lines == []


FROM_TO = [
    (None, None, "1", "1"),
    (None, None, "1", "0"),
    (None, None, "0", "1"),
    (AdamMonitor, None, "0", "1"),
    (None, AdamMonitor, "1", "0"),
    (AdamMonitor, AdamMonitor, "1", "1"),
]


@pytest.mark.parametrize(("own_before", "own_after", "before", "after"), FROM_TO)
def test_checkpoint_of_any_monitor_resumes_with_any_monitor(
    own_before: Any, own_after: Any, before: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(own: Any, variable: str, epochs: int, path: str | None) -> TrainingRun:
        monkeypatch.setenv(VARIABLE, variable)
        flags: dict[str, Any] = {"max_epochs": epochs, "log_every_n_steps": 2, "weights_only": None}
        return run_training(Plain(), own and own(), data=3, ckpt_path=path, **flags)

    fit(own_before, before, 1, None).trainer.save_checkpoint("last.ckpt")
    with warnings_about_callbacks() as messages:
        second = fit(own_after, after, 2, "last.ckpt")
    # Lightning warns of a callback of the script that has state in the checkpoint and is missing.
    assert bool(messages) == (own_before is not None and own_after is None)
    measures = after == "1" or own_after is not None
    assert second.steps_of(KEY) == ([3, 5] if measures else [])
    second.trainer.save_checkpoint("last.ckpt")
    checkpoint = torch.load("last.ckpt")
    expected = {"steps": {"": [6, 0]}, "layers": [[], []]}
    of_variable = checkpoint.get(VARIABLE)
    of_script = checkpoint["callbacks"].get("AdamMonitor")
    assert (of_variable is not None) == (after == "1" and own_after is None)
    assert (of_script is not None) == (own_after is not None)
    assert (of_variable or of_script or expected)["steps"] == expected["steps"]
    assert list(checkpoint["callbacks"]) == (["AdamMonitor"] if own_after else [])


def test_weights_only_checkpoint_has_no_monitor_state() -> None:
    fit = run_training(Plain(), data=2).trainer
    fit.save_checkpoint("weights.ckpt", weights_only=True)
    assert VARIABLE not in torch.load("weights.ckpt")
    Plain.load_from_checkpoint("weights.ckpt")


def test_monitor_can_be_pickled() -> None:
    """`ddp_spawn` pickles the trainer and all its callbacks."""
    (attached,) = callbacks()
    for sent in (copy.deepcopy(attached), pickle.loads(pickle.dumps(attached))):
        assert isinstance(sent, AdamMonitor)
        assert sent.config == AdamMonitor(1).config
    fit = run_training(Plain(), data=2).trainer
    pickle.dumps(fit.callbacks)  # type: ignore[attr-defined]


def test_lr_find_is_not_measured() -> None:
    recorder = MemoryLogger()
    fit = trainer(max_epochs=1, logger=recorder)
    module = Plain()
    found = Tuner(fit).lr_find(module, loader(8), num_training=8, update_attr=True)
    assert found is not None
    assert recorder.steps_of(KEY) == []
    fit.fit(module, loader(4))
    assert recorder.steps_of(KEY) == [0, 1, 2, 3]


@pytest.mark.parametrize("flags", [{"fast_dev_run": True}, {"barebones": True}])
def test_flags_that_disable_logging_do_not_fail(flags: dict[str, bool]) -> None:
    L.Trainer(accelerator="cpu", max_epochs=1, **flags).fit(Plain(), loader(2))  # type: ignore[arg-type]


class OtherProcesses:
    """The store of a run in which a number of other processes measure."""

    def __init__(self, measuring: int) -> None:
        self.measuring = measuring

    def add(self, key: str, amount: int) -> int:
        self.measuring += amount
        return self.measuring


@pytest.mark.parametrize("others", [0, 1])
def test_monitor_measures_only_if_all_processes_do(
    others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise this process would wait forever for one that does not take part."""
    store = OtherProcesses(others)
    monkeypatch.setattr("lightning_adam.monitor.environment.shared_store", lambda: store)
    with warnings_about_callbacks() as messages:
        measured = run_training(Plain(), data=4).steps_of(KEY)
    assert bool(measured) == (others == 0)
    ignored = (
        f"{VARIABLE} is ignored: only 2 of 1 processes have this value. Set the variable on every"
    )
    assert [each.startswith(ignored) for each in messages] == [True] * others
