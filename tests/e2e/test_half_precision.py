"""The recipe of half precision: its table of findings, and the losses with their suggestions."""

import math
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.commands import BIN, REPOSITORY, Command, Finished, jobs_in, run

NO_EPS = "trainer.precision=16-true by_torch=true"
SMALL_EPS = "trainer.precision=16-true optimizer.eps=1e-6"
SMALL_STEPS = "trainer.precision=bf16-true optimizer.lr=5e-5"
MIXED = "+ trainer.precision=bf16-mixed"
# Without a GPU Lightning uses bf16-mixed instead.
MIXED_16 = "+ trainer.precision=16-mixed"
BRIEFLY = (
    "trainer.max_epochs=2",
    "trainer.enable_progress_bar=false",
)


class Row(NamedTuple):
    """A row of the printed table."""

    precision: str
    eps: str
    beta2: str
    notices: str
    findings: str
    loss: str
    overrides: str


def table(finished: Finished) -> list[Row]:
    """The rows, without the head."""
    (head,) = [index for index, line in enumerate(finished.lines) if line.startswith("precision  ")]
    lines = [re.split(r" {2,}", line) for line in finished.lines[head + 1 : -1]]
    return [Row(*line) for line in lines]


def train(folder: Path, *cases: str) -> list[Row]:
    """Runs the recipe, and checks that the monitor has printed each suggestion that it tries."""
    quoted = f"cases={list(cases)}".replace("'", '"')
    command: Command = [BIN / "python", "-m", "recipes.diagnostics.half_precision", quoted]
    finished = run([*command, *BRIEFLY, *jobs_in(folder)], REPOSITORY)
    assert finished.returncode == 0, finished.output
    rows = table(finished)
    printed = {
        shlex.join(shlex.split(each))
        for each in re.findall(r"^  (?:use|try): +(.*?)(?:  \(.*)?$", finished.output, re.M)
    }
    tried = {row.overrides.removeprefix("+ ") for row in rows if row.overrides.startswith("+ ")}
    assert tried <= printed
    assert len(list(folder.glob("csv/version_*/metrics.csv"))) == len(rows)
    return rows


@pytest.mark.slow
def test_vanishing_eps_is_noticed_before_training_and_both_suggestions_train(
    tmp_path: Path,
) -> None:
    rows = train(tmp_path, NO_EPS)
    assert [row.overrides for row in rows] == [NO_EPS, MIXED_16, "+ optimizer.eps=0.0001"]
    vanished, mixed, larger_eps = rows
    assert (vanished.precision, vanished.eps) == ("16-true", "1e-08")
    assert vanished.notices == "eps_vanishes"
    assert math.isnan(float(vanished.loss))
    assert (mixed.notices, mixed.findings) == ("none", "none")
    assert math.isfinite(float(mixed.loss))
    # It trains although v is 0, so it is the second suggestion, a lead.
    assert (larger_eps.precision, larger_eps.eps) == ("16-true", "0.0001")
    assert larger_eps.findings == "exp_avg_sq_underflow"


@pytest.mark.nightly
def test_suggestions_against_underflow_and_lost_updates_lower_the_loss(tmp_path: Path) -> None:
    rows = train(tmp_path, SMALL_EPS, SMALL_STEPS)
    mixed_eps = f"{MIXED_16} optimizer.eps=1e-08"
    assert [row.overrides for row in rows] == [SMALL_EPS, mixed_eps, SMALL_STEPS, MIXED]
    assert_resolved(rows[0], rows[1], "exp_avg_sq_underflow")
    assert_resolved(rows[2], rows[3], "updates_lost")
    assert rows[2].notices == "exp_avg_sq_cannot_decay"


def assert_resolved(before: Row, after: Row, code: str) -> None:
    assert code in before.findings.split(", ")
    assert (after.notices, after.findings) == ("none", "none")
    assert float(after.loss) < 0.99 * float(before.loss)
