"""The clinic on the command line: the findings it prints, and whether their remedies help."""

import math
import re
import shlex
from pathlib import Path

import pytest

from tests.support.commands import BIN, REPOSITORY, Command, Finished, jobs_in, run, run_text

SUGGESTED = {
    "eps": "eps_dominates",
    "bf16_updates": "updates_lost",
    "decay_lost": "decay_lost",
    "weight_decay": "decay_dominates",
    "amsgrad": "amsgrad_frozen",
    "schedule": "schedule_exhausted",
    "bf16_stall": "exp_avg_sq_stalled",
}
"""By fault, its finding; the suggestion to type prevents the finding and lowers the loss."""
WITH_LEADS = {
    "learning_rate_small": "learning_rate_too_small",
    "learning_rate_large": "learning_rate_too_large",
    "l2": "decay_uneven",
    "not_finite": "not_finite",
}
"""Faults whose finding has leads only; the remedy, a lead or one of the config, lowers the loss."""
REMEDY_KEEPS_LOSS = {"gradient_jump": "exp_avg_sq_lags", "lost_state": "state_mismatch"}
"""Faults whose remedy prevents the finding without lowering the loss."""
FINDINGS = SUGGESTED | WITH_LEADS | REMEDY_KEEPS_LOSS
QUIET = "trainer.enable_progress_bar=false"


def clinic(folder: Path, *overrides: str) -> Finished:
    command: Command = [
        BIN / "python",
        "-m",
        "recipes.diagnostics.clinic",
        *overrides,
        QUIET,
        *jobs_in(folder),
    ]
    finished = run(command, REPOSITORY)
    assert finished.returncode == 0, finished.output
    return finished


def codes(finished: Finished) -> list[str]:
    """The findings that the recipe prints."""
    return finished.after("findings: ").split(", ")


def validation_loss(finished: Finished) -> float:
    return float(finished.after("validation loss: "))


@pytest.mark.nightly
@pytest.mark.parametrize("fault", SUGGESTED | WITH_LEADS)
def test_remedy_prevents_the_finding_and_lowers_the_loss(tmp_path: Path, fault: str) -> None:
    faulty = clinic(tmp_path / "faulty", f"fault={fault}", "compare=false")
    assert FINDINGS[fault] in codes(faulty)
    remedy = faulty.after("remedy: ")
    assert (f"use:     {remedy}" in faulty.output) == (fault in SUGGESTED)
    command = ["-m", "recipes.diagnostics.clinic", f"fault={fault}", "compare=false"]
    before = shlex.join([str(BIN / "python"), *command])
    pasted = f"{before} {remedy} {shlex.join([QUIET, *jobs_in(tmp_path / 'remedied')])}"
    remedied = run_text(pasted, REPOSITORY)
    assert remedied.returncode == 0, remedied.output
    assert codes(remedied) == ["none"]
    loss, remedied_loss = validation_loss(faulty), validation_loss(remedied)
    assert math.isfinite(remedied_loss)
    assert math.isnan(loss) or remedied_loss < loss


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("eps", marks=pytest.mark.slow),
        *(pytest.param(fault, marks=pytest.mark.nightly) for fault in REMEDY_KEEPS_LOSS),
    ],
)
def test_clinic_trains_with_the_remedy_and_compares_both_runs(tmp_path: Path, fault: str) -> None:
    shown = clinic(tmp_path, f"fault={fault}")
    assert FINDINGS[fault] in codes(shown)
    findings = next(line for line in shown.lines if line.startswith("findings  "))
    assert findings.endswith("  none")
    assert "resolved" in shown.lines
    assert len(list(tmp_path.glob("csv/version_*/metrics.csv"))) >= 2
    assert (tmp_path / "report.html").is_file()


@pytest.mark.nightly
def test_healthy_run_has_no_findings(tmp_path: Path) -> None:
    healthy = clinic(tmp_path, "fault=none")
    assert codes(healthy) == ["none"]
    assert not re.search(r"AdamMonitor: \w+ \((?:warning|error)\)", healthy.output)
    summary = "AdamMonitor: No issues found (64 measurements)"
    assert sum(line.endswith(f"] - {summary}") for line in healthy.lines) == 1


@pytest.mark.nightly
def test_overrides_apply_to_both_runs(tmp_path: Path) -> None:
    shown = clinic(tmp_path, "fault=eps", "optimizer.lr=5e-3", "trainer.max_epochs=2")
    groups = [line for line in shown.lines if line.startswith("decay ")]
    assert [re.findall(r"0\.005", line) for line in groups] == [["0.005"], ["0.005"]]
