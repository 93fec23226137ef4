"""The recipe that is a folder to copy: it trains in any place, and its Adam can be tuned."""

import shutil
from pathlib import Path

import pytest

from tests.support.commands import (
    BIN,
    REPOSITORY,
    Finished,
    logged_rows,
    offline_runs,
    run,
    run_config,
)

CHANCE = 1 / 10


def train(folder: Path, *overrides: str) -> Finished:
    """Runs the project's command in a copy of the project, in a fresh Python process."""
    shutil.copytree(REPOSITORY / "recipes" / "bring_your_own", folder / "mine")
    finished = run([BIN / "python", "train.py", *overrides], folder / "mine", cold=True)
    assert finished.returncode == 0, finished.output
    return finished


GROUPS = "adam_monitor.scopes=[model,group]"


@pytest.mark.slow
def test_copy_of_the_folder_trains_with_overrides(tmp_path: Path) -> None:
    finished = train(tmp_path, "optimizer.lr=3e-3", "max_epochs=3", GROUPS)
    assert float(finished.after("validation accuracy: ")) > 8 * CHANCE
    (offline_run,) = offline_runs(tmp_path)
    assert run_config(offline_run)["optimizer"]["lr"] == 3e-3
    rows = logged_rows(offline_run)
    assert list(rows) == [0, *range(9, 3 * 44, 10)]
    assert all(row["adam_gradient/group/decay/grad_norm"] > 0 for row in rows.values())


@pytest.mark.nightly
def test_adam_is_tuned_in_a_copy_of_the_folder(tmp_path: Path) -> None:
    search = ("-m", "hydra/sweeper=adam_tune", "hydra.sweeper.direction=minimize")
    tuned = train(tmp_path, *search, "hydra.sweeper.n_trials=4", "max_epochs=2")
    assert "worth 4 of 4 full runs" in tuned.output
    assert "optimizer.lr=" in tuned.after("overrides: ")
