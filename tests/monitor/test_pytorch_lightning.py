"""AdamMonitor in a Trainer of `pytorch_lightning`, compared with one of `lightning.pytorch`."""

import ast
import json
import math
import sys
import warnings
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning.pytorch as lp
import pytest
import pytorch_lightning as pl
import torch
import wandb

import lightning_adam
from lightning_adam import AdamMonitor
from lightning_adam._compat.lightning import AnyCallback, either, parameter_root
from lightning_adam.config.variables import MONITOR_VARIABLE as VARIABLE
from tests.support.commands import history, offline_runs
from tests.support.monitored import KEY
from tests.support.packages import PACKAGES, plain_module, trainer
from tests.support.training import loader

BATCHES, NAN_AT = 10, 7


class Run(NamedTuple):
    """The output of a run with a NaN loss."""

    numbers: list[dict[str, float]]
    """Rows in W&B."""
    keys: Counter[str]
    """Number of rows in W&B by key."""
    files: list[str]
    findings: list[Any]
    """Findings in the file of each logger."""
    messages: list[str]


def loggers_of(package: str, folder: Path, *names: str) -> list[Any]:
    kinds = import_module(f"{package}.loggers")
    flags = {"WandbLogger": {"offline": True}}
    return [getattr(kinds, name)(save_dir=folder, **flags.get(name, {})) for name in names]


def train_until_nan(package: str, folder: Path, *loggers: str) -> list[str]:
    """Trains with all options until the loss is NaN, and returns the messages of the monitor."""
    monitor = AdamMonitor(1, histograms_every_n_steps=2, layer_table=True, flight_recorder=4)
    messages: list[str] = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setenv("WANDB_DATA_DIR", str(folder))
        for place in (
            "preconditions",
            "publishing",
            "finding_reporter",
            "flight_recorder.event_files",
        ):
            patch.setattr(f"lightning_adam.monitor.{place}.log_info", messages.append)
        patch.setattr("lightning_adam.monitor.finding_reporter.log_warning", messages.append)
        given = loggers_of(package, folder, *loggers)
        fit = trainer(package, callbacks=[monitor], logger=given)
        fit.fit(plain_module(package, nan_at=NAN_AT), loader(BATCHES))
        wandb.finish()
    messages += [str(each.message) for each in caught if "AdamMonitor" in str(each.message)]
    return [each.replace(str(folder), "") for each in messages]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    found = {}
    for package in PACKAGES:
        folder = tmp_path_factory.mktemp("run")
        names = ("WandbLogger", "CSVLogger", "TensorBoardLogger")
        messages = train_until_nan(package, folder, *names)
        (offline,) = offline_runs(folder)
        rows = history(offline)
        paths = [each for each in folder.rglob("adam_*") if "media" not in each.parts]
        found[package] = Run(
            [
                {key: value for key, value in row.items() if isinstance(value, float)}
                for row in rows
                if KEY in row
            ],
            Counter(key for row in rows for key in row if key.startswith("adam_")),
            sorted(each.name for each in paths),
            [json.loads(each.read_text())["findings"] for each in paths if each.suffix == ".json"],
            [each.replace(offline.name, "") for each in messages],
        )
    return found


def test_all_loggers_get_the_same_rows_as_those_of_lightning(runs: dict[str, Run]) -> None:
    expected, found = (runs[package] for package in PACKAGES)
    assert found.keys == expected.keys
    assert {"adam_histogram/grad.values", "adam_layers.path"} <= found.keys.keys()
    for one, other in zip(found.numbers, expected.numbers, strict=True):
        for key in other.keys() - {"_timestamp", "_runtime"}:
            assert one[key] == other[key] or math.isnan(other[key]), key


def test_findings_file_and_flight_recorder_are_in_the_folders_of_the_loggers(
    runs: dict[str, Run],
) -> None:
    expected, found = (runs[package] for package in PACKAGES)
    assert found.files == expected.files
    assert found.files.count("adam_findings.json") == 3
    assert "adam_flight_recorder" in found.files
    assert found.findings == expected.findings
    for rows in found.findings:
        assert "not_finite" in {row["code"] for row in rows}


def test_messages_are_those_of_lightning(runs: dict[str, Run]) -> None:
    expected, found = (runs[package].messages for package in PACKAGES)
    assert [each.partition("; ")[0] for each in found] == [
        each.partition("; ")[0] for each in expected
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_flight_recorder_prints_the_report_command_of_a_csv_run(
    package: str, tmp_path: Path
) -> None:
    messages = train_until_nan(package, tmp_path, "CSVLogger")
    (line,) = [each for each in messages if "the last 4 steps are in" in each]
    assert "report: lightning-adam report lightning_logs/version_0" in line
    (without,) = [each for each in messages if "need" in each and "histograms" not in each]
    assert without == "AdamMonitor's layer_table needs a WandbLogger."


@pytest.mark.parametrize("package", PACKAGES)
def test_checkpoint_stores_and_restores_the_state(package: str, tmp_path: Path) -> None:
    def fit(epochs: int, path: str | None) -> Any:
        callbacks = import_module(f"{package}.callbacks")
        saving = callbacks.ModelCheckpoint(tmp_path, save_last=True)
        monitor = AdamMonitor(every_n_steps=4)
        runner = trainer(
            package,
            max_epochs=epochs,
            callbacks=[saving, monitor],
            enable_checkpointing=True,
            logger=loggers_of(package, tmp_path, "CSVLogger"),
        )
        runner.fit(plain_module(package), loader(5), ckpt_path=path)
        assert runner.callbacks[-1] is saving
        return monitor

    first = fit(1, None)
    path = str(tmp_path / "last.ckpt")
    assert torch.load(path)["callbacks"]["AdamMonitor"]["steps"] == {"": [5, 0]}
    assert fit(2, path).state_dict()["steps"] == {"": [10, 0]}
    assert first.state_dict()["steps"] == {"": [5, 0]}


@pytest.fixture
def log_lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("lightning_adam.monitor.environment.log_info", lines.append)
    return lines


def monitors_of(fit: Any) -> list[str]:
    return [type(each).__name__ for each in fit.callbacks if isinstance(each, AdamMonitor)]


@pytest.mark.parametrize("package", PACKAGES)
def test_variable_attaches_one_monitor(
    package: str, log_lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "every_n_steps=1")
    fit = trainer(package)
    assert monitors_of(fit) == ["EnvironmentMonitor"]
    fit.fit(plain_module(package), loader(2))
    assert KEY in fit.callback_metrics
    again = trainer(package, callbacks=fit.callbacks)
    assert monitors_of(again) == ["EnvironmentMonitor"] * 2
    again.fit(plain_module(package), loader(2))
    assert KEY in again.callback_metrics
    assert log_lines == []


@pytest.mark.parametrize("package", PACKAGES)
def test_monitor_of_the_script_takes_precedence(
    package: str, log_lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "every_n_steps=1")
    own = AdamMonitor(every_n_steps=1)
    fit = trainer(package, callbacks=[own])
    fit.fit(plain_module(package), loader(2))
    assert log_lines == [f"{VARIABLE} is ignored: an AdamMonitor in the script takes precedence."]
    assert own.state_dict()["steps"] == {"": [2, 0]}


def test_package_imports_only_the_package_that_it_depends_on() -> None:
    """Importing the other package takes seconds; only its users have imported it."""
    folder = Path(lightning_adam.__file__).parent
    imported = [
        name
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None), *(each.name for each in node.names)]
        if name
    ]
    assert [each for each in imported if each.startswith("lightning.pytorch")]
    assert [each for each in imported if each.startswith("pytorch_lightning")] == []


def test_package_that_is_not_imported_is_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert either("Trainer") == (lp.Trainer, pl.Trainer)
    monkeypatch.delitem(sys.modules, "pytorch_lightning")
    assert either("Trainer") == (lp.Trainer,)


def test_callback_is_an_instance_of_both_packages_in_either_order_of_imports() -> None:
    """A Trainer accepts a single callback only if it is an instance of its own Callback."""
    # Before the import of pytorch_lightning.
    AnyCallback.__bases__ = (lp.Callback,)
    kind: type[Any] = AdamMonitor
    assert not issubclass(kind, pl.Callback)
    callback = kind()
    assert trainer("pytorch_lightning", callbacks=callback).callbacks[0] is callback
    overrides = pl.utilities.model_helpers.is_overridden
    assert overrides("state_dict", instance=callback)
    assert not overrides("on_sanity_check_start", instance=callback)
    assert trainer("lightning.pytorch", callbacks=callback).callbacks[0] is callback


@pytest.mark.parametrize("package", PACKAGES)
def test_lightning_cli_accepts_the_monitor(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Defined late, like the monitor if LightningCLI is the first to import it.
    type("Own", (AdamMonitor,), {})
    cli = import_module(f"{package}.cli")
    typed = ("+=lightning_adam.AdamMonitor", ".every_n_steps=3")
    words = [f"--trainer.callbacks{each}" for each in typed]
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    module = type(plain_module(package))
    built = cli.LightningCLI(module, run=False, save_config_callback=None)
    (monitor,) = [each for each in built.trainer.callbacks if isinstance(each, AdamMonitor)]
    assert monitor.config.every_n_steps == 3


@pytest.mark.parametrize("package", PACKAGES)
def test_trainer_rejects_two_monitors(package: str) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `AdamMonitor`"):
        trainer(package, callbacks=[AdamMonitor(), AdamMonitor()])


@pytest.mark.parametrize("package", PACKAGES)
def test_flat_parameters_are_those_of_the_wrapped_fsdp_module(package: str) -> None:
    wrapped, module = torch.nn.Linear(1, 1), plain_module(package)
    fit = trainer(package)
    assert parameter_root(fit, module) is module
    flat = import_module(f"{package}.strategies").FSDPStrategy()
    flat.model = wrapped
    assert parameter_root(SimpleNamespace(strategy=flat), module) is wrapped  # type: ignore[arg-type]
