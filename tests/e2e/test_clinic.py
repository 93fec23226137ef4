"""The clinic as it is typed: what is found, and whether what it says to type heals."""

import math
import re
import shlex
from pathlib import Path

import pytest

from tests.support.commands import BIN, REPOSITORY, Command, Finished, jobs_in, run, run_text

HEALED = {
    "eps": "eps_dominates",
    "bf16_updates": "updates_lost",
    "decay_lost": "decay_lost",
    "learning_rate_small": "learning_rate_too_small",
    "learning_rate_large": "learning_rate_too_large",
    "weight_decay": "decay_dominates",
    "l2": "decay_uneven",
    "amsgrad": "amsgrad_frozen",
    "schedule": "schedule_exhausted",
    "not_finite": "not_finite",
    "bf16_stall": "exp_avg_sq_stalled",
}
"""Pathologies that what is printed heals, and the findings that tell of them."""
NO_BETTER = {"gradient_jump": "exp_avg_sq_lags", "lost_state": "state_mismatch"}
"""Those that are healed too, without a loss that tells."""
QUIET = "+trainer.enable_progress_bar=false"


def clinic(folder: Path, *overrides: str) -> Finished:
    command: Command = [BIN / "python", "-m", "recipes.clinic", *overrides, QUIET, *jobs_in(folder)]
    finished = run(command, REPOSITORY)
    assert finished.returncode == 0, finished.output
    return finished


def codes(finished: Finished) -> set[str]:
    """What the monitor itself has told."""
    return set(re.findall(r"AdamMonitor: (\w+) \((?:warning|error)\)", finished.output))


def validation_loss(finished: Finished) -> float:
    return float(finished.after("validation loss: "))


@pytest.mark.nightly
@pytest.mark.parametrize("fault", HEALED)
def test_what_is_printed_heals_when_it_is_pasted(tmp_path: Path, fault: str) -> None:
    ill = clinic(tmp_path / "ill", f"fault={fault}", "heal=false")
    assert HEALED[fault] in codes(ill)
    remedy = ill.after("to type: ")
    assert f"type:    {remedy}" in ill.output
    command = ["-m", "recipes.clinic", f"fault={fault}", "heal=false"]
    before = shlex.join([str(BIN / "python"), *command])
    pasted = f"{before} {remedy} {shlex.join([QUIET, *jobs_in(tmp_path / 'well')])}"
    well = run_text(pasted, REPOSITORY)
    assert well.returncode == 0, well.output
    assert HEALED[fault] not in codes(well)
    loss, healed_loss = validation_loss(ill), validation_loss(well)
    assert math.isfinite(healed_loss)
    assert math.isnan(loss) or healed_loss < loss


@pytest.mark.nightly
@pytest.mark.parametrize("fault", [*NO_BETTER, "eps"])
def test_the_clinic_heals_by_itself_and_shows_both(tmp_path: Path, fault: str) -> None:
    shown = clinic(tmp_path, f"fault={fault}")
    assert (NO_BETTER | HEALED)[fault] in codes(shown)
    findings = next(line for line in shown.lines if line.startswith("findings  "))
    assert findings.endswith("  none")
    assert "healed" in shown.lines
    assert len(list(tmp_path.glob("csv/version_*/metrics.csv"))) >= 2
    assert (tmp_path / "report.html").is_file()


@pytest.mark.nightly
def test_nothing_is_found_in_health(tmp_path: Path) -> None:
    well = clinic(tmp_path, "fault=none")
    assert not codes(well)
    assert "nothing to heal" in well.lines
    assert "AdamMonitor has found nothing wrong in 64 measurements." in well.lines


@pytest.mark.nightly
def test_what_is_typed_counts_in_both_trainings(tmp_path: Path) -> None:
    shown = clinic(tmp_path, "fault=eps", "optimizer.lr=5e-3", "trainer.max_epochs=2")
    groups = [line for line in shown.lines if line.startswith("decay ")]
    assert [re.findall(r"0\.005", line) for line in groups] == [["0.005"], ["0.005"]]
