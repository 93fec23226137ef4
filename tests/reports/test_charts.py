"""Charts: one for every statistic, with the right keys and reference values."""

import itertools
import math
import re
from typing import Any

import pytest

from lightning_adam.findings import RULES
from lightning_adam.reports.charts import (
    PINNED,
    REFERENCES,
    SECTIONS,
    Chart,
    ChartKind,
    Settings,
    is_logarithmic,
    thresholds,
)
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.statistics.histograms import QUANTITIES
from tests.support.tables import each_row

CHARTS = list(itertools.chain.from_iterable(SECTIONS.values()))
SECTION_OF = {
    "gradient": "Gradient and moments",
    "moments": "Gradient and moments",
    "underflow": "Underflow",
    "update": "Update and weight decay",
    "weight_decay": "Update and weight decay",
    "schedule": "Schedule",
}
FOREIGN_KEYS = {
    "loss": ["loss", "train/loss", "train_loss_epoch", "training/total_loss", "loss_step"],
    "validation": ["val/loss", "valid_acc", "validation/f1", "val_acc/dataloader_idx_0"],
    "": ["value_loss", "train/loss_scale", "train/accuracy", "lossy", "closs", "test/loss", ""],
}
"""Keys of the module by the chart that draws them."""


def charts_of(key: str) -> list[Chart]:
    return [chart for chart in CHARTS if chart.draws(key)]


def ids_of(key: str) -> list[str]:
    return [chart.id for chart in charts_of(key)]


def test_every_statistic_has_one_chart_with_its_explanation() -> None:
    sections = {chart.id: section for section, charts in SECTIONS.items() for chart in charts}
    with each_row() as row:
        for name, statistic in STATISTICS.items():
            with row(name):
                charts = charts_of(statistic.key)
                (chart,) = (each for each in charts if each.kind is ChartKind.CURVES)
                assert [each.id for each in charts if each is not chart] == ["layers", "events"]
                section = "Overview" if name == "lr" else SECTION_OF[statistic.family]
                assert sections[name] == section
                assert (chart.id, chart.title, chart.meaning) == (name, name, statistic.meaning)
                assert (chart.definition, chart.unit) == (statistic.formula, statistic.unit)
                assert (chart.source, chart.is_log) == (statistic.source, is_logarithmic(statistic))
                override = f"adam_monitor.statistics=[headline,{name}]"
                assert chart.missing == f"Not logged. Set '{override}'"
                for similar in (f"{statistic.key}s", f"my/{statistic.key}", statistic.key[:-1]):
                    assert not chart.draws(similar)
                assert not chart.draws(name)


def test_histograms_and_percentiles_are_drawn() -> None:
    assert {quantity: ids_of(f"adam_histogram/{quantity}") for quantity in QUANTITIES} == {
        quantity: ["eps_curve"] * (quantity == "denominator") + ["histogram"]
        for quantity in QUANTITIES
    }
    for family, quantity in (("moments", "denominator"), ("update", "normalized_update")):
        for percent in (1, 50, 99):
            key = f"adam_{family}/{quantity}_p{percent}"
            assert ids_of(key) == [f"{quantity}_percentiles"]


def test_pinned_charts_are_first_in_their_sections() -> None:
    pinned = {chart.id for chart in CHARTS if chart.is_pinned}
    others = {"loss", "validation", "eps_curve", "histogram", "layers", "events"}
    assert pinned == {*PINNED, *others}
    for charts in SECTIONS.values():
        order = [chart.is_pinned for chart in charts]
        assert order == sorted(order, reverse=True)


def test_every_chart_has_its_own_id_an_explanation_and_keys_that_wandb_can_read() -> None:
    """W&B supports neither lookaround nor backreferences, and adds a group around the pattern."""
    assert len({chart.id for chart in CHARTS}) == len({chart.title for chart in CHARTS})
    assert len({chart.id for chart in CHARTS}) == len(CHARTS)
    with each_row() as row:
        for chart in CHARTS:
            with row(chart.id):
                assert chart.meaning.endswith(".")
                assert chart.missing
                assert not chart.missing.endswith("."), "the page ends the sentence"
                assert not re.search(r"\(\?|\\[0-9]", chart.keys)
                assert re.compile(f"^({chart.keys})$")


def test_losses_and_validation_metrics_are_recognized_by_their_keys() -> None:
    with each_row() as row:
        for name, keys in FOREIGN_KEYS.items():
            for key in keys:
                with row(key):
                    assert ids_of(key) == ([name] if name else [])


def test_chart_of_a_single_key_draws_only_this_key() -> None:
    chart = SECTIONS["Overview"][0].of_key("train/loss.a")
    assert (chart.id, chart.title) == ("train/loss.a", "train/loss.a")
    assert chart.draws("train/loss.a")
    assert not chart.draws("train/loss_a")


def test_reference_values_follow_the_settings_of_the_run() -> None:
    known = Settings.of({"betas": [0.8, 0.99], "eps": 1e-6})
    expected = {
        "exp_avg_carryover": 0.8,
        "signal_fraction": 0.2 / 1.8,
        "normalized_update_rms": math.sqrt(0.2 / 1.8),
        "rms_ratio_max": 10.0,
        "denominator_mean": 1e-6,
    }
    for name, value in expected.items():
        (reference,) = REFERENCES[name]
        assert reference.at(known) == pytest.approx(value)
        assert math.isnan(reference.at()), "not known"
    fixed = [each for name, found in REFERENCES.items() if name not in expected for each in found]
    assert all(each.at() == each.at(known) for each in fixed)
    assert Settings.of({"betas": None, "eps": 0}).eps != 0, "0 has no place on a logarithmic axis"
    assert REFERENCES.keys() <= STATISTICS.keys()


def limits_of(code: str, statistic: str, settings: dict[str, Any] | None = None) -> list[float]:
    found = [each for each in thresholds(statistic, settings) if each.code == code]
    return [each.at() for each in found]


def test_thresholds_are_those_of_the_rules_or_of_the_run() -> None:
    limits = [(code, *each) for code, rule in RULES.items() for each in rule.limits.items()]
    assert len(limits) > 8
    with each_row() as row:
        for code, statistic, name in limits:
            with row((code, statistic)):
                default = [RULES[code].thresholds[name]]
                for unchanged in (None, {}, {code: None}, {code: {"severity": "info"}}):
                    assert limits_of(code, statistic, unchanged) == default
                assert limits_of(code, statistic, {code: {name: 0.125}}) == [0.125]
                assert limits_of(code, statistic, {code: {"severity": "off"}}) == []
    assert thresholds("lr") == []
