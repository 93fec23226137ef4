"""The table of layers of a killed run, and the overrides of the monitor."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import instantiate

from lightning_adam import AdamMonitor
from tests.support import forkserver
from tests.support.commands import (
    BIN,
    environment,
    offline_runs,
    run,
    succeed,
    write_the_project,
)
from tests.support.monitored import scoped
from tests.support.offline import fit_offline, steps_of, tables
from tests.support.tables import each_row
from tests.support.training import ADAMW, Lit

LAYERS = 40
STEPS = 200
KILLED_AT = 100
ROWS_AT_ONCE = 1000
TRAINING = f"""
import time

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adam import AdamMonitor


class Lit(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*[nn.Linear(2, 2) for _ in range({LAYERS})])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

    def training_step(self, batch, batch_idx):
        if batch_idx % 50 == 0:
            print("at step", batch_idx, flush=True)
        if batch_idx > {KILLED_AT}:
            time.sleep(0.05)
        return self.net(batch[0]).square().mean()


monitor = AdamMonitor(1, scopes=["model"], statistics=["grad_norm", "lr"], layer_table=True)
trainer = L.Trainer(
    max_epochs=1,
    accelerator="cpu",
    callbacks=[monitor],
    logger=WandbLogger(offline=True),
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(Lit(), DataLoader(TensorDataset(torch.randn({STEPS}, 2)), batch_size=1))
"""

OVERRIDES = (
    "adam_monitor.statistics=all",
    "adam_monitor.scopes=[model,layer]",
    "adam_monitor.worst={eps_energy_loss:2}",
    "adam_monitor.histograms_every_n_steps=100",
    "adam_monitor.layer_table=true",
)
INVALID = {
    "adam_monitor.statistics=[headline,esp_*]": (
        "adam_monitor.statistics=[headline,esp_*] matches no statistic: esp_*. Use for example"
        " 'adam_monitor.statistics=["
    ),
    "adam_monitor.scopes=[model,layr]": (
        "Invalid value 'layr', expected one of [model, group, layer, tensor]"
    ),
    "adam_monitor.worst={eps_energy_los:2}": (
        "adam_monitor.worst.eps_energy_los=2 is not a statistic. Use for example"
        " +adam_monitor.worst.eps_energy_loss=2"
    ),
    "adam_monitor.histograms_every_n_steps=0": (
        "adam_monitor.histograms_every_n_steps=0 must be at least 1. Use for example"
        " adam_monitor.histograms_every_n_steps=500"
    ),
    "adam_monitor.layer_table=treu": "Value 'treu' is not a valid bool",
    "adam_monitor.layer_tabel=true": "Key 'layer_tabel' not in 'MonitorConfig'",
}
"""Overrides, and a part of the error of each."""


@pytest.mark.slow
def test_killed_run_keeps_all_but_its_last_rows(tmp_path: Path) -> None:
    (tmp_path / "training.py").write_text(TRAINING, encoding="utf-8")
    variables = environment(WANDB_DATA_DIR=str(tmp_path))
    output = tmp_path / "output.txt"
    process = forkserver.start("training.py", [], tmp_path, variables, output)
    while f"at step {KILLED_AT}\n" not in (output.read_text() if output.exists() else ""):
        assert process.is_alive(), output.read_text()
        time.sleep(0.01)
    process.kill()
    process.join()
    (offline_run,) = offline_runs(tmp_path)
    rows = interrupted_history(offline_run)
    (*_, last) = steps_of(rows, "adam_gradient/grad_norm")
    assert last < STEPS - 1
    pieces = tables(offline_run, rows, "adam_layers")
    assert pieces
    sent = [(step, layer) for piece in pieces for step, _, layer, *_ in piece.rows]
    everything = [(step, f"net.{layer}") for step in range(last + 1) for layer in range(LAYERS)]
    assert sent == everything[: len(sent)]
    assert all(len(piece.rows) == ROWS_AT_ONCE for piece in pieces)
    assert len(everything) - len(sent) < ROWS_AT_ONCE + LAYERS


def interrupted_history(offline_run: Path) -> list[dict[str, Any]]:
    """Returns the rows of an unfinished run, once no process writes to it any more."""
    reader = ["wandb", "leet", "inspect", "--json", "--follow", "--idle-timeout", "3s"]
    lines = succeed([*reader, offline_run]).splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return [entry["history"]["item"] for entry in found if "history" in entry]


def monitor_of(project: Path, *overrides: str) -> AdamMonitor:
    """Composes the config of the README's project, and returns its monitor, as the app does."""
    with initialize_config_dir(str(project / "conf"), version_base="1.3"):
        config = compose("config", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    return instantiate(config.adam_monitor)  # type: ignore[no-any-return]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    write_the_project(tmp_path)
    return tmp_path


def test_overrides_decide_what_is_measured(project: Path) -> None:
    monitor = monitor_of(project, *OVERRIDES)
    trained = fit_offline(project, Lit(ADAMW), monitor, batches=120)
    layers = ("net.0", "net.1", "net.3")
    measured = [0, 49, 99]
    for scope in ("", *(f"layer/{layer}" for layer in layers)):
        for key in ("adam_update/update_norm", "adam_moments/signal_fraction"):
            assert steps_of(trained.rows, scoped(scope, key)) == measured
    assert steps_of(trained.rows, "adam_histogram/grad.values") == [0, 99]
    for row in trained.rows:
        if "adam_update/update_norm" in row:
            assert {key for key in row if "/worst_" in key} == {
                f"adam_underflow/worst_{rank}/eps_energy_loss{tensor}"
                for rank in (1, 2)
                for tensor in ("", "_tensor")
            }
    (table,) = tables(trained.folder, trained.rows, "adam_layers")
    assert len(table.rows) == len(measured) * len(layers)


def test_invalid_override_of_the_monitor_raises(project: Path) -> None:
    with each_row() as row:
        for override, sentence in INVALID.items():
            with row(override):
                with pytest.raises(HydraException) as raised:
                    monitor_of(project, override)
                # Hydra prints the error that it was raised from, too.
                assert sentence in f"{raised.value} {raised.value.__cause__}"


@pytest.mark.slow
def test_invalid_override_is_one_line_before_training(project: Path) -> None:
    sentence = INVALID[override := "adam_monitor.worst={eps_energy_los:2}"]
    variables = environment(WANDB_DATA_DIR=str(project))
    failed = run([BIN / "python", "train.py", override], project, variables)
    assert failed.returncode == 1
    assert sum(sentence in line for line in failed.lines) == 1, failed.output
    for harm in ("Traceback", "Sanity Checking", "Epoch 0"):
        assert harm not in failed.output
    assert offline_runs(project) == []
