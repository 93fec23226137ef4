"""A page for each finding, and one with all of them."""

import inspect
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from docs.rendering.text import (
    block,
    code,
    definitions,
    finding,
    page,
    plain,
    prose,
    statistic,
    table,
)
from lightning_adam.config.explain import documented
from lightning_adam.config.monitor import Severity
from lightning_adam.config.optimizer import AdamConfig
from lightning_adam.findings import RULES
from lightning_adam.findings.preflight import EARLY
from lightning_adam.findings.rule import Case, Rule, Training
from lightning_adam.findings.showing import judged, remedy, settings_typed, to_type
from lightning_adam.statistics.catalogue import STATISTICS

MEASURED = [rule for rule in RULES.values() if not rule.is_foreseen]
FORESEEN = [rule for rule in RULES.values() if rule.is_foreseen]
FAULTS = Path(__file__).parents[2] / "recipes/conf/fault"
PRECISIONS = ("float32", "bfloat16")
"""Dtypes of the parameters for which a remedy is shown."""
STEPS = 10_000
VALUES = dict.fromkeys(STATISTICS, 1.0) | {"rms_ratio": 5.0, "eps": AdamConfig.eps}
"""What a training that is ill might measure."""
DENOMINATOR = 1e-9
"""What 1 % of its √v̂ might be below."""


def pages() -> dict[str, str]:
    """The pages, by their paths."""
    each = {f"findings/{name}.md": of(rule) for name, rule in RULES.items()}
    return {"findings/index.md": index(), **each}


def navigation() -> list[object]:
    """Where they stand."""
    parts = {"While it trains": MEASURED, "Before the first step": FORESEEN}
    return [
        "findings/index.md",
        *(
            {title: [{each.code: f"findings/{each.code}.md"} for each in rules]}
            for title, rules in parts.items()
        ),
    ]


def index() -> str:
    """All findings, those apart that are told before the first step."""
    return page(
        "Findings",
        prose(
            "What AdamMonitor says of a training that is ill: what is wrong, the numbers that prove"
            " it, and what to type. Each has thresholds that can be set, and can be switched off."
        ),
        block("bash", ["lightning-adam explain findings", "lightning-adam explain eps_dominates"]),
        "## While it trains",
        _listed(MEASURED),
        "## Before the first step",
        _listed(FORESEEN),
        prose("Some of those above can be told before the first step too: ")
        + ", ".join(map(finding, EARLY))
        + ".",
        "## Severity",
        definitions((word.name, prose(word.meaning)) for word in documented(Severity)),
    )


def _listed(rules: Iterable[Rule]) -> str:
    rows = [(finding(each.code), each.severity.value, prose(_summary(each))) for each in rules]
    return table(("finding", "severity", "what is wrong"), rows)


def _summary(rule: Rule) -> str:
    """The first sentence of its meaning."""
    return " ".join((inspect.getdoc(rule.condition) or "").partition("\n\n")[0].split())


def of(rule: Rule) -> str:
    """One finding's page."""
    severities = {word.name: word.meaning for word in documented(Severity)}
    entries = [
        ("It says", _sentence(rule)),
        ("Severity", f"{rule.severity}: {prose(severities[rule.severity.value])}"),
        ("When", prose(judged(rule)) + (_EARLY if rule.code in EARLY else "")),
        ("Shown with it", ", ".join(map(statistic, rule.evidence))),
        ("Not raised while one of these holds", ", ".join(map(finding, rule.explained_by))),
        ("Not raised while it holds", ", ".join(map(finding, _explains(rule)))),
        ("Source", prose(rule.source)),
    ]
    return page(
        code(rule.code),
        prose(rule.meaning),
        definitions(entries),
        "## The condition",
        block("python", [rule.definition]),
        *_judged_by(rule),
        "## What to type against it",
        prose(remedy(rule)),
        *_examples(rule),
        "## What can be set of it",
        block("bash", [f"python train.py {typed}" for typed in settings_typed(rule)]),
        *_clinic(rule),
    )


def _judged_by(rule: Rule) -> list[str]:
    """The statistics of the condition, as they are defined."""
    if not rule.statistics:
        return []
    formulas = [(statistic(name), code(STATISTICS[name].formula)) for name in rule.statistics]
    legend = "[The symbols](../statistics/index.md#symbols) are those of all statistics."
    return [definitions(formulas), legend]


_EARLY = "; it can be told before the first step too"


def _explains(rule: Rule) -> list[str]:
    return [each.code for each in RULES.values() if rule.code in each.explained_by]


def _sentence(rule: Rule) -> str:
    """What it says, with the names of the numbers that it is said with."""
    parts = re.split(r"\{(\w+)[^}]*\}", rule.sentence)
    return "".join(_blank(part) if place % 2 else plain(part) for place, part in enumerate(parts))


def _blank(name: str) -> str:
    return statistic(name) if name in STATISTICS else code(name)


def example(rule: Rule, dtype: str) -> list[str]:
    """What it would say to type in a training with AdamW's defaults."""
    settings = asdict(AdamConfig(weight_decay=0.01, decoupled_weight_decay=True))
    training = Training(
        defaults=settings,
        dtypes=frozenset({dtype}),
        peak_lr=settings["lr"],
        total_steps=STEPS,
        steps_per_epoch=STEPS / 10,
    )
    case = Case(VALUES, training, lambda: DENOMINATOR)
    return [line.strip() for line in to_type(rule.remedy(case))]


def _examples(rule: Rule) -> list[str]:
    """A remedy by example, once where the precision does not matter."""
    lines = {dtype: example(rule, dtype) for dtype in PRECISIONS}
    is_same = len({*map(tuple, lines.values())}) == 1
    shown = {"": lines[PRECISIONS[0]]} if is_same else lines
    parts = []
    for dtype, each in shown.items():
        of_dtype = f", with parameters in {dtype}" if dtype else ""
        parts.append(
            prose(f"In a training of {STEPS:,} steps with AdamW's defaults{of_dtype}, for example:")
        )
        parts.append(block("text", each))
    return parts


def faults() -> dict[str, tuple[str, str]]:
    """The options of `recipes/conf/fault` and what they plant, by the finding that tells of it."""
    found = {}
    for file in sorted(FAULTS.glob("*.yaml")):
        comment = file.read_text(encoding="utf-8").splitlines()[1].removeprefix("# ")
        name, _, planted = comment.partition(": ")
        if name in RULES:
            found[name] = (file.stem, planted)
    return found


def _clinic(rule: Rule) -> list[str]:
    """How to see it, where the clinic has it."""
    fault, planted = faults().get(rule.code, ("", ""))
    if not fault:
        return []
    return [
        "## See it",
        prose(
            f"{planted[:1].upper()}{planted[1:]} The clinic trains so, types the remedy, and trains"
            " again:"
        ),
        block("bash", [f"python -m recipes.clinic fault={fault}"]),
    ]
