"""A run that is killed and resumed from its last checkpoint equals an uninterrupted one."""

import functools
import itertools
import json
import random
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_adam import AdamMonitor
from tests.e2e.killed_training import COSINE, KINDS, PLACES, Moment, Resumable, train
from tests.support import forkserver
from tests.support.commands import (
    GLOBAL_STEP,
    history,
    logged_rows,
    offline_runs,
    records,
    run_config,
)
from tests.support.offline import tables
from tests.support.training import ADAMW, Lit, loader, parameters, trainer

PATIENCE_S = 120
BATCHES = 5
"""Of the runs that are not killed."""

Uninterrupted = Callable[[str], "Run"]


@dataclass(frozen=True)
class Run:
    """The results of a run, over all of its processes."""

    state: dict[str, str]
    """Of the module, the optimizer, the schedule, the scaler, the monitor and the trainer."""
    rows: list[str]
    began_at: list[int]
    """The optimizer steps that each process began after."""
    counts: dict[str, int]
    """How often the last process came to each place."""


def run_training(kind: str, folder: Path, moment: Moment | None = None) -> None:
    """Trains in a process that is killed at a moment, or not at all."""
    folder.mkdir(exist_ok=True)
    process = forkserver.context().Process(target=train, args=(kind, folder, moment), daemon=True)
    process.start()
    process.join(PATIENCE_S)
    expected = -signal.SIGKILL if moment else 0
    assert process.exitcode == expected, (folder / "output.txt").read_text(encoding="utf-8")


def finish(kind: str, folder: Path) -> Run:
    run_training(kind, folder)
    rows: list[str] = []
    began_at = []
    for path in sorted(folder.glob("*.rows")):
        first, *own = path.read_text(encoding="utf-8").splitlines()
        began_at.append(int(first))
        rows = [row for row in rows if step_of(row) < began_at[-1]] + own
    counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return Run(state, rows, began_at, counts)


def step_of(row: str) -> int:
    return int(json.loads(row)[0])


def assert_equals(uninterrupted: Run, kind: str, folder: Path) -> None:
    """Finishes a run that was killed, and compares it with the one that was not."""
    run = finish(kind, folder)
    assert run.state == uninterrupted.state
    # Lightning logs a batch's loss after the checkpoint that it writes at the batch's end: it is
    # lost to a run that is killed in between.
    late = [
        row
        for row in uninterrupted.rows
        if KINDS[kind].is_resumable and step_of(row) + 1 in run.began_at and '"loss"' in row
    ]
    assert run.rows == [row for row in uninterrupted.rows if row in run.rows or row not in late]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    @functools.cache
    def run(kind: str) -> Run:
        found = finish(kind, tmp_path_factory.mktemp("uninterrupted"))
        if KINDS[kind].is_half:
            rows = [json.loads(row)[1] for row in found.rows]
            measured = [row for row in rows if "adam_gradient/grad_norm" in row]
            skipped = [row["adam_schedule/skipped_steps"] for row in measured]
            assert len({*skipped}) > 2, "steps are skipped before the last measurement"
        return found

    return run


KIND_IN_CI = dict(zip(PLACES, itertools.cycle(KINDS), strict=False))
"""The kind of run that is killed at each place; the other kinds are nightly."""


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        pytest.param(
            kind,
            place,
            marks=pytest.mark.slow if KIND_IN_CI[place] == kind else pytest.mark.nightly,
        )
        for kind in KINDS
        for place in PLACES
    ],
)
def test_run_killed_at_a_place_equals_an_uninterrupted_one(
    kind: str, place: str, uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    occurrence = random.Random(kind + place).randint(1, uninterrupted(kind).counts[place])
    run_training(kind, tmp_path, Moment(place, occurrence))
    assert_equals(uninterrupted(kind), kind, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_run_killed_five_times_equals_an_uninterrupted_one(
    kind: str, uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    for place in random.Random(kind).sample(PLACES, 5):
        run_training(kind, tmp_path, Moment(place, 1))
    assert_equals(uninterrupted(kind), kind, tmp_path)


def test_stateful_loader_continues_within_an_epoch(tmp_path: Path) -> None:
    def run(checkpoint: Path | None) -> Lit:
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        module = Lit(ADAMW, COSINE)
        fit = trainer(max_epochs=1, enable_checkpointing=True, callbacks=[keep])
        fit.fit(module, Resumable(False), ckpt_path=checkpoint)
        return module

    uninterrupted, resumed = run(None), run(tmp_path / "step=4.ckpt")
    assert all(map(torch.equal, parameters(resumed), parameters(uninterrupted)))


def test_monitor_state_survives_a_resume_with_nothing_left_to_train(
    tmp_path: Path,
) -> None:
    def run(checkpoint: Path | None) -> AdamMonitor:
        monitor = AdamMonitor(2)
        fit = trainer(max_epochs=1, logger=CSVLogger("."), callbacks=[monitor])
        fit.fit(Lit(ADAMW, COSINE), loader(BATCHES), ckpt_path=checkpoint)
        fit.save_checkpoint(tmp_path / "last.ckpt")
        return monitor

    assert run(None).state_dict() == run(tmp_path / "last.ckpt").state_dict()


def wandb_run(
    folder: Path, epochs: int, checkpoint: Path | None = None, layer_table: bool = False, **run: Any
) -> Path:
    """Trains with an offline W&B run in that folder, and returns the run's folder."""
    logger = WandbLogger(offline=True, save_dir=folder, **run)
    monitor = AdamMonitor(2, ["layer"], layer_table=layer_table)
    keep = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    fit = trainer(
        max_epochs=epochs,
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=True,
        callbacks=[monitor, keep],
    )
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*(AdamMonitor|lightning_adam|define_metric)")
        try:
            fit.fit(Lit(ADAMW, {**COSINE, "total_steps": 9}), loader(BATCHES), ckpt_path=checkpoint)
        finally:
            wandb.finish()
    (offline_run,) = offline_runs(folder)
    return offline_run


def test_resumed_run_logs_the_rows_of_layers_that_were_not_logged(
    tmp_path: Path,
) -> None:
    def rows_of(offline_run: Path) -> list[list[Any]]:
        (table,) = tables(offline_run, history(offline_run), "adam_layers")
        return table.rows

    folder = tmp_path / "uninterrupted"
    uninterrupted = rows_of(wandb_run(folder, 2, layer_table=True))
    checkpoint = folder / "epoch=0.ckpt"
    state = torch.load(checkpoint, weights_only=True)["callbacks"]["AdamMonitor"]
    assert state["layers"][1] == [row for row in uninterrupted if row[0] < BATCHES]
    assert {row[0] for row in uninterrupted} == {0, 1, 3, 5, 7, 9}
    resumed = wandb_run(tmp_path / "resumed", 2, checkpoint, layer_table=True)
    assert rows_of(resumed) == uninterrupted


def test_wandb_run_resumes_under_its_id(tmp_path: Path) -> None:
    same: Any = {"id": "abc", "resume": "allow"}
    first = wandb_run(tmp_path / "first", 1, **same)
    second = wandb_run(tmp_path / "second", 2, tmp_path / "first" / "epoch=0.ckpt", **same)
    assert [run.name.rpartition("-")[2] for run in (first, second)] == ["abc", "abc"]
    assert [[*logged_rows(run)] for run in (first, second)] == [[0, 1, 3], [5, 7, 9]]
    losses = [
        [row[GLOBAL_STEP] for row in history(run) if "loss" in row] for run in (first, second)
    ]
    assert losses == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert run_config(first) == run_config(second)
    for run in (first, second):
        metrics = [each["metric"] for each in records(run) if "metric" in each]
        (ours,) = [metric for metric in metrics if metric.get("glob_name") == "adam_*"]
        assert ours["step_metric"] == GLOBAL_STEP
