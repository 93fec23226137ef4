"""The table that a killed training leaves, and the settings of the monitor as they are typed."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import (
    BIN,
    MODEL,
    Finished,
    environment,
    history,
    offline_runs,
    run,
    succeed,
    write_the_project,
)
from tests.support.offline import steps_of, tables

LAYERS = 40
STEPS = 400
KILLED_AT = 200
ROWS_AT_ONCE = 1000
TRAINING = f"""
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

TYPED = (
    "adam_monitor.statistics=all",
    "adam_monitor.scopes=[model,layer]",
    "adam_monitor.worst={eps_energy_loss:2}",
    "adam_monitor.histograms_every_n_steps=100",
    "adam_monitor.layer_table=true",
)
PROJECT_LAYERS = ("net.0", "net.2", "net.3")
MISTYPED = {
    "adam_monitor.statistics=[headline,esp_*]": "but esp_* is none; type for example",
    "adam_monitor.scopes=[model,layr]": (
        "Invalid value 'layr', expected one of [model, group, layer, tensor]"
    ),
    "adam_monitor.worst={eps_energy_los:2}": "adam_monitor.worst.eps_energy_los=2: no such field",
    "adam_monitor.histograms_every_n_steps=0": (
        "adam_monitor.histograms_every_n_steps=0: expected an integer of at least 1"
    ),
    "adam_monitor.layer_table=treu": "Value 'treu' is not a valid bool",
    "adam_monitor.layer_tabel=true": "Key 'layer_tabel' not in 'MonitorConfig'",
}
"""What is typed, and what has to stand in the line that refuses it."""
REFUSED_SOON = "adam_monitor.worst={eps_energy_los:2}"
"""The others are slow together."""


@pytest.mark.slow
def test_a_killed_training_leaves_all_but_its_last_rows(tmp_path: Path) -> None:
    script = tmp_path / "training.py"
    script.write_text(TRAINING, encoding="utf-8")
    variables = environment(WANDB_DATA_DIR=str(tmp_path))
    with subprocess.Popen(
        [BIN / "python", script],
        cwd=tmp_path,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    ) as training:
        assert training.stdout is not None
        half_way = f"at step {KILLED_AT}\n"
        assert half_way in iter(training.stdout.readline, "")
        training.kill()
    (offline_run,) = offline_runs(tmp_path)
    rows = interrupted_history(offline_run)
    (*_, last) = steps_of(rows, "adam_moments/grad_norm")
    assert last < STEPS - 1
    pieces = tables(offline_run, rows, "adam_layers")
    assert pieces
    sent = [(step, layer) for piece in pieces for step, _, layer, *_ in piece.rows]
    everything = [(step, f"net.{layer}") for step in range(last + 1) for layer in range(LAYERS)]
    assert sent == everything[: len(sent)]
    assert all(len(piece.rows) == ROWS_AT_ONCE for piece in pieces)
    assert len(everything) - len(sent) < ROWS_AT_ONCE + LAYERS


def interrupted_history(offline_run: Path) -> list[dict[str, Any]]:
    """The rows of a run that nobody finished, once nobody writes to it any more."""
    reader = ["wandb", "leet", "inspect", "--json", "--follow", "--idle-timeout", "3s"]
    lines = succeed([*reader, offline_run]).splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return [entry["history"]["item"] for entry in found if "history" in entry]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_the_project(tmp_path)
    return tmp_path


def typed(project: Path, *overrides: str) -> Finished:
    variables = environment(WANDB_DATA_DIR=str(project))
    return run([BIN / "python", "train.py", *overrides], project, variables)


@pytest.mark.slow
def test_what_is_typed_is_what_is_measured(project: Path) -> None:
    trained = typed(project, *TYPED)
    assert trained.returncode == 0, trained.output
    (offline_run,) = offline_runs(project)
    rows = history(offline_run)
    measured = [0, *range(49, 960, 50)]
    for scope in (MODEL, *(f"/layer/{layer}" for layer in PROJECT_LAYERS)):
        assert steps_of(rows, f"adam_update/update_norm{scope}") == measured
        assert steps_of(rows, f"adam_moments/signal_fraction{scope}") == measured
    assert steps_of(rows, "adam_histogram/grad.values") == [0, *range(99, 960, 100)]
    for row in rows:
        if "adam_update/update_norm" in row:
            tensors = {key for key in row if "/tensor/" in key}
            assert len(tensors) == 2
            assert all(key.startswith("adam_underflow/eps_energy_loss/") for key in tensors)
    (table,) = tables(offline_run, rows, "adam_layers")
    assert len(table.rows) == len(measured) * len(PROJECT_LAYERS)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        pytest.param(
            override,
            sentence,
            id=override,
            marks=[] if override == REFUSED_SOON else [pytest.mark.slow],
        )
        for override, sentence in MISTYPED.items()
    ],
)
def test_a_typo_is_refused_before_training_in_one_clear_line(
    override: str, sentence: str, project: Path
) -> None:
    refused = typed(project, override)
    assert refused.returncode == 1
    assert sum(sentence in line for line in refused.lines) == 1, refused.output
    for harm in ("Traceback", "Sanity Checking", "Epoch 0"):
        assert harm not in refused.output
    assert offline_runs(project) == []
