"""The panels as a saved workspace of a W&B project."""

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
from lightning_adam.reports.panels import SECTIONS, Drawing, Panel
from lightning_adam.statistics.catalogue import STATISTICS, SYMBOLS

try:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    from lightning_adam._compat.wandb_workspaces import (
        WandbApiFailedError,
        give_address,
        saved_workspace,
        spec_of,
    )
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the workspace is built with wandb-workspaces: pip install 'lightning-adam[dashboard]'"
    ) from error

NAME = "Adam"
ADDRESS = "lightningadam"
"""Stands in the workspace's address: by it a second run finds the first's."""
OPTIMIZER = "(optimizer/[^/]+/)?"
"""With several optimizers the scope of the whole model is that of each."""
LAYER_STATISTIC = "update_to_weight"
COMPARED = ("lr", "betas", "eps", "weight_decay")
"""The settings by which runs are compared."""
SETTINGS = "lightning_adam.optimizer"
"""Where AdamMonitor puts them in a run's config."""
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
"""A heat map of the layers' table, in Vega-Lite with W&B's placeholders for fields."""


def workspace_spec(project: str) -> str:
    """The workspace's spec as JSON; no server is asked.

    Args:
        project: `entity/project`.

    Raises:
        ConfigError: If that is no project.

    Example:
        >>> spec = json.loads(workspace_spec("my-team/mnist"))
        >>> [each["name"] for each in spec["section"]["panelBankConfig"]["sections"]][:2]
        ['Overview', 'Gradient']
    """
    entity, name = _split(project)
    spec = spec_of(_workspace(entity, name, f"{entity}/{HEAT_MAP}"))
    return json.dumps(json.loads(spec), indent=2, ensure_ascii=False)


def save_workspace(project: str) -> str:
    """Creates the workspace in a project, or brings it up to date.

    The filters and the runs that were chosen in it stay as they are.

    Args:
        project: `entity/project`.

    Returns:
        Its address.

    Raises:
        ConfigError: If the project cannot be reached or changed.
    """
    entity, name = _split(project)
    with _said_plainly(project):
        heat_map = _heat_map(entity)
        workspace = _workspace(entity, name, heat_map)
        saved = saved_workspace(entity, name, ADDRESS)
        if saved is not None:
            saved.name, saved.sections = workspace.name, workspace.sections
            workspace = saved
        # The library tells on stderr what is returned here.
        with contextlib.redirect_stderr(io.StringIO()):
            workspace.save()
        return f"workspace: {workspace.url}"


def _split(project: str) -> tuple[str, str]:
    entity, separator, name = project.partition("/")
    if not (entity and separator and name) or "/" in name:
        raise ConfigError(
            f"{project} must be ENTITY/PROJECT, as in the project's address",
            f"Use for example lightning-adam dashboard {entity or 'my-team'}/"
            f"{name.rpartition('/')[2] or 'mnist'}",
        )
    return entity, name


def _workspace(entity: str, project: str, heat_map: str | None) -> ws.Workspace:
    sections = []
    for title, panels in SECTIONS.items():
        drawn = [panel for panel in panels if panel.drawing in PANELS]
        matters = [panel for panel in drawn if panel.matters]
        others = [panel for panel in drawn if not panel.matters]
        if matters:
            sections.append(_section(title, matters))
        if others:
            name = f"{title}: all of it" if matters else title
            sections.append(_section(name, others, is_open=False))
    sections[0].panels += [_comparison(), wr.RunComparer(diff_only="split")]
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
            pinned_columns=[f"config:{SETTINGS}.{name}" for name in COMPARED]
        ),
    )
    give_address(workspace, ADDRESS)
    return workspace


def _section(name: str, panels: Sequence[Panel], is_open: bool = True) -> ws.Section:
    drawn = [PANELS[panel.drawing](panel) for panel in panels]
    return ws.Section(name=name, panels=[*drawn, _explained(panels)], is_open=is_open)


def _curves(panel: Panel) -> wr.LinePlot:
    """A line for each run; with several optimizers, for each of them."""
    return wr.LinePlot(
        title=panel.title,
        x=X_AXIS,
        metric_regex=f"^({_of_optimizers(panel.keys)})$",
        title_y=panel.unit or None,
        # What is measured in the gradient's unit spans decades.
        log_y=panel.unit.startswith("gradient") or None,
    )


def _of_optimizers(keys: str) -> str:
    """A pattern of keys of a family, of each optimizer too."""
    return re.sub("(^|[|])(adam_[a-z_]+/)", rf"\1\2{OPTIMIZER}", keys)


def _eps_curve(panel: Panel) -> wr.CustomChart:
    return wr.CustomChart(
        query={"summaryTable": {"tableKey": f"{EPS_CURVE}_table"}},
        chart_name="wandb/lineseries/v0",
        chart_fields={"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"},
        chart_strings={"title": panel.title, "xname": "log10(eps)"},
    )


def _histogram(panel: Panel) -> wr.LinePlot:
    """The only key of a line plot that W&B draws as a map of its bins over the steps."""
    return wr.LinePlot(title=panel.title, x=X_AXIS, y=[DENOMINATOR], title_y="log2")


def _layers(panel: Panel) -> wr.LinePlot:
    """A line for each layer, where layers are among the scopes."""
    key = STATISTICS[LAYER_STATISTIC].key_of("(layer|tensor)/[^/]+/")
    return wr.LinePlot(
        title=f"{panel.title}: {LAYER_STATISTIC}",
        x=X_AXIS,
        metric_regex=f"^{_of_optimizers(key)}$",
        log_y=True,
    )


PANELS: dict[Drawing, Callable[[Panel], Any]] = {
    Drawing.CURVES: _curves,
    Drawing.EPS_CURVE: _eps_curve,
    Drawing.HISTOGRAM: _histogram,
    Drawing.LAYERS: _layers,
}
"""How W&B draws a panel; what the flight recorder writes is a file, of which it draws nothing."""


def _comparison() -> wr.ParallelCoordinatesPlot:
    """What runs were told, beside what came of it."""
    columns = [
        wr.ParallelCoordinatesPlotColumn(wr.Config(f"{SETTINGS}.{name}"), display_name=name)
        for name in COMPARED
    ]
    losses = [wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric("val/loss"))]
    return wr.ParallelCoordinatesPlot(
        title="settings and what came of them", columns=columns + losses
    )


def _explained(panels: Sequence[Panel]) -> wr.MarkdownPanel:
    """What the panels beside it show."""
    lines = []
    for panel in panels:
        parts = [panel.meaning, panel.definition and f"`{panel.definition}`", panel.source]
        lines.append(f"- **{panel.title}**: {' '.join(filter(None, parts))}")
    return wr.MarkdownPanel(markdown="\n".join([*lines, "", SYMBOLS]))


def _heat_map(entity: str) -> str | None:
    """The name of the chart that W&B draws the layers' table with; None where it cannot."""
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
        # It is there from an earlier time; if all is refused, saving the workspace says so.
        return f"{entity}/{HEAT_MAP}"


def _heat_map_panel(chart: str) -> wr.CustomChart:
    return wr.CustomChart(
        query={"historyTable": {"tableKey": LAYERS}},
        chart_name=chart,
        chart_fields={"step": X_AXIS, "layer": "layer", "value": LAYER_STATISTIC},
    )


@contextlib.contextmanager
def _said_plainly(project: str) -> Iterator[None]:
    """Turns what the client raises into what to do."""
    try:
        yield
    except UsageError as error:
        raise ConfigError(f"{project}: {str(error).rstrip('.')}", "Run wandb login") from None
    except ValueError as error:
        raise ConfigError(
            f"{project}: {str(error).rstrip('.')}",
            f"Train with WandbLogger(project='{_split(project)[1]}') first, or use ENTITY/PROJECT"
            " as in the project's address",
        ) from None
    except (wandb.Error, WandbApiFailedError) as error:
        raise ConfigError(
            f"{project}: W&B did not answer or denied access ({str(error).strip().rstrip('.')})",
            "Run wandb login as a user who may write there, or use --json for the spec alone",
        ) from None
