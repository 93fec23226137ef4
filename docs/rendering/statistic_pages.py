"""A page for each statistic, and one that lists them."""

from docs.rendering.text import (
    block,
    code,
    definitions,
    finding,
    page,
    plain,
    prose,
    statistic,
    symbols,
    table,
)
from lightning_adam.config.errors import format_override
from lightning_adam.config.explain import field_docs
from lightning_adam.config.monitor import Scope
from lightning_adam.findings import RULES
from lightning_adam.reports.charts import SECTIONS
from lightning_adam.statistics.catalogue import STATISTICS, Statistic
from lightning_adam.statistics.columns import Capabilities

FAMILIES = dict.fromkeys(each.family for each in STATISTICS.values())
"""In the order of the catalogue."""
PATHS = {Scope.group: "<name>", Scope.layer: "<path>", Scope.tensor: "<name>"}
"""The name in a key, by kind of scope."""


def pages() -> dict[str, str]:
    """Returns the pages by their paths."""
    each = {f"statistics/{name}.md": of(known) for name, known in STATISTICS.items()}
    return {"statistics/index.md": index(), **each}


def navigation() -> list[object]:
    """Returns their entries in the navigation, by family."""
    families = [
        {title(family): [{each.name: f"statistics/{each.name}.md"} for each in members(family)]}
        for family in FAMILIES
    ]
    return ["statistics/index.md", *families]


def members(family: str) -> list[Statistic]:
    """Returns the statistics of a family."""
    return [each for each in STATISTICS.values() if each.family == family]


def title(family: str) -> str:
    """Returns the title of a family."""
    return family.replace("_", " ").capitalize()


def index() -> str:
    """Returns the page that lists the statistics, with the symbols of their formulas."""
    parts = []
    for family in FAMILIES:
        rows = [
            (_marked(each), prose(each.meaning), code(each.formula)) for each in members(family)
        ]
        parts += [f"## {title(family)}", table(("statistic", "meaning", "definition"), rows)]
    return page(
        "Statistics",
        prose(
            f"Look up one of {len(STATISTICS)} statistics. Those in bold are logged by default. Log"
            " all of them, or some more:"
        ),
        block(
            "bash", [f"python train.py {_typed(each)}" for each in ("all", ["headline", "eps_*"])]
        ),
        "## Symbols",
        symbols(),
        *parts,
    )


def _typed(selection: object) -> str:
    return format_override("adam_monitor.statistics", selection)


def _marked(known: Statistic) -> str:
    return f"**{statistic(known.name)}**" if known.is_headline else statistic(known.name)


def of(known: Statistic) -> str:
    """Returns the page of a statistic."""
    entries = [
        ("Key", code(known.key)),
        ("Definition", code(known.formula)),
        ("Unit", prose(known.unit)),
        ("Source", prose(known.source)),
        ("Logged by default", "yes" if known.is_headline else "no"),
        ("Scopes", _scopes(known)),
        ("Requires of the optimizer", _needs(known)),
        ("Findings that judge it", _rules(known, "statistics")),
        ("Findings with it as evidence", _rules(known, "evidence")),
        ("Charts of the report and of W&B", _charts(known)),
    ]
    typed: dict[str, object] = {
        "adam_monitor.statistics": ["headline", *([] if known.is_headline else [known.name])],
        "adam_monitor.scopes": [scope.value for scope in list(Scope)[:3]],
        "adam_monitor.worst": {known.name: 3},
    }
    lines = [f"python train.py {format_override(key, value)}" for key, value in typed.items()]
    return page(
        code(known.name),
        prose(known.meaning),
        definitions(entries),
        "## Log it",
        prose(
            "For the model, for each group and layer, and for the tensors with the largest values:"
        ),
        block("bash", [*lines, f"lightning-adam explain {known.name}"]),
        "## Symbols",
        symbols(),
    )


def _scopes(known: Statistic) -> str:
    parts = {scope: f"{scope}/{path}/" for scope, path in PATHS.items()}
    keys = [f"{scope}: {code(known.key_of(parts.get(scope, '')))}" for scope in Scope]
    return "<br>".join([*keys, f"worst: {code(known.key_of('worst_1/'))}"])


def _needs(known: Statistic) -> str:
    """What the statistic needs, as `Capabilities` describes it."""
    if known.needs is Capabilities.SETTINGS:
        return "parameters and settings only, so it is measured for any optimizer"
    asked = [each for each in field_docs(Capabilities) if _is_one_of(each.name, known.needs)]
    return " ".join(prose(each.meaning) for each in asked)


def _is_one_of(name: str, needs: Capabilities) -> bool:
    one = Capabilities[name]
    return one not in (Capabilities.SETTINGS, Capabilities.ALL) and one in needs


def _rules(known: Statistic, role: str) -> str:
    return ", ".join(
        finding(code) for code, rule in RULES.items() if known.name in getattr(rule, role)
    )


def _charts(known: Statistic) -> str:
    drawn = [
        (chart.title, section)
        for section, charts in SECTIONS.items()
        for chart in charts
        if chart.draws(known.key)
    ]
    return ", ".join(f"{code(title)} in {plain(section)}" for title, section in drawn)
