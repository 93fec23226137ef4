"""The declarations themselves."""

import pytest

from lightning_adam.cli import main
from lightning_adam.findings import RULES
from lightning_adam.findings.rule import Case, Memory, Past, Training
from lightning_adam.monitor_settings import read_monitor
from lightning_adam.schema import Severity
from lightning_adam.statistics.catalogue import STATISTICS

FINDINGS = (
    "eps_dominates",
    "eps_vanishes",
    "exp_avg_sq_underflow",
    "exp_avg_sq_stalled",
    "updates_lost",
    "exp_avg_sq_lags",
    "exp_avg_sq_stale",
    "decay_lost",
    "correlated_updates",
    "learning_rate_too_small",
    "learning_rate_too_large",
    "amsgrad_frozen",
    "decay_dominates",
    "decay_uneven",
    "decay_timescale",
    "state_mismatch",
    "not_finite",
    "schedule_exhausted",
)
"""Those that have to be looked for."""


def test_every_pathology_has_its_rule() -> None:
    assert set(FINDINGS) <= RULES.keys()


@pytest.mark.parametrize("code", RULES)
def test_a_rule_says_all_there_is_to_know(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    rule = RULES[code]
    assert rule.meaning.endswith(".")
    assert rule.source
    assert set(rule.explained_by) <= RULES.keys() - {code}
    assert rule.remedy.__doc__
    main(["explain", code])
    told = " ".join(capsys.readouterr().out.split())
    assert rule.meaning in told
    assert " ".join(rule.source.split()) in told
    for name in rule.statistics:
        assert STATISTICS[name].formula in told
    for name, value in rule.thresholds.items():
        assert f"adam_monitor.findings.{code}.{name}={value}" in told


@pytest.mark.parametrize("code", RULES)
def test_a_remedy_can_be_computed_from_any_numbers(code: str) -> None:
    """What the state does not tell is NaN, and a run may have no end."""
    rule = RULES[code]
    values = dict.fromkeys((*rule.statistics, *rule.evidence), 0.5)
    defaults = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    for dtypes in ({"float32"}, {"bfloat16"}, {"float16"}):
        training = Training(defaults=defaults, dtypes=frozenset(dtypes))
        for cure in rule.remedy(Case(values, training)):
            assert cure.overrides or cure.hint
            assert all(each.partition("=")[2] for each in cure.overrides)
            assert not any("nan" in each or "inf" in each for each in cure.overrides)


def test_steps_are_too_large_whether_or_not_the_first_gradient_was_0() -> None:
    for first in (0.0, 1.0):
        past = Past(
            {
                "grad_zero_fraction": Memory(first, 0.1, first),
                "update_to_weight": Memory(0.0, 0.5, 0.5),
                "lr": Memory(0.1, 0.1, 0.1),
            }
        )
        assert RULES["learning_rate_too_large"].condition(0.5, 0.1, 0.1, past)
        assert not RULES["learning_rate_too_large"].condition(0.001, 0.1, 0.1, past)


def test_settings_of_a_rule_are_checked_under_their_full_name() -> None:
    given = {"findings": {"eps_dominates": {"threshold": 0.2, "severity": "info"}}}
    assert read_monitor(given).findings == given["findings"]
    assert read_monitor({"findings": None}).findings is None
    assert Severity("off") is Severity.off
