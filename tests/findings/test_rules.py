"""The declarations of the rules."""

import pytest

from lightning_adam.cli import main
from lightning_adam.findings import RULES
from lightning_adam.findings.rule import Case, Memory, Past, Training
from lightning_adam.monitor_settings import read_monitor
from lightning_adam.schema import Severity
from lightning_adam.statistics.catalogue import STATISTICS
from tests.support.tables import each_row

RULES_BY_NAME = (
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


def test_every_documented_pathology_has_a_rule() -> None:
    assert set(RULES_BY_NAME) <= RULES.keys()


def test_explain_prints_the_whole_declaration_of_each_rule(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with each_row() as row:
        for code, rule in RULES.items():
            with row(code):
                assert rule.meaning.endswith(".")
                assert rule.source
                assert set(rule.explained_by) <= RULES.keys() - {code}
                assert rule.remedy.__doc__
                main(["explain", code])
                printed = " ".join(capsys.readouterr().out.split())
                expected = [
                    rule.meaning,
                    " ".join(rule.source.split()),
                    *(STATISTICS[name].formula for name in rule.statistics),
                    *(
                        f"adam_monitor.findings.{code}.{name}={value}"
                        for name, value in rule.thresholds.items()
                    ),
                ]
                assert [each for each in expected if each not in printed] == []


def test_remedies_are_finite_where_statistics_are_unknown_and_the_run_has_no_end() -> None:
    defaults = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    with each_row() as row:
        for code, rule in RULES.items():
            values = dict.fromkeys((*rule.statistics, *rule.evidence), 0.5)
            for dtype in ("float32", "bfloat16", "float16"):
                with row((code, dtype)):
                    training = Training(defaults=defaults, dtypes=frozenset({dtype}))
                    for cure in rule.remedy(Case(values, training)):
                        assert cure.overrides or cure.hint
                        assert all(each.partition("=")[2] for each in cure.overrides)
                        assert not any("nan" in each or "inf" in each for each in cure.overrides)


def test_too_large_updates_are_found_whether_or_not_the_first_gradient_is_zero() -> None:
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


def test_settings_of_rules_are_validated_by_name() -> None:
    given = {"findings": {"eps_dominates": {"threshold": 0.2, "severity": "info"}}}
    assert read_monitor(given).findings == given["findings"]
    assert read_monitor({"findings": None}).findings is None
    assert Severity("off") is Severity.off
