"""Each planted fault raises its finding; no control and no healthy training run raises one.

The runs are those of `python -m benchmarks.findings`.
"""

from collections.abc import Iterable

import pytest

from benchmarks.findings import BY_NAME, conclusion, table
from benchmarks.healthy_runs import HEALTHY
from benchmarks.planted_faults import (
    FAULTY_TRAINING_RUNS,
    HEALTHY_TRAINING_RUNS,
    RUNS,
    SYNTHETIC,
    Run,
    Verdict,
    fault,
    judge,
    synthetic,
)
from lightning_adam.config.monitor import Severity
from lightning_adam.findings import RULES
from tests.support.tables import each_row

NEEDS_A_LOSS = {"learning_rate_too_small", "learning_rate_too_large", "loss_spike"}
"""Rules whose faults are only planted in training runs."""

FAULT_AND_CONTROL = {
    "eps_dominates": ("eps 1e-8, gradients 1e-8", "eps 1e-8, gradients 1e-5"),
    "exp_avg_sq_underflow": ("float16, eps 1e-4", "float16, eps 1e-4, gradients 1, weights .1"),
    "exp_avg_sq_stalled": (
        "bfloat16, gradients fall, beta2 .999",
        "bfloat16, gradients fall slowly, beta2 .95",
    ),
    "updates_lost": ("bfloat16, lr 1e-4, weights .02", "bfloat16, lr 1e-3, weights .02"),
    "exp_avg_sq_lags": ("one gradient x 10", "one gradient x 2"),
    "exp_avg_sq_collapse": ("gradients / 100, beta2 .999", "gradients x 1, beta2 .999"),
    "decay_lost": ("bfloat16, decay .1, lr 1e-3", "float32, decay .1, lr 1e-3"),
    "correlated_updates": ("gradients that repeat, rho .99", "gradients that do not repeat"),
    "amsgrad_frozen": ("AMSGrad, one gradient x 1000", "AMSGrad"),
    "decay_dominates": (
        "decay .1, lr 1e-2, weights 1, to equilibrium",
        "decay .1, lr 1e-2, weights .02, to equilibrium",
    ),
    "grad_spike": (
        "one layer's gradient x 30 once, beta2 .8",
        "one layer's gradient x 2 once, beta2 .8",
    ),
    "rotation_uneven": (
        "decay .1, lr 1e-2 and 1e-4, past the timescale",
        "decay .1, lr 1e-2 twice",
    ),
    "weights_grow": ("weights .01, lr 2e-3, no decay", "decay 0, lr 1e-3"),
    "decay_uneven": ("L2 .01, gradients 1e-3 to 10", "decoupled .01, gradients 1e-3 to 10"),
    "state_mismatch": ("resumed without steps", "resumed"),
    "not_finite": ("one layer's gradients are infinite", "gradients 1e-3 to 1 over layers"),
    "schedule_exhausted": ("a schedule of half the training", "a cosine to 0"),
}
"""By rule: the names of a run with the fault and of a similar healthy run.

These run by default, the other synthetic runs in CI.
"""

TRAINING_RUNS_IN_CI = {
    "MLP, lr 1e-6",
    "MLP, lr 1e-1",
    "MLP, decay 30",
    "MLP, eps 1e-1",
    "MLP, inputs x 20 from step 400",
    "MLP, inputs inverted for 20 steps",
    "MLP, bfloat16, lr 1e-5",
    "MLP, resumed without moments",
    "MLP, L2 1e-2, pixels x .01",
    "GPT, bfloat16, lr 3e-3, decay .1",
    "MLP, lr 1e-2, warm-up and cosine",
    "MLP, batches of 1",
    "digits MLP, all images in one batch",
    "logistic regression from 0",
    "GPT, lr 1e-3, beta2 .95, decay .1, clip 1",
    "fine-tuned MLP, lr 1e-5, beta2 .999, warm-up, batch 512",
    "DiT, adaLN-zero, lr 1e-3, beta2 .95, start of a warm-up of 2,000 steps",
    "ViT, lr 5e-4, beta2 .95, decay .05",
    "U-Net, Adam, lr 2e-4, beta2 .999",
    "GAN on Gaussians, generator, lr 2e-4, betas .5, .999",
    "GAN on digits, discriminator, lr 1e-3, betas 0, .99",
    "gridworld, actor-critic, Adam, lr 2.5e-3, beta2 .99, linear decay",
    "BatchNorm CNN, Adam, lr 1e-3, beta2 .99, warm-up, L2 5e-4",
    "tied GPT, lr 1e-3, beta2 .999, clip 1",
    "LSTM, lr 3e-3, beta2 .99, warm-up, decay .01, clip 1",
}
"""Training runs in CI; the others run nightly."""

HEALTHY_BY_DEFAULT = (
    "ReZero MLP, lr 1e-3, beta2 .999",
    "bandit, REINFORCE, Adam, lr 3e-3, beta2 .999",
    "recommender, Adam, lr 3e-3, beta2 .999",
    "word2vec, Adam, lr 1e-3, beta2 .999",
    "BatchNorm CNN, Adam, lr 1e-3, beta2 .95, L2 5e-4",
)
"""Healthy training runs that take one or two seconds."""


def assert_holds(run: Run) -> Verdict:
    verdict = judge(run)
    assert verdict.holds, "\n".join(conclusion([verdict]))
    return verdict


def params(runs: Iterable[Run], *more: pytest.MarkDecorator) -> list[object]:
    return [pytest.param(run, id=run.name, marks=more) for run in runs]


def test_each_rule_finds_its_fault_and_is_silent_in_a_control() -> None:
    with each_row() as row:
        for code, (faulty, healthy) in FAULT_AND_CONTROL.items():
            with row(code):
                assert code in BY_NAME[faulty].faults
                assert not BY_NAME[healthy].faults
                assert_holds(BY_NAME[faulty])
                found = {each.code for each in assert_holds(BY_NAME[healthy]).findings}
                # A control may raise info findings, but not of the rule under test.
                assert RULES[code].severity is not Severity.info or code not in found


def test_sample_of_healthy_training_runs_raises_nothing_above_info() -> None:
    with each_row() as row:
        for name in HEALTHY_BY_DEFAULT:
            with row(name):
                assert_holds(BY_NAME[name])


IN_DEFAULT = {*HEALTHY_BY_DEFAULT} | {
    name for names in FAULT_AND_CONTROL.values() for name in names
}
TRAINING_RUNS = [
    run
    for run in (*FAULTY_TRAINING_RUNS, *HEALTHY_TRAINING_RUNS, *HEALTHY)
    if run.name not in IN_DEFAULT
]


@pytest.mark.slow
@pytest.mark.parametrize("run", params(run for run in SYNTHETIC if run.name not in IN_DEFAULT))
def test_synthetic_gradients(run: Run) -> None:
    assert_holds(run)


@pytest.mark.parametrize(
    "run",
    [
        *params(
            (run for run in TRAINING_RUNS if run.name in TRAINING_RUNS_IN_CI), pytest.mark.slow
        ),
        *params(
            (run for run in TRAINING_RUNS if run.name not in TRAINING_RUNS_IN_CI),
            pytest.mark.nightly,
        ),
    ],
)
def test_training_runs(run: Run) -> None:
    assert_holds(run)


def test_tables_cover_all_rules_and_runs() -> None:
    assert {code for run in RUNS for code in run.faults} == RULES.keys()
    assert FAULT_AND_CONTROL.keys() == RULES.keys() - NEEDS_A_LOSS
    assert len(BY_NAME) == len(RUNS) + len(HEALTHY)
    assert {run.name for run in TRAINING_RUNS} >= TRAINING_RUNS_IN_CI
    in_ci = {code for name in TRAINING_RUNS_IN_CI for code in BY_NAME[name].faults}
    assert in_ci >= NEEDS_A_LOSS


def test_printed_table_shows_missed_and_wrong_findings() -> None:
    run = fault("eps", "updates_lost", lambda: synthetic(lambda step, noise: 1e-9 * noise))
    verdict = judge(run)
    *_, row = table([verdict]).splitlines()
    assert row.split() == ["eps", "E", "45!", "missed"]
    wrong, missed = sorted(conclusion([verdict]), key=len, reverse=True)
    assert missed == "eps: expected updates_lost, not raised"
    assert wrong.startswith("eps: eps_dominates of the model at step 45 was not expected (eps_")


def test_conclusion_says_that_all_runs_hold() -> None:
    verdict = Verdict(Run("noise", synthetic), [])
    assert table([verdict]) == "noise"
    assert conclusion([verdict]) == [
        "every fault raised its finding, no control and no healthy run raised one"
    ]
