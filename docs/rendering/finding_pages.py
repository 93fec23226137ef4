"""A page for each finding and each preflight notice, and one that lists them."""

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
from lightning_adam.config.explain import field_docs
from lightning_adam.config.monitor import Severity
from lightning_adam.config.optimizer import AdamConfig
from lightning_adam.findings import RULES
from lightning_adam.findings.context import History, RuleContext, RunFacts, RunningSummary
from lightning_adam.findings.describe import (
    describe_suggestions,
    format_condition,
    format_settings,
    suggestion_summary,
    when_judged,
)
from lightning_adam.findings.preflight import NOTICES, Notice
from lightning_adam.findings.rule import Rule
from lightning_adam.statistics.catalogue import STATISTICS

DURING = "While the run trains"
BEFORE = "Before the first step"
FAULTS = Path(__file__).parents[2] / "recipes/diagnostics/conf/fault"
PRECISIONS = ("float32", "bfloat16")
"""Dtypes of the parameters for which suggestions are shown."""
STEPS = 10_000
VALUES = dict.fromkeys(STATISTICS, 1.0) | {"rms_ratio": 5.0, "eps": AdamConfig.eps}
"""Statistics of the example."""
DENOMINATOR = 1e-9
"""The value that 1 % of the √v̂ of the example are below."""


def pages() -> dict[str, str]:
    """Returns the pages by their paths."""
    each = {f"findings/{name}.md": page_of(rule) for name, rule in (RULES | NOTICES).items()}
    return {"findings/index.md": index(), **each}


def navigation() -> list[object]:
    """Returns their entries in the navigation."""
    parts: dict[str, Iterable[str]] = {DURING: RULES, BEFORE: NOTICES}
    return [
        "findings/index.md",
        *(
            {title: [{name: f"findings/{name}.md"} for name in part]}
            for title, part in parts.items()
        ),
    ]


def index() -> str:
    """Returns the page that lists the findings and the notices."""
    return page(
        "Findings",
        "Look up a finding that `AdamMonitor` printed. [The guide](../guides/findings.md) explains"
        " how to read, configure and switch off findings.",
        block("bash", ["lightning-adam explain findings", "lightning-adam explain eps_dominates"]),
        f"## {DURING}",
        _listed(RULES.values()),
        f"## {BEFORE}",
        "Preflight notices are about the settings of a run. They never stop it.",
        _listed(NOTICES.values()),
        "## Severity",
        definitions((word.name, prose(word.meaning)) for word in field_docs(Severity)),
    )


def _listed(rules: Iterable[Rule | Notice]) -> str:
    rows = [(finding(each.code), each.severity.value, prose(_summary(each))) for each in rules]
    return table(("finding", "severity", "meaning"), rows)


def _summary(rule: Rule | Notice) -> str:
    """The first paragraph of its meaning."""
    return " ".join((rule.condition.__doc__ or "").partition("\n\n")[0].split())


def page_of(rule: Rule | Notice) -> str:
    """Returns the page of a finding or a notice."""
    severities = {word.name: word.meaning for word in field_docs(Severity)}
    entries = [
        ("Message", _sentence(rule.sentence)),
        ("Severity", f"{rule.severity}: {prose(severities[rule.severity.value])}"),
        ("When", prose(when_judged(rule))),
        *(_relations(rule) if isinstance(rule, Rule) else []),
        ("Source", prose(rule.source)),
    ]
    return page(
        code(rule.code),
        prose(rule.meaning),
        definitions(entries),
        *(_condition(rule) if isinstance(rule, Rule) else []),
        *_suggestions(rule),
        "## Settings",
        block("bash", [f"python train.py {setting}" for setting in format_settings(rule)]),
        *_clinic(rule),
    )


def _relations(rule: Rule) -> list[tuple[str, str]]:
    suppressed = [each.code for each in RULES.values() if rule.code in each.suppressed_by]
    return [
        ("Evidence", ", ".join(map(statistic, (*rule.statistics, *rule.evidence)))),
        ("Suppressed by", ", ".join(map(finding, rule.suppressed_by))),
        ("Suppresses", ", ".join(map(finding, suppressed))),
    ]


def _condition(rule: Rule) -> list[str]:
    """The condition in words, and the definitions of its statistics."""
    parts = ["## Condition", f"Raised when {prose(format_condition(rule))}"]
    if rule.statistics:
        formulas = [(statistic(name), code(STATISTICS[name].formula)) for name in rule.statistics]
        symbols = "[Symbols](../statistics/index.md#symbols) of the formulas."
        parts += [definitions(formulas), symbols]
    return parts


def _sentence(sentence: str) -> str:
    """A sentence with the names of its numbers."""
    parts = re.split(r"\{(\w+)[^}]*\}", sentence)
    return "".join(_blank(part) if place % 2 else plain(part) for place, part in enumerate(parts))


def _blank(name: str) -> str:
    return statistic(name) if name in STATISTICS else code(name)


def example(rule: Rule | Notice, dtype: str) -> list[str]:
    """Returns the suggestions for a run with AdamW's defaults, a line each.

    Args:
        rule: The rule or the notice.
        dtype: The dtype of the parameters.
    """
    settings = asdict(AdamConfig(weight_decay=0.01, decoupled_weight_decay=True))
    run = RunFacts(
        defaults=settings,
        dtypes=frozenset({dtype}),
        schedule={"name": "cosine", "warmup_steps": 0, "total_steps": STEPS // 2},
        peak_lr=settings["lr"],
        total_steps=STEPS,
        steps_per_epoch=STEPS / 10,
        samples_per_step=256 if isinstance(rule, Rule) else 8,
        every_n_steps=50,
    )
    history = History({"grad_norm": RunningSummary.of(0.5)})
    context = RuleContext(VALUES, run, history, low_denominator=lambda: DENOMINATOR)
    return [line.strip() for line in describe_suggestions(rule.suggest(context))]


def _suggestions(rule: Rule | Notice) -> list[str]:
    """What is suggested, with an example; one for each precision where they differ."""
    summary = suggestion_summary(rule)
    if not summary:
        return []
    lines = {dtype: example(rule, dtype) for dtype in PRECISIONS}
    if len({*map(tuple, lines.values())}) == 1:
        lines = {"": lines[PRECISIONS[0]]}
    elif isinstance(rule, Notice):
        # A notice on a dtype does not appear in float32.
        del lines[PRECISIONS[0]]
    parts = ["## Suggestion", prose(summary)]
    for dtype, each in lines.items():
        if each:
            of_dtype = f" and parameters in {dtype}" if dtype else ""
            parts.append(prose(f"Example, in a run of {STEPS:,} steps with AdamW{of_dtype}:"))
            parts.append(block("text", each))
    return parts


def faults() -> dict[str, tuple[str, str]]:
    """Returns the name and the description of each fault of the clinic, by its finding."""
    found = {}
    for file in sorted(FAULTS.glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        name = re.search(r"^finding: (\w+)$", text, re.MULTILINE)
        if name:
            found[name[1]] = (file.stem, text.splitlines()[1].removeprefix("# "))
    return found


def _clinic(rule: Rule | Notice) -> list[str]:
    """The command that reproduces it, where the clinic has its fault."""
    fault, planted = faults().get(rule.code, ("", ""))
    if not fault:
        return []
    return [
        "## Reproduce",
        prose(f"{planted} The recipe trains with this fault, and again with a remedy:"),
        block("bash", [f"python -m recipes.diagnostics.clinic fault={fault}"]),
    ]
