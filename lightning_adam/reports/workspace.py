"""Saves the charts of the report as a workspace of a W&B project."""

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import wandb
from wandb.errors import UnsupportedError, UsageError

from lightning_adam.config.errors import ConfigError
from lightning_adam.monitor.log_keys import DENOMINATOR, EPS_CURVE, LAYERS, X_AXIS
from lightning_adam.reports.charts import (
    SECTIONS,
    VALIDATION,
    Chart,
    ChartKind,
    Settings,
    is_logarithmic,
)
from lightning_adam.reports.summary import mapping
from lightning_adam.statistics.catalogue import STATISTICS, SYMBOLS

try:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    from lightning_adam._compat.wandb_workspaces import (
        WandbApiFailedError,
        saved_workspace,
        set_address,
        spec_of,
    )
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the workspace needs wandb-workspaces: pip install 'lightning-adam[dashboard]'"
    ) from error

NAME = "Adam"
ADDRESS = "lightningadam"
"""Part of the workspace's URL, by which a later call finds the workspace."""
OPTIMIZER = "(optimizer/[^/]+/)?"
"""The optimizer in a key, if there are several."""
LAYER_STATISTIC = "update_to_weight"
COMPARED = ("lr", "betas", "eps", "weight_decay")
"""The settings in the comparison of runs."""
CONFIG = "lightning_adam.optimizer"
"""The path of these settings in the config of a run."""
DEFAULTS = Settings(beta1=0.9, beta2=0.999, eps=1e-8)
"""The settings for reference values in the explanations."""
HEAT_MAP = "adam_layers"
HEAT_MAP_SPEC = {
    "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
    "data": {"name": "wandb"},
    "transform": [{"filter": "datum['${field:value}'] > 0"}],
    "mark": {"type": "rect", "tooltip": True},
    "encoding": {
        "x": {"field": "${field:step}", "type": "ordinal", "axis": {"labelOverlap": True}},
        "y": {"field": "${field:layer}", "type": "nominal"},
        "color": {
            "field": "${field:value}",
            "type": "quantitative",
            "scale": {"type": "log", "scheme": "viridis"},
        },
    },
}
"""A heat map of the layer table, in Vega-Lite with W&B's placeholders for fields."""


def workspace_spec(project: str, metric: str | None = None) -> str:
    """Returns the spec of the workspace as JSON, without contacting a server.

    Args:
        project: `entity/project`.
        metric: The metric by which to compare runs (default: None, only their settings).

    Raises:
        ConfigError: If `project` is not of that form.

    Example:
        >>> spec = json.loads(workspace_spec("my-team/mnist", "val/loss"))
        >>> [each["name"] for each in spec["section"]["panelBankConfig"]["sections"]][:2]
        ['Overview', 'Gradient and moments']
    """
    entity, name = _parse_project(project)
    spec = spec_of(_workspace(entity, name, f"{entity}/{HEAT_MAP}", metric))
    return json.dumps(json.loads(spec), indent=2, ensure_ascii=False)


def save_workspace(project: str, metric: str | None = None) -> str:
    """Creates the workspace in a project, or updates it.

    An update keeps the filters and the selection of runs.

    Args:
        project: `entity/project`.
        metric: The metric by which to compare runs (default: None, that of the newest run).

    Returns:
        A line with the URL of the workspace.

    Raises:
        ConfigError: If the project cannot be reached or changed.
    """
    entity, name = _parse_project(project)
    with _config_errors(project):
        metric = metric or _metric_of_newest_run(project)
        workspace = _workspace(entity, name, _create_heat_map(entity), metric)
        saved = saved_workspace(entity, name, ADDRESS)
        if saved is not None:
            saved.name, saved.sections = workspace.name, workspace.sections
            workspace = saved
        # The library prints the URL, which is returned here.
        with contextlib.redirect_stderr(io.StringIO()):
            workspace.save()
        return f"workspace: {workspace.url}"


def _parse_project(project: str) -> tuple[str, str]:
    entity, separator, name = project.partition("/")
    if not (entity and separator and name) or "/" in name:
        raise ConfigError(
            f"{project} must be ENTITY/PROJECT, as in the project's address",
            f"Use for example lightning-adam dashboard {entity or 'my-team'}/"
            f"{name.rpartition('/')[2] or 'mnist'}",
        )
    return entity, name


def _metric_of_newest_run(project: str) -> str | None:
    """Returns the metric that AdamMonitor has recorded, or a validation metric of the summary."""
    for run in wandb.Api().runs(project, order="-created_at", per_page=1, lazy=False):
        facts = mapping(mapping(run.config.get("lightning_adam")).get("run"))
        recorded = mapping(facts.get("metric")).get("name")
        validation = filter(VALIDATION.draws, run.summary.keys())
        return recorded or min(validation, key=lambda key: "loss" not in key, default=None)
    return None


def _workspace(entity: str, project: str, heat_map: str | None, metric: str | None) -> ws.Workspace:
    sections = []
    for title, charts in SECTIONS.items():
        drawn = [chart for chart in charts if chart.kind in PANELS]
        pinned = [chart for chart in drawn if chart.is_pinned]
        others = [chart for chart in drawn if not chart.is_pinned]
        if pinned:
            sections.append(_section(title, pinned))
        if others:
            sections.append(_section(f"{title}: more" if pinned else title, others, is_open=False))
    sections[0].panels += [_comparison(metric), wr.RunComparer(diff_only="split")]
    if heat_map:
        (layers,) = (section for section in sections if section.name == "Layers")
        layers.panels.insert(0, _heat_map_panel(heat_map))
    workspace = ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=X_AXIS),
        runset_settings=ws.RunsetSettings(
            pinned_columns=[f"config:{CONFIG}.{name}" for name in COMPARED]
        ),
    )
    set_address(workspace, ADDRESS)
    return workspace


def _section(name: str, charts: Sequence[Chart], is_open: bool = True) -> ws.Section:
    panels = [PANELS[chart.kind](chart) for chart in charts]
    return ws.Section(name=name, panels=[*panels, _explanation(charts)], is_open=is_open)


def _curves(chart: Chart) -> wr.LinePlot:
    """Returns a plot with a line for each run and optimizer."""
    return wr.LinePlot(
        title=chart.title,
        x=X_AXIS,
        metric_regex=f"^({_of_optimizers(chart.keys)})$",
        title_y=chart.unit or None,
        log_y=chart.is_log or None,
    )


def _of_optimizers(keys: str) -> str:
    """Returns a pattern that also matches keys with the name of an optimizer."""
    return re.sub("(^|[|])(adam_[a-z_]+/)", rf"\1\2{OPTIMIZER}", keys)


def _eps_curve(chart: Chart) -> wr.CustomChart:
    return wr.CustomChart(
        query={"summaryTable": {"tableKey": f"{EPS_CURVE}_table"}},
        chart_name="wandb/lineseries/v0",
        chart_fields={"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"},
        chart_strings={"title": chart.title, "xname": "log10(eps)"},
    )


def _histogram(chart: Chart) -> wr.LinePlot:
    """Returns a line plot with a single histogram key, which W&B draws as a heat map."""
    return wr.LinePlot(title=chart.title, x=X_AXIS, y=[DENOMINATOR], title_y="log2")


def _layers(chart: Chart) -> wr.LinePlot:
    """Returns a plot with a line for each layer, if layers are logged."""
    statistic = STATISTICS[LAYER_STATISTIC]
    key = statistic.key_of("(layer|tensor)/[^/]+/")
    return wr.LinePlot(
        title=f"{chart.title}: {statistic.name}",
        x=X_AXIS,
        metric_regex=f"^{_of_optimizers(key)}$",
        log_y=is_logarithmic(statistic) or None,
    )


PANELS: dict[ChartKind, Callable[[Chart], Any]] = {
    ChartKind.CURVES: _curves,
    ChartKind.EPS_CURVE: _eps_curve,
    ChartKind.HISTOGRAM: _histogram,
    ChartKind.LAYERS: _layers,
}
"""Creates the W&B panel of a chart. Events have none, as the flight recorder only writes files."""


def _comparison(metric: str | None) -> wr.ParallelCoordinatesPlot:
    """Returns a plot of the settings and the metric of the runs."""
    columns = [
        wr.ParallelCoordinatesPlotColumn(wr.Config(f"{CONFIG}.{name}"), display_name=name)
        for name in COMPARED
    ]
    if metric:
        columns.append(wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(metric)))
    return wr.ParallelCoordinatesPlot(title="Settings of the runs", columns=columns)


def _explanation(charts: Sequence[Chart]) -> wr.MarkdownPanel:
    """Returns a panel that explains charts and their reference values, which W&B cannot draw."""
    lines = []
    for chart in charts:
        definition = chart.definition and f"`{chart.definition}`."
        source = chart.source and f"{chart.source}."
        parts = [chart.meaning, definition, source, _references(chart)]
        lines.append(f"- **{chart.title}**: {' '.join(filter(None, parts))}")
    return wr.MarkdownPanel(markdown="\n".join([*lines, "", SYMBOLS]))


def _references(chart: Chart) -> str:
    """Returns the healthy values and thresholds of a chart as text."""
    values = []
    for each in chart.references:
        condition = " with default settings" if callable(each.value) else ""
        values.append(f"{each.label} {each.at(DEFAULTS):.3g}{condition}")
    return f"Reference values: {', '.join(values)}." if values else ""


def _create_heat_map(entity: str) -> str | None:
    """Creates the heat map of the layer table; returns None if W&B does not support it."""
    try:
        return wandb.Api().create_custom_chart(
            entity=entity,
            name=HEAT_MAP,
            display_name="Adam by layer and step",
            spec_type="vega2",
            access="private",
            spec=HEAT_MAP_SPEC,
        )
    except UnsupportedError:
        return None
    except WandbApiFailedError:
        # It exists already. If access is denied, saving the workspace raises the error.
        return f"{entity}/{HEAT_MAP}"


def _heat_map_panel(chart: str) -> wr.CustomChart:
    return wr.CustomChart(
        query={"historyTable": {"tableKey": LAYERS}},
        chart_name=chart,
        chart_fields={"step": X_AXIS, "layer": "layer", "value": LAYER_STATISTIC},
    )


@contextlib.contextmanager
def _config_errors(project: str) -> Iterator[None]:
    """Converts errors of the W&B client to ConfigError."""
    try:
        yield
    except UsageError as error:
        raise ConfigError(f"{project}: {str(error).rstrip('.')}", "Run wandb login") from None
    except ValueError as error:
        raise ConfigError(
            f"{project}: {str(error).rstrip('.')}",
            f"Train with WandbLogger(project='{_parse_project(project)[1]}') first, or use"
            " ENTITY/PROJECT as in the project's address",
        ) from None
    except (wandb.Error, WandbApiFailedError) as error:
        raise ConfigError(
            f"{project}: W&B did not answer or denied access ({str(error).strip().rstrip('.')})",
            "Run wandb login as a user with write access, or use --json to print the workspace",
        ) from None
