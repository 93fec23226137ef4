"""A story as text: `tune.md`, whose last line is the one to paste."""

import re
from collections.abc import Iterable, Sequence

from lightning_adam.tune.decision import told
from lightning_adam.tune.dimensions import DIMENSIONS
from lightning_adam.tune.story import Step, Story, Trial, seconds_of
from lightning_adam.tune.wording import (
    AS_CONFIGURED,
    ENDS,
    changes,
    duration,
    ends,
    gain,
    in_a_line,
    line_to_type,
    number,
    searched_values,
    settings_of,
    summary,
)

Row = Sequence[str]


def page(story: Story) -> str:
    """The story of a search, as Markdown.

    Example:
        >>> text = page(Story("mnist", "mnist", "maximize", 20, 2, [], [], fixed=["data=small"]))
        >>> text.splitlines()[0], text.splitlines()[-1]
        ('# Adam tuned: mnist', 'data=small')
    """
    parts = [
        f"# Adam tuned: {_plain(story.name)}",
        _plain(summary(story)),
        *_path(story),
        *(part for step in story.steps if step.dimensions for part in _response(story, step)),
        *_failures(story),
        *_findings(story),
        *_cost(story),
        "## What to type",
        # Nothing may follow it: it is what a script takes.
        line_to_type(story) or AS_CONFIGURED,
    ]
    return "\n\n".join(parts) + "\n"


def _path(story: Story) -> list[str]:
    """From the app's own settings to the best, stage by stage."""
    head = ("stage", "searched", "trials", "before", "best tried", "gain", "after", "decision")
    rows = [
        (
            step.stage,
            ", ".join(step.dimensions) or "nothing",
            str(len(story.of_stage(step.stage))),
            told(step.before),
            _best_tried(step),
            gain(step),
            told(step.after),
            step.words,
        )
        for step in story.steps
    ]
    skipped = [f"- **{_plain(stage)}**: {_plain(why)}" for stage, why in story.skipped.items()]
    return [
        "## Stage by stage",
        *([_table(head, rows)] if rows else ["No stage has begun."]),
        *(["Left out:", "\n".join(skipped)] if skipped else []),
    ]


def _best_tried(step: Step) -> str:
    if step.challenger is None:
        return ""
    return f"{changes(step.before.point, step.challenger.point)}: {told(step.challenger)}"


def _response(story: Story, step: Step) -> list[str]:
    """What a stage has tried, in the order of what it searched."""
    before, trials = story.of_incumbent(step), story.of_stage(step.stage)
    rows = [
        (
            *searched_values(step, each.point),
            _seed(each),
            number(each.value),
            ENDS[each.outcome],
            duration(each.seconds),
            _place(step, each, each in before),
        )
        for each in sorted([*before, *trials], key=lambda each: _order(step, each))
    ]
    head = (*step.dimensions, "seed", "metric", "outcome", "time", "")
    return [f"## {_plain(step.stage)}", _table(head, rows) if rows else "No trial has begun."]


def _place(step: Step, trial: Trial, is_before: bool) -> str:
    """What a trial's point is for the stage."""
    is_after = trial.point == step.after.point
    if is_before:
        return "began here, and stays" if is_after and step.is_over else "began here"
    if is_after:
        return "taken"
    is_best = step.challenger is not None and trial.point == step.challenger.point
    return "best tried" if is_best else ""


def _order(step: Step, trial: Trial) -> list[float]:
    values = [DIMENSIONS[name].read(trial.point) for name in step.dimensions]
    return [-1.0 if value is None else float(value) for value in values]


def _failures(story: Story) -> list[str]:
    rows = [
        (str(len(trials)), error or "nothing is known", settings_of(story, trials))
        for error, trials in story.failures.items()
    ]
    return ["## Failures", _table(("trials", "error", "settings"), rows)] if rows else []


def _findings(story: Story) -> list[str]:
    rows = [
        (code, str(len(trials)), settings_of(story, trials))
        for code, trials in story.findings.items()
    ]
    said = "What AdamMonitor said of the trainings; `lightning-adam explain` tells what it means."
    head = ("finding", "trials", "settings")
    return ["## Findings", said, _table(head, rows)] if rows else []


def _cost(story: Story) -> list[str]:
    rows = [(stage, *_spent(story.of_stage(stage))) for stage in story.stages]
    total = ("together", *_spent(story.trials))
    return ["## Cost", _table(("stage", "trials", "of them", "time"), [*rows, total])]


def _spent(trials: Sequence[Trial]) -> Row:
    return str(len(trials)), ends(trials), duration(seconds_of(trials))


def _seed(trial: Trial) -> str:
    return "" if trial.seed is None else str(trial.seed)


def _table(head: Row, rows: Iterable[Row]) -> str:
    lines = [head, ["---"] * len(head), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """A text that Markdown shows as it is, in a table too."""
    # Within a word an underscore is one; brackets are a link only with the parenthesis.
    return re.sub(r"[\\`*<>|~&]|_(?!\w)|(?<!\w)_|(?<=\])\(", r"\\\g<0>", in_a_line(text))
