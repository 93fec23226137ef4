"""A story as a page that needs no network: `tune.html`, with the pictures in it."""

import functools

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from lightning_adam.tune.charts import colours_of, path_chart, response_charts
from lightning_adam.tune.decision import told
from lightning_adam.tune.point import Point
from lightning_adam.tune.story import Story, Trial, seconds_of
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
    settings_of,
    summary,
)
from lightning_adam.version import __version__

COLOURS = 7
"""How many the stages have, besides the one of the app's own settings."""


def page(story: Story) -> str:
    """The story of a search, as HTML.

    Example:
        >>> "<h1>Adam tuned: mnist" in page(Story("mnist", "mnist", "maximize", 20, 2, [], []))
        True
    """
    return (
        _environment()
        .get_template("tune.html")
        .render(
            version=__version__,
            story=story,
            summary=summary(story),
            line=line_to_type(story),
            as_configured=AS_CONFIGURED,
            path=path_chart(story),
            responses=response_charts(story),
            colours={stage: _colour(place) for stage, place in colours_of(story).items()},
            longest=max((seconds_of(story.of_stage(each)) for each in story.stages), default=0),
        )
    )


@functools.cache
def _environment() -> Environment:
    """Made once: the page is written after each batch."""
    loaders = [
        PackageLoader("lightning_adam.tune", "page"),
        PackageLoader("lightning_adam.reports", "page"),
    ]
    environment = Environment(
        loader=ChoiceLoader(loaders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "ENDS": ENDS,
        "changes": changes,
        "colour": _colour,
        "duration": duration,
        "ends": ends,
        "gain": gain,
        "key": _key,
        "number": number,
        "seconds_of": seconds_of,
        "settings_of": settings_of,
        "told": told,
        "told_of": _told_of,
    }
    environment.filters["in_a_line"] = in_a_line
    return environment


def _colour(place: int) -> int:
    return place and 1 + (place - 1) % COLOURS


def _key(trial: Trial) -> str:
    return in_a_line(f"{trial.stage}/{trial.number}")


def _told_of(trial: Trial, start: Point) -> str:
    """What is said of a trial where the pointer rests on it."""
    lines = [
        f"{_key(trial)}: {ENDS[trial.outcome]}",
        changes(start, trial.point),
        "" if trial.value is None else f"metric {trial.value:.6g}",
        "" if trial.seed is None else f"seed {trial.seed}",
        duration(trial.seconds) if trial.seconds else "",
        trial.error,
        f"AdamMonitor: {', '.join(trial.findings)}" if trial.findings else "",
        trial.folder,
    ]
    return "\n".join(in_a_line(each) for each in lines if each)
