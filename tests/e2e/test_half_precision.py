"""The recipe of half precision as it is typed: what its table says is found, and what cures it."""

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
CASES = (NO_EPS, SMALL_EPS, SMALL_STEPS)
MIXED = "+ trainer.precision=bf16-mixed"
# Lightning makes bf16-mixed of it where there is no GPU.
MIXED_16 = "+ trainer.precision=16-mixed"
BRIEFLY = (
    "trainer.max_epochs=2",
    "+trainer.enable_progress_bar=false",
)


class Row(NamedTuple):
    """A line of the table."""

    precision: str
    eps: str
    beta2: str
    foreseen: str
    found: str
    loss: str
    typed: str


def table(finished: Finished) -> list[Row]:
    """The trainings, without the head."""
    (head,) = [index for index, line in enumerate(finished.lines) if line.startswith("precision  ")]
    lines = [re.split(r" {2,}", line) for line in finished.lines[head + 1 : -1]]
    return [Row(*line) for line in lines]


@pytest.mark.slow
def test_what_is_found_is_printed_with_the_cures_and_their_losses(tmp_path: Path) -> None:
    cases = f"cases={list(CASES)}".replace("'", '"')
    command: Command = [BIN / "python", "-m", "recipes.half_precision", cases, *BRIEFLY]
    finished = run([*command, *jobs_in(tmp_path)], REPOSITORY)
    assert finished.returncode == 0, finished.output
    rows = table(finished)
    small_eps_cure = f"{MIXED_16} optimizer.eps=1e-08"
    typed = [NO_EPS, MIXED_16, "+ optimizer.eps=0.0001", SMALL_EPS, small_eps_cure]
    assert [each.typed for each in rows] == [*typed, SMALL_STEPS, MIXED]
    assert_a_vanished_eps_is_foreseen(*rows[:3])
    assert_cured(rows[3], rows[4], "exp_avg_sq_underflow")
    assert_cured(rows[5], rows[6], "updates_lost")
    assert rows[5].foreseen == "exp_avg_sq_stalled"
    assert_told_by_the_monitor(finished, rows)
    assert len(list(tmp_path.glob("csv/version_*/metrics.csv"))) == len(rows)


def assert_a_vanished_eps_is_foreseen(ill: Row, mixed: Row, larger_eps: Row) -> None:
    assert (ill.precision, ill.eps, ill.foreseen) == ("16-true", "1e-08", "eps_vanishes")
    assert math.isnan(float(ill.loss))
    assert (mixed.foreseen, mixed.found) == ("nothing", "nothing")
    assert math.isfinite(float(mixed.loss))
    # It trains, and v is 0 all the same: the second cure is the lesser one.
    assert (larger_eps.precision, larger_eps.eps) == ("16-true", "0.0001")
    assert larger_eps.found == "exp_avg_sq_underflow"


def assert_cured(ill: Row, healed: Row, code: str) -> None:
    assert code in ill.found.split(", ")
    assert (healed.foreseen, healed.found) == ("nothing", "nothing")
    assert float(healed.loss) < 0.99 * float(ill.loss)


def assert_told_by_the_monitor(finished: Finished, rows: list[Row]) -> None:
    """The cures are those of the findings as the monitor has printed them."""
    told = {line.partition("type:")[2].partition("  (")[0].strip() for line in finished.lines}
    for row in rows:
        if row.typed.startswith("+ "):
            assert row.typed.removeprefix("+ ") in {shlex.join(shlex.split(each)) for each in told}
