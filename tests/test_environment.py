"""LIGHTNING_ADAM_MONITOR in trainings that know nothing of it; the scripts are in tests/e2e."""

import copy
import pickle
import shlex
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor

from lightning_adam import AdamMonitor
from lightning_adam.environment import VARIABLE, callbacks, settings
from tests.support.memory_logger import MemoryLogger
from tests.support.monitored import KEY, TwoOptimizers
from tests.support.training import LR, loader, loss_of, network, parameters, trainer


class Plain(L.LightningModule):
    """What is in the world: no mixin, no groups with names."""

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


@pytest.fixture
def _every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "every_n_steps=1")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines for the log."""
    lines: list[str] = []
    for place in ("environment_monitor", "monitor"):
        monkeypatch.setattr(f"lightning_adam.{place}.rank_zero_info", lines.append)
    return lines


def fitted(module: L.LightningModule, batches: int = 4, **flags: Any) -> MemoryLogger:
    recorder = MemoryLogger()
    trainer(**{"max_epochs": 1, "logger": recorder, **flags}).fit(module, loader(batches))
    return recorder


def warned(recorded: Sequence[warnings.WarningMessage]) -> list[str]:
    """What is said of the variable, or of callbacks that Lightning misses."""
    messages = [str(each.message) for each in recorded]
    return [each for each in messages if VARIABLE in each or "callback" in each]


@pytest.mark.parametrize("given", [None, "", " ", "0", "false", "OFF"])
def test_none_is_attached_unless_it_is_asked_for(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if given is not None:
        monkeypatch.setenv(VARIABLE, given)
    assert callbacks() == []


def test_a_script_without_it_pays_nothing() -> None:
    """Lightning loads the file at every Trainer of the environment."""
    heavy = "{'hydra', 'lightning', 'numpy', 'omegaconf', 'torch'}"
    lines = (
        "import sys, lightning_adam.environment as ours",
        f"print(ours.callbacks(), {heavy} & {{*sys.modules}})",
    )
    printed = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, check=True, encoding="utf-8"
    )
    assert printed.stdout == "[] set()\n"


@pytest.mark.parametrize("given", ["1", "true", "on", "True", "ON", " 1 "])
def test_it_is_asked_for_with_all_defaults(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, given)
    (attached,) = callbacks()
    assert isinstance(attached, AdamMonitor)
    assert attached.config == AdamMonitor().config


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ("every_n_steps=10", {"every_n_steps": 10}),
        ("adam_monitor.every_n_steps=10 layer_depth=1", {"every_n_steps": 10, "layer_depth": 1}),
        ("+layer_table=true  ++statistics=all", {"layer_table": True, "statistics": "all"}),
        ("scopes=[model,layer]", {"scopes": ["model", "layer"]}),
        ("'statistics=[headline, eps_*]'", {"statistics": ["headline", "eps_*"]}),
        ('adam_monitor.statistics="[headline, eps_*]"', {"statistics": ["headline", "eps_*"]}),
        ("worst={eps_energy_loss:3} every_n_steps=null", {"worst": {"eps_energy_loss": 3}}),
        ("worst.eps_energy_loss=3", {"worst": {"eps_energy_loss": 3}}),
        ("every_n_steps=${layer_depth} layer_depth=7", {"every_n_steps": 7, "layer_depth": 7}),
    ],
)
def test_settings_mean_what_they_mean_on_a_command_line(
    given: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, given)
    (attached,) = callbacks()
    assert isinstance(attached, AdamMonitor)
    assert attached.config == AdamMonitor(**arguments).config


WRONG = [
    ("every_n_steps=0", "every_n_steps=0: expected an integer of at least 1; type"),
    ("adam_monitor.every_n_step=3", "every_n_step=3: no such field; type"),
    ("scopes=[tensors]", "expected one of [model, group, layer, tensor]; type"),
    ("statistics=[epsilon_*]", "statistics=[epsilon_*]: expected headline, all, or"),
    ("worst={eps_loss:3}", "worst.eps_loss=3: no such field; type"),
    ("yes", "yes: expected 1, 0, or settings of the monitor"),
    ("every_n_steps", "every_n_steps: expected 1, 0, or settings"),
    ("~every_n_steps", "~every_n_steps: expected 1, 0, or settings"),
    ("every_n_steps=1,2", "each with one value"),
    ("statistics=[headline, eps_*]", "no space within"),
    ("statistics='headline", "no space within"),
    ("a@b=3", "expected 1, 0, or settings"),
    ("worst={a:1} worst={", "expected 1, 0, or settings"),
]


@pytest.mark.parametrize(("given", "sentence"), WRONG)
def test_what_is_wrong_is_one_warning_that_says_what_to_type(
    given: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, given)
    with pytest.warns(UserWarning, match=VARIABLE) as recorded:
        fitted(Plain())
    (message,) = warned(recorded.list)
    assert message.startswith(f"{VARIABLE} is ignored: ")
    assert sentence in message
    _, _, typed = message.partition("; type for example ")
    # As a shell takes it.
    (assignment,) = shlex.split(typed)
    name, _, value = assignment.partition("=")
    assert (name, value) == (VARIABLE, value)
    assert AdamMonitor(**settings(value))


@pytest.mark.parametrize(
    "given", ["_target_=my.Monitor", "optimizer.lr=1", "every_n_steps=${oc.env:NO_SUCH_VARIABLE}"]
)
def test_what_is_nothing_like_a_setting_is_a_warning_too(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, given)
    with pytest.warns(UserWarning, match=f"{VARIABLE} is ignored: "):
        assert callbacks() == []


@pytest.mark.filterwarnings("error:.*(AdamMonitor|LIGHTNING_ADAM_MONITOR)")
@pytest.mark.parametrize("given", ["yes", "every_n_steps=0", "kernel=triton", "every_n_steps=1"])
def test_where_warnings_are_errors_the_training_goes_on(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of these warns that there is no logger."""
    monkeypatch.setenv(VARIABLE, given)
    fitted(Plain(), logger=False)


def test_what_cannot_be_imported_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setitem(sys.modules, "lightning_adam.environment_monitor", None)
    with pytest.warns(UserWarning, match="ignored; training is not affected(?s:.*)import of"):
        assert callbacks() == []


@pytest.mark.parametrize(
    "place",
    [
        "environment_monitor.EnvironmentMonitor._is_first",
        "environment_monitor.is_measurable",
        "monitor.AdamMonitor._check_kernel",
    ],
)
def test_a_fault_at_the_start_is_a_warning(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.delattr(f"lightning_adam.{place}")
    with pytest.warns(UserWarning, match="ignored; training is not affected") as recorded:
        fitted(Plain())
    assert len(warned(recorded.list)) == 1


def test_a_kernel_for_another_device_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "kernel=triton")
    monkeypatch.setattr("lightning_adam.monitor.is_installed", lambda kernel: True)
    with pytest.warns(UserWarning, match=f"type for example {VARIABLE}=kernel=auto"):
        fitted(Plain(), accelerator="cpu")


def test_a_training_is_measured_and_bit_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    without, with_it = Plain(), Plain()
    assert fitted(without).steps_of(KEY) == []
    monkeypatch.setenv(VARIABLE, "every_n_steps=2")
    recorder = fitted(with_it)
    assert recorder.steps_of(KEY) == recorder.steps_of(f"{KEY}/group/group_0") == [0, 1, 3]
    same = zip(parameters(without), parameters(with_it), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


@pytest.mark.usefixtures("_every_step")
def test_several_optimizers_and_several_trainers() -> None:
    for _ in range(2):
        recorder = fitted(TwoOptimizers(torch.optim.Adam))
        assert recorder.steps_of(f"{KEY}/optimizer/second") == [0, 1, 2, 3]


@pytest.mark.usefixtures("_every_step")
@pytest.mark.parametrize("module", [BoringModel, WithoutOptimizer])
def test_where_there_is_nothing_to_measure_one_line_says_so(
    module: type[L.LightningModule], said: list[str]
) -> None:
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        trainer(max_epochs=1, limit_train_batches=2, logger=MemoryLogger()).fit(module())
    assert warned(recorded) == []
    assert said == [f"{VARIABLE}: nothing to measure, for no optimizer is of Adam's family."]


@pytest.mark.usefixtures("_every_step")
@pytest.mark.parametrize("place", ["the trainer", "the module"])
def test_it_yields_to_a_monitor_of_the_script(place: str, said: list[str]) -> None:
    own = [AdamMonitor(3)]
    recorder = fitted(Plain(), callbacks=own) if place == "the trainer" else fitted(Plain(own))
    assert recorder.steps_of(KEY) == [0, 2]
    assert said == [f"{VARIABLE}: the script has an AdamMonitor of its own, which measures."]


@pytest.mark.usefixtures("_every_step")
def test_a_trainer_that_is_handed_anothers_callbacks_measures_once() -> None:
    first = trainer(max_epochs=1, logger=MemoryLogger())
    first.fit(Plain(), loader(2))
    recorder = fitted(Plain(), callbacks=first.callbacks)  # type: ignore[attr-defined]
    assert recorder.steps_of(KEY) == [0, 1, 2, 3]


@pytest.mark.usefixtures("_every_step")
def test_a_trainer_that_fits_again_measures_again() -> None:
    recorder = MemoryLogger()
    fit = trainer(max_epochs=1, logger=recorder)
    fit.fit(Plain(), loader(2))
    fit.fit_loop.max_epochs = 2
    fit.validate(Plain(), loader(2), verbose=False)
    fit.fit(Plain(), loader(2))
    assert recorder.steps_of(KEY) == [0, 1, 2, 3]


@pytest.mark.usefixtures("_every_step")
def test_nothing_is_said_where_nothing_is_trained(said: list[str]) -> None:
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        for call in ("validate", "test", "predict"):
            module = Plain()
            module.test_step = module.predict_step = module.validation_step  # type: ignore[method-assign]
            getattr(trainer(logger=False), call)(module, loader(1))
    assert warned(recorded) == said == []


FROM_TO = [
    (None, None, "1", "1"),
    (None, None, "1", "0"),
    (None, None, "0", "1"),
    (AdamMonitor, None, "0", "1"),
    (None, AdamMonitor, "1", "0"),
    (AdamMonitor, AdamMonitor, "1", "1"),
]


@pytest.mark.parametrize(("own_before", "own_after", "before", "after"), FROM_TO)
def test_checkpoints_go_from_any_to_any(
    own_before: Any, own_after: Any, before: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resumed(own: Any, variable: str, epochs: int, path: str | None) -> tuple[L.Trainer, Any]:
        monkeypatch.setenv(VARIABLE, variable)
        recorder = MemoryLogger()
        flags = {"log_every_n_steps": 2, "callbacks": [own()] if own else []}
        fit = trainer(max_epochs=epochs, logger=recorder, **flags)
        fit.fit(Plain(), loader(3), ckpt_path=path)
        return fit, recorder

    first, _ = resumed(own_before, before, 1, None)
    first.save_checkpoint("last.ckpt")
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        second, recorder = resumed(own_after, after, 2, "last.ckpt")
    # Lightning misses a callback of the script, if its state stands in the checkpoint.
    assert bool(warned(recorded)) == (own_before is not None and own_after is None)
    measures = after == "1" or own_after is not None
    assert recorder.steps_of(KEY) == ([3, 5] if measures else [])
    second.save_checkpoint("last.ckpt")
    checkpoint = torch.load("last.ckpt")
    expected = {"steps": {"": [6, 0]}, "layers": [[], []]}
    of_variable = checkpoint.get(VARIABLE)
    of_script = checkpoint["callbacks"].get("AdamMonitor")
    assert (of_variable is not None) == (after == "1" and own_after is None)
    assert (of_script is not None) == (own_after is not None)
    assert (of_variable or of_script or expected)["steps"] == expected["steps"]
    assert list(checkpoint["callbacks"]) == (["AdamMonitor"] if own_after else [])


def test_skipped_steps_are_counted_on_from_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    class Skipping(Plain):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    monkeypatch.setenv(VARIABLE, "every_n_steps=1 statistics=skipped_steps")
    rows: list[float] = []
    for epochs, path in ((1, None), (2, "last.ckpt")):
        recorder = MemoryLogger()
        fit = trainer(max_epochs=epochs, logger=recorder)
        fit.fit(Skipping(), loader(2), ckpt_path=path)
        fit.save_checkpoint("last.ckpt")
        rows += [row["adam_schedule/skipped_steps"] for _, row in recorder.rows if row]
    assert rows == [1, 2]


def test_a_checkpoint_of_weights_alone_holds_nothing_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    fit = trainer(max_epochs=1, logger=MemoryLogger())
    fit.fit(Plain(), loader(2))
    fit.save_checkpoint("weights.ckpt", weights_only=True)
    assert VARIABLE not in torch.load("weights.ckpt")
    Plain.load_from_checkpoint("weights.ckpt")


@pytest.mark.usefixtures("_every_step")
def test_it_can_be_sent_to_a_process_that_is_started(tmp_path: Path) -> None:
    """As `ddp_spawn` does with the trainer and all its callbacks."""
    (attached,) = callbacks()
    assert isinstance(attached, AdamMonitor)
    for sent in (copy.deepcopy(attached), pickle.loads(pickle.dumps(attached))):
        assert sent.config == AdamMonitor(1).config
    fit = trainer(max_epochs=1, logger=MemoryLogger())
    fit.fit(Plain(), loader(2))
    pickle.dumps(fit.callbacks)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("_every_step")
def test_the_tuner_is_not_measured_and_the_training_is() -> None:
    recorder = MemoryLogger()
    fit = trainer(max_epochs=1, logger=recorder)
    module = Plain()
    found = Tuner(fit).lr_find(module, loader(8), num_training=8, update_attr=True)
    assert found is not None
    assert recorder.steps_of(KEY) == []
    fit.fit(module, loader(4))
    assert recorder.steps_of(KEY) == [0, 1, 2, 3]


@pytest.mark.usefixtures("_every_step")
@pytest.mark.parametrize("flags", [{"fast_dev_run": True}, {"barebones": True}])
def test_under_flags_that_turn_logging_off_nothing_fails(flags: dict[str, bool]) -> None:
    L.Trainer(accelerator="cpu", max_epochs=1, **flags).fit(Plain(), loader(2))  # type: ignore[arg-type]


class Others:
    """The store of a training in which other processes may have voted otherwise."""

    def __init__(self, voting: int) -> None:
        self.voting = voting

    def add(self, ballot: str, votes: int) -> int:
        self.voting += votes
        return self.voting


@pytest.mark.parametrize("others", [0, 1])
def test_it_measures_only_if_all_processes_do(
    others: int, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """Or this process would wait in a reduction for one that has gone on."""
    monkeypatch.setenv(VARIABLE, "every_n_steps=1")
    store = Others(others)
    monkeypatch.setattr("lightning_adam.environment_monitor.shared_store", lambda: store)
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        measured = fitted(Plain()).steps_of(KEY)
    assert bool(measured) == (others == 0)
    ignored = f"{VARIABLE} is ignored: 2 of 1 processes have this value: expected the same for all"
    assert [each.startswith(ignored) for each in warned(recorded)] == [True] * others
