"""A story's parts in words, for the text, the page and the console alike."""

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import fields

from lightning_adam.config.errors import format_value
from lightning_adam.tune.decision import gain_of, told
from lightning_adam.tune.dimensions import DIMENSIONS
from lightning_adam.tune.point import Point
from lightning_adam.tune.story import Outcome, Step, Story, Trial, seconds_of, sign_of

AS_CONFIGURED = "The app's own settings are the best that was found."
"""What is said where nothing has to be typed."""
NAMED = 4
"""The settings that are named of those to which the same happened."""
ENDS = {
    Outcome.complete: "complete",
    Outcome.stopped: "stopped early",
    Outcome.failed: "failed",
    Outcome.running: "under way",
}
"""The outcomes in words."""


def line_to_type(story: Story) -> str:
    """What is typed for the best settings, as a line of a shell; empty if nothing has to be.

    Example:
        >>> overrides = ["optimizer.betas=[0.9,0.95]"]
        >>> line_to_type(Story("mnist", "mnist", "maximize", 20, 2, [], [], overrides=overrides))
        "'optimizer.betas=[0.9,0.95]'"
    """
    return shlex.join([*story.fixed, *story.overrides])


def in_a_line(text: str) -> str:
    r"""What somebody has typed, without what breaks a line or cannot be seen.

    Example:
        >>> print(in_a_line("out of memory\n  on device 0\x1b"))
        out of memory on device 0\x1b
    """
    line = " ".join(text.split())
    if line.isprintable():
        return line
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)


def number(value: float | None) -> str:
    """A metric as it is shown; empty if there is none.

    Example:
        >>> number(0.123456)
        '0.12346'
    """
    return "" if value is None else f"{value:.5g}"


def gain(step: Step) -> str:
    """By how much the best that a stage has tried is better than what it began with.

    Example:
        >>> from lightning_adam.tune.story import Score
        >>> score = Score(Point(1e-3), (0.4,), 0.4, None)
        >>> gain(Step("lr", score, score, score, 0.1, 0.02, "taken"))
        '+0.1 ± 0.02'
    """
    challenger = step.challenger
    few = challenger is not None and len(challenger.values) < len(step.before.values)
    gained = _gained(step.gain, step.spread)
    return f"{gained}, with the first seed alone" if few and gained else gained


def changes(before: Point, after: Point) -> str:
    """What differs between two points, the second one's values.

    Example:
        >>> changes(Point(1e-3, betas=(0.9, 0.999)), Point(2e-3, betas=(0.9, 0.95)))
        'lr=0.002 betas=[0.9,0.95]'
        >>> changes(Point(1e-3), Point(1e-3))
        'as configured'
    """
    different = [
        f"{each.name}={format_value(getattr(after, each.name))}"
        for each in fields(after)
        if getattr(after, each.name) != getattr(before, each.name)
    ]
    return " ".join(different) or "as configured"


def searched_values(step: Step, point: Point) -> list[str]:
    """A point's values of what a stage has searched.

    Example:
        >>> from lightning_adam.tune.story import Score
        >>> score = Score(Point(1e-3), (0.4,), 0.4, None)
        >>> step = Step("lr", score, score, None, None, None, "", dimensions=("lr", "warmup_ratio"))
        >>> searched_values(step, Point(3e-4))
        ['0.0003', 'as configured']
    """
    return [searched_value(name, point) for name in step.dimensions]


def searched_value(name: str, point: Point) -> str:
    """A point's value of a dimension.

    Example:
        >>> searched_value("decay_per_step", Point(0.03, None, None, 0.07, True))
        '0.0021'
    """
    value = DIMENSIONS[name].read(point)
    if value is None:
        return "as configured"
    if isinstance(value, float):
        # Without the digits that a product makes up.
        return f"{value:.{4 if name.startswith('decay_') else 10}g}"
    return format_value(value)


def duration(seconds: float) -> str:
    """How long something took, in two units at most.

    Example:
        >>> duration(4.25), duration(192), duration(7500)
        ('4.2 s', '3 min 12 s', '2 h 5 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if round(seconds) < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def ends(trials: Iterable[Trial]) -> str:
    """How many trials ended in which way.

    Example:
        >>> ends([Trial("lr", 3, Point(1e-3), 0, Outcome.complete, 0.41)])
        '1 complete'
    """
    found = [each.outcome for each in trials]
    counts = {outcome: found.count(outcome) for outcome in ENDS}
    return ", ".join(f"{count} {ENDS[outcome]}" for outcome, count in counts.items() if count)


def summary(story: Story) -> str:
    """The story in a paragraph.

    Example:
        >>> summary(Story("mnist", "mnist", "maximize", 20, 2, [], []))  # doctest: +ELLIPSIS
        'The search of mnist is under way, and this is what it has come to so far: 0 of at most...
    """
    state = "is over" if story.is_over else "is under way, and this is what it has come to so far"
    best = "smallest" if story.direction == "minimize" else "largest"
    seeds = "1 seed, so that no spread is known" if story.n_seeds == 1 else f"{story.n_seeds} seeds"
    sentences = [
        f"The search of {in_a_line(story.job)} {state}: {len(story.trials)} of at most"
        f" {story.n_trials} trials, for the {best} metric, with {seeds}.",
        result(story),
    ]
    if story.trials:
        spent = duration(seconds_of(story.trials))
        sentences.append(f"The trials: {ends(story.trials)}. All trainings together took {spent}.")
    return " ".join(sentences)


def result(story: Story) -> str:
    """What the search has come to, in a sentence.

    Example:
        >>> from lightning_adam.tune.story import Score
        >>> score = Score(Point(1e-3), (0.4, 0.5), 0.45, 0.0707)
        >>> step = Step("start", score, score, None, None, None, "")
        >>> result(Story("mnist", "mnist", "minimize", 20, 2, [step], []))
        "The best are still the app's own settings, with a metric of 0.45 ± 0.071."
    """
    if not story.steps or not math.isfinite(story.incumbent.mean):
        return "No training has ended with a finite metric."
    first, best = story.steps[0].after, story.incumbent
    if best.point == first.point:
        return f"The best are still the app's own settings, with a metric of {told(best)}."
    if not math.isfinite(first.mean):
        return f"The app's own settings have no finite metric; the best found has {told(best)}."
    better = _gained(*gain_of(first, best, sign_of(story.direction)))
    return f"The metric goes from {told(first)} to {told(best)}, a gain of {better}."


def settings_of(story: Story, trials: Sequence[Trial]) -> str:
    """With which settings trials were run, each once.

    Example:
        >>> score = Trial("lr", 3, Point(1e-3), 0, Outcome.complete, 0.41)
        >>> settings_of(Story("mnist", "mnist", "maximize", 20, 2, [], [score]), [score])
        'lr=0.001'
    """
    different = list(dict.fromkeys(changes(story.start, each.point) for each in trials))
    more = f"; and {len(different) - NAMED} more" if len(different) > NAMED else ""
    return "; ".join(different[:NAMED]) + more


def _gained(better: float | None, spread: float | None) -> str:
    if better is None:
        return ""
    return f"{better:+.4g}" + (", spread unknown" if spread is None else f" ± {spread:.2g}")
