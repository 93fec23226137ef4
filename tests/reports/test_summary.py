"""The summary of a run: verdict, facts, metrics, settings and grouped findings."""

import math
from dataclasses import replace
from typing import Any

import pytest

from lightning_adam.findings import Suggestion
from lightning_adam.reports.runs import Run
from lightning_adam.reports.summary import (
    Fact,
    Metric,
    Verdict,
    format_count,
    format_duration,
    issues_of,
    key_facts,
    metrics_of,
    settings_of,
    verdict_of,
)
from tests.reports.run_files import KEY, run_of
from tests.support.findings import finding
from tests.support.tables import each_row

ERROR = finding("not_finite", "error", step=20)
WARNING = finding("eps_dominates", "warning", step=8)
INFO = finding("warmup_short", "info", step=0)
RESOLVED = replace(WARNING, closed=30)


def with_facts(series: dict[str, dict[int, float]], **facts: Any) -> Run:
    """Returns a run with the facts that AdamMonitor logs."""
    return run_of(series, config={"lightning_adam": {"run": facts}})


# ---- Verdict

VERDICTS: list[tuple[list[Any] | None, int | None, Verdict]] = [
    (None, 51, Verdict("unknown", "Not judged", "the run has no record of findings")),
    ([], 51, Verdict("healthy", "Healthy", "no issues found in 51 measurements")),
    ([], 1, Verdict("healthy", "Healthy", "no issues found in 1 measurement")),
    ([], None, Verdict("healthy", "Healthy", "no issues found")),
    ([INFO], 5, Verdict("healthy", "Healthy", "no issues found in 5 measurements")),
    ([WARNING], None, Verdict("warning", "1 warning", "1 open at the end")),
    ([RESOLVED], 1200, Verdict("warning", "1 warning", "all resolved, 1,200 measurements")),
    ([RESOLVED, WARNING], None, Verdict("warning", "1 warning", "1 open at the end")),
    (
        [RESOLVED, INFO, ERROR, replace(ERROR, code="loss_spike"), replace(ERROR, closed=40)],
        9,
        Verdict("error", "2 errors, 1 warning", "2 open at the end, 9 measurements"),
    ),
]
"""Findings, number of measurements, and verdict."""


def test_verdict_is_that_of_the_most_severe_finding() -> None:
    with each_row() as row:
        for findings, measurements, verdict in VERDICTS:
            with row(verdict):
                run = replace(run_of({}), findings=findings, measurements=measurements)
                assert verdict_of(run) == verdict


# ---- Findings


def test_findings_are_grouped_by_code_and_optimizer_and_sorted_by_severity_and_time() -> None:
    found = [
        finding("updates_lost", "warning", "layer/net.1", 30, closed=40),
        finding("eps_dominates", "error", "model", 50),
        finding("updates_lost", "warning", "tensor/net.1.bias", 20, closed=60),
        finding("updates_lost", "warning", "model", 40, closed=50),
        finding("updates_lost", "warning", "layer/net.1", 45, closed=48),
        finding("updates_lost", "warning", "model", 10, optimizer="critic"),
        finding("warmup_short", "info", "model", 0),
    ]
    issues = issues_of(found)
    assert [(each.worst.code, each.worst.optimizer, each.start, each.end) for each in issues] == [
        ("eps_dominates", "", 50, None),
        ("updates_lost", "critic", 10, None),
        ("updates_lost", "", 20, 60),
        ("warmup_short", "", 0, None),
    ]
    assert issues[2].scopes == ["model", "layer/net.1", "tensor/net.1.bias"]


def test_issue_shows_the_most_severe_finding_and_the_suggestions_of_the_last_open_one() -> None:
    found = [
        finding(step=1, closed=5),
        finding(step=2, scope="layer/a"),
        finding(step=3, severity="error", closed=4),
    ]
    found = [replace(each, suggestions=(Suggestion(hint=f"{each.step}"),)) for each in found]
    (issue,) = issues_of(found)
    assert issue.worst is found[2]
    assert issue.suggestions == found[1].suggestions
    (resolved,) = issues_of([found[0], found[2]])
    assert resolved.suggestions == found[2].suggestions


def test_statistic_of_an_issue_is_the_one_that_its_rule_limits() -> None:
    for code, expected in (
        ("eps_dominates", "eps_energy_loss"),
        ("exp_avg_sq_lags", "rms_ratio_max"),
        ("not_finite", "nonfinite_count"),
        ("learning_rate_too_large", "update_to_weight"),
    ):
        assert issues_of([finding(code)])[0].statistic == expected
    # The statistic of an unknown code is found in its evidence.
    evidence = {"unknown": 1.0, "grad_norm": 2.0}
    assert issues_of([finding("later", evidence=evidence)])[0].statistic == "grad_norm"
    assert issues_of([finding("later")])[0].statistic == ""


# ---- Metrics and facts

CURVE = {0: 3.0, 10: 1.0, 20: math.nan, 30: 2.0}


def test_best_value_follows_the_recorded_mode_or_the_name_of_the_metric() -> None:
    lowest, highest = (1.0, 10), (3.0, 0)
    with each_row() as row:
        for name, mode, best in (
            ("val/loss", "min", lowest),
            ("val/loss", "max", highest),
            ("val/custom", "max", highest),
            ("val/perplexity", None, lowest),
            ("val/accuracy", None, highest),
            ("val/mape", None, lowest),
            ("val/NLL", None, lowest),
            ("val_mAP_50", None, highest),
            ("val/power", None, (None, None)),
        ):
            with row((name, mode)):
                facts = {"metric": {"name": name, "mode": mode}} if mode else {}
                assert metrics_of(with_facts({name: CURVE}, **facts)) == [Metric(name, 2.0, *best)]
    (metric,) = metrics_of(run_of({"val/loss": {0: math.nan}}))
    assert (metric.best, metric.best_step) == (None, None)


def test_metrics_are_the_recorded_one_or_a_validation_loss_and_the_training_loss() -> None:
    series = dict.fromkeys(("val/accuracy", "train/loss", "val/loss", "test/f1"), CURVE)

    def names_of(**facts: Any) -> list[str]:
        return [metric.name for metric in metrics_of(with_facts(series, **facts))]

    assert names_of() == names_of(metric=None) == ["val/loss", "train/loss"]
    assert names_of(metric={"name": "missing", "mode": "min"}) == ["val/loss", "train/loss"]
    assert names_of(metric={"name": "test/f1", "mode": "max"}) == ["test/f1", "train/loss"]
    assert names_of(metric={"name": "train/loss", "mode": "min"}) == ["train/loss"]
    assert metrics_of(run_of({KEY: {0: 1.0}})) == []
    # The smallest loss of a batch is no best one.
    assert metrics_of(run_of({"train/loss": CURVE})) == [Metric("train/loss", 2.0, None, None)]


def test_key_facts_name_what_the_run_has_recorded() -> None:
    metric = {"name": "val/accuracy", "mode": "max"}
    facts = {"parameters": 1_234_567, "device": "8 x GPU", "precision": "16-mixed"}
    run = with_facts({"val/accuracy": CURVE, KEY: {1999: 1.0}}, metric=metric, **facts)
    assert key_facts(replace(run, seconds=4000.0)) == [
        Fact("val/accuracy", "3", "best, at step 0; final 2"),
        Fact("Last step", "1,999"),
        Fact("Wall time", "1 h 6 min"),
        Fact("Parameters", "1.235 M"),
        Fact("Device", "8 x GPU", "16-mixed"),
    ]
    assert key_facts(run_of({})) == []
    assert key_facts(run_of({"val/x": {0: 1.0}}))[0] == Fact("val/x", "1", "final")


@pytest.mark.parametrize("config", [None, 1, "text", [], {"optimizer": None, "run": [1]}])
def test_run_with_another_config_has_no_settings_and_no_facts(config: object) -> None:
    run = run_of({"val/loss": {0: 1.0}}, config={"lightning_adam": config})
    assert settings_of(run) == []
    assert [fact.name for fact in key_facts(run)] == ["val/loss", "Last step"]


def test_settings_are_one_line_an_optimizer() -> None:
    adam = {"class": "AdamW", "eps": 1e-8, "lr": 0.1, "betas": [0.9, 0.999], "fused": True}
    schedule = {"name": "cosine", "warmup_steps": 3}
    line = "AdamW lr=0.1 betas=[0.9,0.999] eps=1e-08; cosine warmup_steps=3"

    def lines_of(optimizer: object, scheduler: object = None) -> list[str]:
        config = {"lightning_adam": {"optimizer": optimizer, "scheduler": scheduler}}
        return settings_of(run_of({}, config=config))

    assert lines_of(adam, schedule) == [line]
    assert lines_of({"g": adam, "d": {"class": "Adam"}}, {"g": schedule}) == [
        f"g: {line}",
        "d: Adam",
    ]


def test_durations_and_counts_are_rounded_to_their_largest_units() -> None:
    for seconds, duration in ((0.0, "0 s"), (59.7, "60 s"), (3599.0, "59 min 59 s")):
        assert format_duration(seconds) == duration
    assert format_duration(3600.0) == "1 h 0 min"
    assert [format_count(each) for each in (0, 999_999, 10**6, 10**10)] == [
        *("0", "999,999", "1 M", "10 B")
    ]
