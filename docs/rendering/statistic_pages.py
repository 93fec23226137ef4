"""A page for each statistic, and one with all of them."""

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
from lightning_adam.config.explain import documented
from lightning_adam.config.monitor import Scope
from lightning_adam.findings import RULES
from lightning_adam.reports.panels import SECTIONS
from lightning_adam.statistics.catalogue import STATISTICS, Statistic
from lightning_adam.statistics.columns import Capabilities

FAMILIES = dict.fromkeys(each.family for each in STATISTICS.values())
"""In the catalogue's order."""
PATHS = {Scope.group: "<name>", Scope.layer: "<path>", Scope.tensor: "<name>"}
"""What stands behind the kind of scope in a key."""


def pages() -> dict[str, str]:
    """The pages, by their paths."""
    each = {f"statistics/{name}.md": of(known) for name, known in STATISTICS.items()}
    return {"statistics/index.md": index(), **each}


def navigation() -> list[object]:
    """Where they stand, a family below the other."""
    families = [
        {title(family): [{each.name: f"statistics/{each.name}.md"} for each in members(family)]}
        for family in FAMILIES
    ]
    return ["statistics/index.md", *families]


def members(family: str) -> list[Statistic]:
    """A family's statistics."""
    return [each for each in STATISTICS.values() if each.family == family]


def title(family: str) -> str:
    """A family in words."""
    return family.replace("_", " ").capitalize()


def index() -> str:
    """All statistics, with the symbols of their formulas."""
    parts = []
    for family in FAMILIES:
        rows = [
            (_marked(each), prose(each.meaning), code(each.formula)) for each in members(family)
        ]
        parts += [f"## {title(family)}", table(("statistic", "meaning", "definition"), rows)]
    return page(
        "Statistics",
        prose(
            f"{len(STATISTICS)} numbers say what Adam does. Those in bold are logged by default. To"
            " log all of them, or more of them:"
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
    """One statistic's page."""
    entries = [
        ("Key", code(known.key)),
        ("Definition", code(known.formula)),
        ("Unit", prose(known.unit)),
        ("Source", prose(known.source)),
        ("Logged by default", "yes" if known.is_headline else "no"),
        ("Scopes", _scopes(known)),
        ("What the optimizer has to tell", _needs(known)),
        ("Findings that are judged by it", _rules(known, "statistics")),
        ("Findings that show it", _rules(known, "evidence")),
        ("Panels of the report and of W&B", _panels(known)),
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
        "## To log it",
        prose(
            "In the model; also of each group and layer; and the tensors with the largest values:"
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
    """What the statistic needs, in the words of `Capabilities`."""
    if known.needs is Capabilities.SETTINGS:
        return "nothing but its parameters and settings: it is measured of any"
    asked = [each for each in documented(Capabilities) if _is_one_of(each.name, known.needs)]
    return " ".join(prose(each.meaning) for each in asked)


def _is_one_of(name: str, needs: Capabilities) -> bool:
    one = Capabilities[name]
    return one not in (Capabilities.SETTINGS, Capabilities.ALL) and one in needs


def _rules(known: Statistic, role: str) -> str:
    return ", ".join(
        finding(code) for code, rule in RULES.items() if known.name in getattr(rule, role)
    )


def _panels(known: Statistic) -> str:
    drawn = [
        (panel.title, section)
        for section, panels in SECTIONS.items()
        for panel in panels
        if panel.draws(known.key)
    ]
    return ", ".join(f"{code(title)} in {plain(section)}" for title, section in drawn)
