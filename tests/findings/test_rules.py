"""The declarations of the rules, their conditions and their remedies."""

from typing import Any

import pytest

from lightning_adam.cli import main
from lightning_adam.config.monitor import Severity
from lightning_adam.findings import RULES, remedies
from lightning_adam.findings.rule import Case, Memory, Past, Training
from lightning_adam.monitor.settings import monitor_config
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


def test_zero_learning_rate_exhausts_a_schedule_only_after_a_positive_one() -> None:
    rows = [("warm-up from 0", 0.0, False), ("end of a decay", 0.1, True)]
    with each_row() as row:
        for name, largest, is_found in rows:
            with row(name):
                past = Past({"lr": Memory(0.0, 0.0, largest)})
                condition = RULES["schedule_exhausted"].condition
                assert condition(0.0, 2.0, past, Training(total_steps=100)) == is_found


def test_lost_updates_are_no_finding_below_a_hundredth_of_the_peak_learning_rate() -> None:
    training = Training(peak_lr=1e-3, total_steps=1e5)
    with each_row() as row:
        for lr, is_found in [(1e-3, True), (2e-5, True), (5e-6, False), (0.0, False)]:
            with row(lr):
                assert RULES["updates_lost"].condition(0.9, 0.1, lr, training) == is_found
                decay_is_lost = RULES["decay_lost"].condition(0.9, lr, 0.1, training)
                assert decay_is_lost == is_found


# ---- Remedies


def case(low_denominator: float | None = None, dtype: str = "float32", **settings: Any) -> Case:
    defaults = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, **settings}
    training = Training(defaults=defaults, dtypes=frozenset({dtype}))
    return Case({"eps": defaults["eps"]}, training, lambda: low_denominator)


def test_suggested_eps_is_the_largest_power_of_ten_below_a_twentieth_of_the_denominators() -> None:
    rows = [(1e-8, 5e-9, 1e-10), (1e-8, 3e-12, 1e-13), (1e-3, 1e-6, 1e-8), (1e-8, 1e-6, None)]
    with each_row() as row:
        for eps, low_denominator, suggested in rows:
            with row((eps, low_denominator)):
                overrides = [
                    each
                    for cure in remedies.smaller_eps(case(low_denominator, eps=eps))
                    for each in cure.overrides
                ]
                assert overrides == ([] if suggested is None else [f"optimizer.eps={suggested}"])


def test_suggested_beta2_has_a_tenth_of_the_memory_but_is_not_below_0_9() -> None:
    rows = [(0.999, [0.99]), (0.99, [0.9]), (0.97, [0.9]), (0.95, [0.9]), (0.9, []), (0.5, [])]
    with each_row() as row:
        for beta2, suggested in rows:
            with row(beta2):
                cures = remedies.lower_beta2(case(betas=(0.9, beta2)))
                expected = [(f"optimizer.betas=[0.9,{each}]",) for each in suggested]
                assert [each.overrides for each in cures] == expected


def test_full_precision_is_suggested_with_an_eps_for_float32() -> None:
    precise = "trainer.precision=16-mixed"
    rows = [(1e-4, (precise, "optimizer.eps=1e-08")), (1e-8, (precise,)), (1e-10, (precise,))]
    with each_row() as row:
        for eps, expected in rows:
            with row(eps):
                given = case(dtype="float16", eps=eps)
                (cure,) = remedies.state_that_holds_gradients(given)
                assert cure.overrides == expected


# ---- Settings


def test_settings_of_rules_are_validated_by_name() -> None:
    given = {"findings": {"eps_dominates": {"threshold": 0.2, "severity": "info"}}}
    assert monitor_config(given).findings == given["findings"]
    assert monitor_config({"findings": None}).findings is None
    assert Severity("off") is Severity.off
