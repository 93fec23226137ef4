"""A run that is killed and goes on from its last checkpoint is the run that was not killed."""

import functools
import json
import random
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
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

TIMES = 5
"""Random times that each kind of run is killed at, one in each part of the run."""
PATIENCE = 120
"""Seconds."""
BATCHES = 5
"""Of the runs that are not killed."""

Whole = Callable[[str], "Run"]

processes = forkserver.context()


@dataclass(frozen=True)
class Run:
    """What a training left, over all of its processes."""

    state: dict[str, str]
    """Of the module, the optimizer, the schedule, the scaler, the monitor and the trainer."""
    rows: list[str]
    began_at: list[int]
    """The optimizer steps that each process began after."""
    counts: dict[str, int]
    """How often the last process came to each place."""
    seconds: float


def trained(
    kind: str, folder: Path, moment: Moment | None = None, seconds: float | None = None
) -> float:
    """Trains in a process that is killed at a moment, after some seconds, or not at all.

    Returns:
        How long it took.
    """
    folder.mkdir(exist_ok=True)
    ready, child = processes.Pipe(duplex=False)
    arguments = (kind, folder, moment, child, seconds is not None)
    process = processes.Process(target=train, args=arguments, daemon=True)
    process.start()
    child.close()
    with suppress(EOFError):
        ready.recv()
    begin = time.monotonic()
    if seconds is not None:
        time.sleep(seconds)
        process.kill()
    process.join(PATIENCE)
    is_undisturbed = moment is None and seconds is None
    expected = 0 if is_undisturbed else -signal.SIGKILL
    assert process.exitcode == expected, (folder / "output.txt").read_text(encoding="utf-8")
    return time.monotonic() - begin


def finished(kind: str, folder: Path) -> Run:
    """Trains from the last checkpoint of a folder to the end."""
    seconds = trained(kind, folder)
    rows: list[str] = []
    began_at = []
    for path in sorted(folder.glob("*.rows")):
        first, *own = path.read_text(encoding="utf-8").splitlines()
        began_at.append(int(first))
        rows = [row for row in rows if step_of(row) < began_at[-1]] + own
    counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return Run(state, rows, began_at, counts, seconds)


def step_of(row: str) -> int:
    return int(json.loads(row)[0])


def check(kind: str, folder: Path, whole: Run) -> None:
    """The rest of a run that was killed makes it the whole one."""
    run = finished(kind, folder)
    assert run.state == whole.state
    # Lightning logs a batch's loss after the checkpoint that it writes at the batch's end: it is
    # lost to a run that is killed in between.
    late = [
        row
        for row in whole.rows
        if KINDS[kind].is_resumable and step_of(row) + 1 in run.began_at and '"loss"' in row
    ]
    assert run.rows == [row for row in whole.rows if row in run.rows or row not in late]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The run of a kind that is not disturbed."""
    return functools.cache(lambda kind: finished(kind, tmp_path_factory.mktemp("whole")))


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_a_place_goes_on_as_if_it_had_not_been(
    kind: str, place: str, whole: Whole, tmp_path: Path
) -> None:
    occurrence = random.Random(kind + place).randint(1, whole(kind).counts[place])
    trained(kind, tmp_path, Moment(place, occurrence))
    check(kind, tmp_path, whole(kind))


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(TIMES))
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_a_random_time_goes_on_as_if_it_had_not_been(
    kind: str, part: int, whole: Whole, tmp_path: Path
) -> None:
    share = (part + random.Random(kind + str(part)).random()) / TIMES
    trained(kind, tmp_path, seconds=share * whole(kind).seconds)
    check(kind, tmp_path, whole(kind))


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_again_and_again_comes_to_its_end(
    kind: str, whole: Whole, tmp_path: Path
) -> None:
    generator = random.Random(kind)
    for _ in range(TIMES):
        trained(kind, tmp_path, seconds=generator.random() * whole(kind).seconds)
    check(kind, tmp_path, whole(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].is_half])
def test_the_runs_in_fp16_skip_steps_before_the_last_that_is_measured(
    kind: str, whole: Whole
) -> None:
    rows = [json.loads(row)[1] for row in whole(kind).rows]
    skipped = [
        row["adam_schedule/skipped_steps"] for row in rows if "adam_moments/grad_norm" in row
    ]
    assert len({*skipped}) > 2


def test_a_loader_that_knows_its_place_goes_on_from_there(tmp_path: Path) -> None:
    def fitted(checkpoint: Path | None) -> Lit:
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        module = Lit(ADAMW, COSINE)
        fit = trainer(max_epochs=1, enable_checkpointing=True, callbacks=[keep])
        fit.fit(module, Resumable(False), ckpt_path=checkpoint)
        return module

    whole, rest = fitted(None), fitted(tmp_path / "step=4.ckpt")
    assert all(map(torch.equal, parameters(rest), parameters(whole)))


def test_where_nothing_is_left_to_train_the_monitor_keeps_what_the_checkpoint_kept(
    tmp_path: Path,
) -> None:
    def fitted(checkpoint: Path | None) -> AdamMonitor:
        monitor = AdamMonitor(2)
        fit = trainer(max_epochs=1, logger=CSVLogger("."), callbacks=[monitor])
        fit.fit(Lit(ADAMW, COSINE), loader(BATCHES), ckpt_path=checkpoint)
        fit.save_checkpoint(tmp_path / "last.ckpt")
        return monitor

    assert fitted(None).state_dict() == fitted(tmp_path / "last.ckpt").state_dict()


def resumed(
    folder: Path, epochs: int, checkpoint: Path | None = None, layer_table: bool = False, **run: Any
) -> Path:
    """A training with a W&B run of its own in that folder."""
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


def test_rows_of_the_layers_that_were_not_sent_are_sent_by_the_run_that_goes_on(
    tmp_path: Path,
) -> None:
    def sent(offline_run: Path) -> list[list[Any]]:
        (table,) = tables(offline_run, history(offline_run), "adam_layers")
        return table.rows

    whole = sent(resumed(tmp_path / "whole", 2, layer_table=True))
    checkpoint = tmp_path / "whole" / "epoch=0.ckpt"
    state = torch.load(checkpoint, weights_only=True)["callbacks"]["AdamMonitor"]
    assert state["layers"][1] == [row for row in whole if row[0] < BATCHES]
    assert {row[0] for row in whole} == {0, 1, 3, 5, 7, 9}
    assert sent(resumed(tmp_path / "rest", 2, checkpoint, layer_table=True)) == whole


def test_a_wandb_run_goes_on_under_its_id(tmp_path: Path) -> None:
    same: Any = {"id": "abc", "resume": "allow"}
    first = resumed(tmp_path / "first", 1, **same)
    second = resumed(tmp_path / "second", 2, tmp_path / "first" / "epoch=0.ckpt", **same)
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
