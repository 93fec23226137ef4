"""The spec of the W&B workspace, checked with the model of wandb_workspaces."""

import json
import re
from typing import Any

import pytest
from wandb_workspaces.workspaces import internal

from lightning_adam.config.errors import ConfigError
from lightning_adam.reports.charts import SECTIONS, ChartKind
from lightning_adam.reports.workspace import HEAT_MAP_SPEC, workspace_spec
from lightning_adam.statistics.catalogue import STATISTICS
from tests.reports.conftest import LoggedRun
from tests.support.commands import records
from tests.support.tables import each_row

SCOPES = (
    "group/decay/",
    "layer/net.0/",
    "tensor/net.0.weight/",
    "optimizer/generator/group/decay/",
    "worst_1/",
)
FOLDED = ": more"
LAYERS = "Layers: update_to_weight"


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    return dict(json.loads(workspace_spec("team/project", "val/acc")))


def sections(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return list(spec["section"]["panelBankConfig"]["sections"])


def panels(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for section in sections(spec) for panel in section["panels"]]


def regexes(spec: dict[str, Any]) -> dict[str, str]:
    """Returns the expression that selects the keys of each panel, by title."""
    configs = [panel["config"] for panel in panels(spec)]
    return {each["chartTitle"]: each["metricRegex"] for each in configs if "metricRegex" in each}


def test_spec_is_valid_for_the_model_of_wandb_workspaces(spec: dict[str, Any]) -> None:
    model = internal.WorkspaceViewspec.model_validate(spec)
    assert json.loads(model.model_dump_json(by_alias=True, exclude_none=True)) == spec


def test_sections_are_those_of_the_report_and_charts_that_are_not_pinned_are_folded(
    spec: dict[str, Any],
) -> None:
    is_open = {section["name"]: section["isOpen"] for section in sections(spec)}
    assert list(dict.fromkeys(name.removesuffix(FOLDED) for name in is_open)) == list(SECTIONS)
    folded = [name for name, opened in is_open.items() if not opened]
    assert folded == [name for name in is_open if name.endswith(FOLDED) or name == "Schedule"]
    for title, charts in SECTIONS.items():
        curves = [chart for chart in charts if chart.kind is ChartKind.CURVES]
        found = [
            panel["config"]["chartTitle"]
            for section in sections(spec)
            if section["name"].removesuffix(FOLDED) == title
            for panel in section["panels"]
            if "metricRegex" in panel["config"]
        ]
        assert [chart.title for chart in curves] == [name for name in found if ":" not in name]


def test_axes_are_logarithmic_as_in_the_report(spec: dict[str, Any]) -> None:
    configs = [panel["config"] for panel in panels(spec) if "metricRegex" in panel["config"]]
    is_log = {each["chartTitle"]: each.get("yLogScale", False) for each in configs}
    assert is_log.pop(LAYERS)
    charts = {chart.title: chart for charts in SECTIONS.values() for chart in charts}
    assert is_log == {title: charts[title].is_log for title in is_log}
    assert {*is_log.values()} == {True, False}


def test_every_statistic_has_a_panel_for_the_whole_model(spec: dict[str, Any]) -> None:
    expressions = regexes(spec)
    with each_row() as row:
        for name, statistic in STATISTICS.items():
            with row(name):
                expression = expressions[name]
                assert re.search(expression, statistic.key)
                assert re.search(expression, statistic.key_of("optimizer/generator/"))
                assert not any(re.search(expression, statistic.key_of(scope)) for scope in SCOPES)
                others = [each.key for each in STATISTICS.values() if each is not statistic]
                assert not any(re.search(expression, key) for key in others)


def test_layers_panel_shows_layers_only(spec: dict[str, Any]) -> None:
    expression = regexes(spec)[LAYERS]
    key_of = STATISTICS["update_to_weight"].key_of
    assert re.search(expression, key_of("layer/net.0/"))
    assert re.search(expression, key_of("optimizer/generator/layer/net.0/"))
    assert not any(re.search(expression, key_of(scope)) for scope in ("", "group/decay/"))


def test_meaning_of_a_statistic_stands_beside_its_panel(spec: dict[str, Any]) -> None:
    for section in sections(spec):
        (explanation,) = [
            panel["config"]["value"]
            for panel in section["panels"]
            if panel["viewType"] == "Markdown Panel"
        ]
        titles = [panel["config"].get("chartTitle") for panel in section["panels"]]
        for statistic in STATISTICS.values():
            assert (f"**{statistic.name}**: {statistic.meaning}" in explanation) == (
                statistic.name in titles
            )


def test_reference_values_of_a_chart_stand_beside_it(spec: dict[str, Any]) -> None:
    for text in (
        "Reference values: healthy 1, exp_avg_sq_lags 3.",
        "Reference values: eps 1e-08 with default settings.",
        "noise 0.0526 with default settings.",
        "rule of thumb 0.001, learning_rate_too_small 0.0001, learning_rate_too_large 0.03.",
    ):
        assert text in json.dumps(spec, ensure_ascii=False)


def test_runs_are_compared_by_their_settings_and_a_metric(spec: dict[str, Any]) -> None:
    (plot,) = [each for each in panels(spec) if each["viewType"] == "Parallel Coordinates Plot"]
    names = ("lr", "betas", "eps", "weight_decay")
    assert [column["accessor"] for column in plot["config"]["columns"]] == [
        *(f"config:lightning_adam.value.optimizer.{name}" for name in names),
        "summary:val/acc",
    ]
    assert all(f"config:lightning_adam.optimizer.{name}" in json.dumps(spec) for name in names)
    assert "Run Comparer" in {panel["viewType"] for panel in panels(spec)}
    assert "summary:" not in workspace_spec("team/project")


def test_heat_map_has_a_column_for_each_placeholder(spec: dict[str, Any]) -> None:
    charts = [panel["config"] for panel in panels(spec) if panel["viewType"] == "Vega2"]
    (heat_map,) = [chart for chart in charts if chart["panelDefId"] == "team/adam_layers"]
    placeholders = set(re.findall(r"\$\{field:(\w+)\}", json.dumps(HEAT_MAP_SPEC)))
    assert set(heat_map["fieldSettings"]) == placeholders


def test_invalid_project_raises() -> None:
    with each_row() as row:
        for project in ("project", "team/", "/project", "team/project/runs", ""):
            with (
                row(project),
                pytest.raises(ConfigError, match=r"must be ENTITY/PROJECT.*dashboard [\w-]+/\w+"),
            ):
                workspace_spec(project)


def test_eps_curve_is_drawn_as_the_run_itself_asks_for(
    spec: dict[str, Any], logged_run: LoggedRun
) -> None:
    name = "_wandb.visualize.adam_underflow/eps_curve"
    entries = records(logged_run.wandb)
    updates = [entry["config"]["update"] for entry in entries if "config" in entry]
    asked = next(update[name] for update in updates if name in update)["panel_config"]
    configs = [panel["config"] for panel in panels(spec)]
    (drawn,) = [each for each in configs if each.get("panelDefId") == asked["panelDefId"]]
    assert drawn["fieldSettings"] == asked["fieldSettings"]
    assert drawn["transform"] == asked["transform"]
    assert drawn["stringSettings"]["xname"] == asked["stringSettings"]["xname"]
    table = [{"name": "tableKey", "value": "adam_underflow/eps_curve_table"}]
    assert json.dumps(table) in json.dumps(asked["userQuery"])
    assert "adam_underflow/eps_curve_table" in json.dumps(drawn["userQuery"])
