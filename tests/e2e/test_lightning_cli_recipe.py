"""The recipe for LightningCLI: its settings, statistics and saved config file."""

import csv
from pathlib import Path

import pytest
import yaml

from tests.support.commands import BIN, REPOSITORY, Command, run

STEPS, LR = 50, 3e-3
ARGUMENTS = (
    f"--model.optimizer.lr={LR}",
    "--model.optimizer.betas=[0.9,0.95]",
    "--model.scheduler.name=cosine",
    "--model.width=4",
    "--adam_monitor.every_n_steps=1",
    "--adam_monitor.scopes=[model,group]",
    "--trainer.max_epochs=1",
    f"--trainer.limit_train_batches={STEPS}",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
)
CHANCE = 1 / 10


@pytest.mark.slow
def test_settings_of_the_command_are_used_logged_and_saved(tmp_path: Path) -> None:
    command: Command = [BIN / "python", "-m", "recipes.lightning_cli", "fit", *ARGUMENTS]
    finished = run([*command, f"--trainer.logger.init_args.save_dir={tmp_path}"], REPOSITORY)
    assert finished.returncode == 0, finished.output
    assert float(finished.after("validation accuracy: ")) > 4 * CHANCE
    (metrics,) = tmp_path.rglob("metrics.csv")
    with metrics.open(newline="") as file:
        measured = [row for row in csv.DictReader(file) if row["adam_schedule/lr"]]
    assert len(measured) == STEPS
    first, last = (float(measured[step]["adam_schedule/lr"]) for step in (0, -1))
    assert first == pytest.approx(LR)
    assert 0 < last < LR / 100
    assert all(float(row["adam_gradient/group/decay/grad_norm"]) > 0 for row in measured)
    kept = yaml.safe_load((metrics.parent / "config.yaml").read_text(encoding="utf-8"))
    assert kept["model"]["optimizer"]["betas"] == [0.9, 0.95]
