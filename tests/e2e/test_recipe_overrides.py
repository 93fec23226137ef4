"""Overrides that a user may try work in the recipes, or fail before training with a clear error."""

import shlex
from pathlib import Path

import pytest

from tests.support.commands import BIN, Command, Finished, jobs_in, run
from tests.support.tables import each_row

SMALL = {
    "mnist": "width=2",
    "char_gpt": "layers=1 width=16 heads=2 context=16 sample.length=9 trainer.limit_val_batches=1",
    "gan": "width=2",
    "diagnostics.clinic": "width=8",
}
BRIEFLY = "trainer.max_epochs=1 trainer.limit_train_batches=5 trainer.enable_progress_bar=false"
WORKING = {
    "mnist trainer.max_steps=3 batch_size=100000 logger=csv": "validation accuracy: 0.",
    "mnist trainer.limit_val_batches=0 ~logger ~adam_monitor": "validation accuracy: not measured",
    "char_gpt trainer.fast_dev_run=3 seed=null ~scheduler": "validation bits per byte: ",
    "gan trainer.precision=bf16-true logger=tensorboard": "recognized generated digits: 0.",
    "diagnostics.clinic fault=lost_state trainer.max_steps=3": "findings: ",
}
"""Overrides, and how a line of their output begins."""
FAILING = {
    "mnist ckpt_path=none.ckpt": "FileNotFoundError: Checkpoint file not found: ",
    "mnist trainer.max_epochs=-1": "scheduler.name=cosine needs the number of optimizer steps",
}
"""Overrides, and how the line of their error begins."""


def recipe(line: str, folder: Path) -> Finished:
    name, *overrides = shlex.split(line)
    small = f"{SMALL[name]} {BRIEFLY}".split()
    command: Command = [BIN / "python", "-m", f"recipes.{name}", *small, *overrides]
    return run([*command, *jobs_in(folder)])


@pytest.mark.slow
def test_overrides_work_or_fail_before_training(tmp_path: Path) -> None:
    with each_row() as row:
        for number, (line, beginning) in enumerate((WORKING | FAILING).items()):
            with row(line):
                finished = recipe(line, tmp_path / str(number))
                assert finished.returncode == (line in FAILING), finished.output
                assert any(each.startswith(beginning) for each in finished.lines), finished.output
                assert line in WORKING or "Epoch 0" not in finished.output


@pytest.mark.slow
def test_finished_run_is_resumed_for_no_and_for_more_epochs(tmp_path: Path) -> None:
    first = recipe("mnist logger=csv", tmp_path / "first")
    for epochs, report in ((1, "report: not written. "), (2, "report: ")):
        resume = f"ckpt_path={tmp_path}/first/checkpoints/last.ckpt trainer.max_epochs={epochs}"
        resumed = recipe(f"mnist logger=csv {resume}", tmp_path / str(epochs))
        assert resumed.returncode == 0, resumed.output
        assert any(line.startswith(report) for line in resumed.lines), resumed.output
        if epochs == 1:
            beginning = "validation accuracy: "
            assert resumed.after(beginning) == first.after(beginning)
