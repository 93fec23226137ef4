"""The declarations of the rules, their conditions and their settings."""

import string

import pytest

from lightning_adam.cli import main
from lightning_adam.config.errors import ConfigError
from lightning_adam.config.monitor import Severity
from lightning_adam.findings import RULES
from lightning_adam.findings.context import History, RunFacts
from lightning_adam.findings.context import RunningSummary as Summary
from lightning_adam.findings.describe import format_condition
from lightning_adam.monitor.settings import monitor_config
from lightning_adam.statistics.catalogue import STATISTICS
from tests.support.tables import each_row


def test_explain_prints_the_whole_declaration_of_each_rule(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with each_row() as row:
        for code, rule in RULES.items():
            with row(code):
                assert rule.meaning.endswith(".")
                assert rule.source
                assert {*rule.suppressed_by} <= RULES.keys() - {code}
                assert rule.suggest.__doc__
                main(["explain", code])
                printed = " ".join(capsys.readouterr().out.split())
                assert "@rule" not in printed
                assert "suggest=" not in printed
                expected = [
                    rule.meaning,
                    " ".join(rule.source.split()),
                    f"Raised when {format_condition(rule)}",
                    *(STATISTICS[name].formula for name in rule.statistics),
                    *(
                        f"adam_monitor.findings.{code}.{name}={value}"
                        for name, value in rule.thresholds.items()
                    ),
                ]
                assert [each for each in expected if each not in printed] == []


def test_condition_in_words_names_every_threshold() -> None:
    with each_row() as row:
        for code, rule in RULES.items():
            with row(code):
                named = {name for _, name, _, _ in string.Formatter().parse(rule.when) if name}
                assert named == rule.thresholds.keys()
                assert rule.when
                assert not rule.when.endswith(".")


def test_limits_are_thresholds_of_statistics_in_the_condition() -> None:
    with each_row() as row:
        for code, rule in RULES.items():
            with row(code):
                assert rule.limits.keys() <= {*rule.statistics}
                assert {*rule.limits.values()} <= rule.thresholds.keys()


# ---- Conditions


def test_too_large_updates_are_found_whether_or_not_the_first_gradient_is_zero() -> None:
    condition, run = RULES["learning_rate_too_large"].condition, RunFacts()
    for first in (0.0, 1.0):
        history = History(
            {
                "grad_zero_fraction": Summary(first, 0.1, first, 0.1, first),
                "update_to_weight": Summary(0.0, 0.5, 0.5, 0.5, 0.5),
                "update_norm": Summary(0.0, 0.5, 0.5, 0.5, 0.5),
            }
        )
        assert condition(0.5, 0.1, 0.1, history=history, run=run)
        assert not condition(0.001, 0.1, 0.1, history=history, run=run)


def test_state_mismatch_is_raised_if_the_step_does_not_fit_the_moments() -> None:
    """Before the resume, steps had an rms of 0.3 learning rates and moments had a history."""
    history = History(
        {"normalized_update_rms": Summary.of(0.3), "exp_avg_carryover": Summary.of(1)}
    )
    rows = [
        ("nothing is lost", (0.3, 1.0, 201.0), False),
        ("large moments with a new step count", (5.0, 1.0, 1.0), True),
        ("small moments with a new step count", (0.05, 1.0, 2.0), True),
        ("a new step count with old moments", (0.3, 1.0, 1.0), True),
        ("a new run", (1.0, 0.0, 1.0), False),
        ("moments of one gradient", (0.3, 0.0, 201.0), True),
    ]
    condition = RULES["state_mismatch"].condition
    with each_row() as row:
        for name, values, is_found in rows:
            with row(name):
                assert condition(*values, history, RunFacts(is_resumed=True)) == is_found
                assert not condition(*values, history, RunFacts())


def test_zero_learning_rate_exhausts_a_schedule_only_after_a_positive_one() -> None:
    rows = [("warm-up from 0", 0.0, False), ("end of a decay", 0.1, True)]
    with each_row() as row:
        for name, largest, is_found in rows:
            with row(name):
                history = History({"lr": Summary(0.0, 0.0, largest, 0.0, 0.0)})
                condition = RULES["schedule_exhausted"].condition
                assert condition(0.0, 2.0, history, RunFacts(total_steps=100)) == is_found


def test_lost_updates_raise_nothing_below_a_hundredth_of_the_peak_learning_rate() -> None:
    run = RunFacts(peak_lr=1e-3, total_steps=1e5)
    with each_row() as row:
        for lr, is_found in [(1e-3, True), (2e-5, True), (5e-6, False), (0.0, False)]:
            with row(lr):
                assert RULES["updates_lost"].condition(0.9, 0.1, lr, run) == is_found
                assert RULES["decay_lost"].condition(0.9, lr, 0.1, run) == is_found


# ---- Settings


def test_settings_of_rules_are_validated_by_name() -> None:
    given = {"findings": {"eps_dominates": {"threshold": 0.2, "severity": "info"}}}
    assert monitor_config(given).findings == given["findings"]
    assert monitor_config({"findings": None}).findings is None
    assert Severity("off") is Severity.off


def test_notice_does_not_stop_a_run_and_cannot_be_in_stop_on() -> None:
    rows = [
        ("schedule_length", r"has schedule_length, a preflight notice, which does not stop a run"),
        ("exp_avg_sq_stale", r"has 'exp_avg_sq_stale', which is not a finding\..*exp_avg_sq_stall"),
    ]
    with each_row() as row:
        for code, message in rows:
            with row(code), pytest.raises(ConfigError, match=message):
                monitor_config({"stop_on": [code]})


def test_unknown_settings_of_rules_and_notices_raise() -> None:
    rows = [
        ({"warmup_short": {"patience": 2}}, r"warmup_short\.patience=2 is not"),
        ({"eps_dominates": {"patience": 0}}, r"eps_dominates\.patience=0 must be an integer"),
        ({"eps_dominates": {"persistence": 2}}, r"eps_dominates\.persistence=2 is not"),
        ({"eps_vanish": {}}, r"eps_vanish=\{\} is not a finding"),
    ]
    with each_row() as row:
        for findings, message in rows:
            with row(findings), pytest.raises(ConfigError, match=message):
                monitor_config({"findings": findings})
