"""Each planted fault raises its finding; no control and no healthy training raises one.

The trainings are those of `python -m benchmarks.findings`.
"""

from collections.abc import Iterator

import pytest
import torch

from benchmarks.findings import conclusion, table
from benchmarks.planted_faults import (
    MADE_UP,
    RUNS,
    TRAINED_ILL,
    TRAINED_WELL,
    Run,
    Verdict,
    fault,
    synthetic,
    watched,
)
from lightning_adam.findings import RULES

FORESEEN = {"eps_vanishes", "parameters_left_out", "warmup_short", "decay_timescale"}
"""Rules that are judged before the first step: see test_preflight.py."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cases(runs: list[Run]) -> list[object]:
    return [pytest.param(run, id=run.name) for run in runs]


def assert_holds(run: Run) -> None:
    verdict = watched(run)
    assert verdict.holds, "\n".join(conclusion([verdict]))


@pytest.mark.parametrize("run", cases(MADE_UP))
def test_gradients_that_are_made_up(run: Run) -> None:
    assert_holds(run)


@pytest.mark.nightly
@pytest.mark.parametrize("run", cases([*TRAINED_ILL, *TRAINED_WELL]))
def test_trainings(run: Run) -> None:
    assert_holds(run)


def test_each_rule_has_a_fault_and_each_run_a_name_of_its_own() -> None:
    planted = {code for run in RUNS for code in run.faults}
    assert planted == RULES.keys() - FORESEEN
    assert len({run.name for run in RUNS}) == len(RUNS)


def test_the_table_shows_what_was_missed_and_what_was_wrong() -> None:
    run = fault("eps", "updates_lost", lambda: synthetic(lambda step, noise: 1e-9 * noise))
    verdict = watched(run)
    *_, row = table([verdict]).splitlines()
    assert row.split() == ["eps", "E", "45!", "missed"]
    wrong, missed = sorted(conclusion([verdict]), key=len, reverse=True)
    assert missed == "eps: expected updates_lost, not raised"
    assert wrong.startswith("eps: eps_dominates of the model at step 45 was not expected (eps_")


def test_a_table_of_what_holds_says_so() -> None:
    verdict = Verdict(Run("noise", synthetic), [])
    assert table([verdict]) == "noise"
    assert conclusion([verdict]) == [
        "every fault raised its finding, no control and no healthy run raised one"
    ]
