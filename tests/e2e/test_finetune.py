"""The recipe for fine-tuning: its gain, and the learning rate and first step of each block."""

import csv
from pathlib import Path

import pytest

from tests.support.commands import BIN, REPOSITORY, Command, jobs_in, run

BATCHES, EPOCHS, EVERY_N_EPOCHS = 2, 12, 3
BRIEFLY = (
    "width=8",
    "images=20",
    f"unfreeze_every_n_epochs={EVERY_N_EPOCHS}",
    "adam_monitor.every_n_steps=1",
    f"trainer.max_epochs={EPOCHS}",
    "trainer.log_every_n_steps=1",
    "+trainer.enable_progress_bar=false",
    "pretraining.trainer.max_epochs=1",
    "+pretraining.trainer.enable_progress_bar=false",
    "logger=csv",
)
LR = 2e-3
SHARES = {"head": 5.0, "layer_3": 0.5, "layer_2": 0.25, "group_6": 0.125, "group_8": 0.0625}
"""Multiples of the learning rate: the head, and the blocks from the upper to the lower."""
JOINS = {"group_6": EVERY_N_EPOCHS * BATCHES, "group_8": 2 * EVERY_N_EPOCHS * BATCHES}
"""The steps at which the frozen blocks join."""
CHANCE = 1 / 10


@pytest.mark.slow
def test_frozen_blocks_join_with_decayed_rates_and_pretraining_helps(tmp_path: Path) -> None:
    command: Command = [BIN / "python", "-m", "recipes.finetune", *BRIEFLY, *jobs_in(tmp_path)]
    finished = run(command, REPOSITORY)
    assert finished.returncode == 0, finished.output
    from_scratch = float(finished.after("from scratch: "))
    layer_by_layer = float(finished.after("fine-tuned layer by layer: "))
    assert layer_by_layer > max(3 * CHANCE, from_scratch)
    assert_rates(tmp_path)
    assert (tmp_path / "report.html").exists()


def assert_rates(folder: Path) -> None:
    """Each group follows its multiple of a cosine, from the step at which it joins."""
    (metrics,) = folder.rglob("metrics.csv")
    with metrics.open(newline="") as file:
        measured = [row for row in csv.DictReader(file) if row["adam_schedule/group/head/lr"]]
    assert [int(row["step"]) for row in measured] == list(range(EPOCHS * BATCHES))
    for row in measured:
        step = int(row["step"])
        head = float(row["adam_schedule/group/head/lr"])
        for name, share in SHARES.items():
            for group in (name, f"{name}_no_decay"):
                rate = row[f"adam_schedule/group/{group}/lr"]
                if step < JOINS.get(name, 0):
                    assert rate == ""
                else:
                    assert float(rate) == pytest.approx(head * share / SHARES["head"])
    assert float(measured[0]["adam_schedule/group/head/lr"]) == pytest.approx(LR * SHARES["head"])
