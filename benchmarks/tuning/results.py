"""The results of the searches, and their tables."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import ttest_rel

OWN = ("lightning_adam 7", "lightning_adam 20")
MAX_REGRET = 1.0
ALPHA = 0.05

Losses = dict[str, dict[str, dict[str, list[float | None]]]]
"""App, start, method with its budget such as `tpe 20`, and search seed → validation loss."""


@dataclass(frozen=True)
class Comparison:
    """For how many apps a method is better, as good, or worse."""

    wins: int = 0
    ties: int = 0
    losses: int = 0

    def __str__(self) -> str:
        return f"{self.wins} / {self.ties} / {self.losses}"


def regrets(losses: Losses, defaults: Mapping[str, float]) -> Losses:
    """Losses as shares of the possible gain.

    Args:
        losses: Of all searches.
        defaults: The loss of each app with the defaults of AdamW.

    Returns:
        0 for the best configuration that any search found for the app, and 1 for one that is no
        better than the defaults.
    """
    found: Losses = {}
    for app, starts in losses.items():
        cells = [cell for start in starts.values() for cell in start.values()]
        best = min((loss for cell in cells for loss in _known(cell)), default=math.nan)
        gain = defaults[app] - best
        found[app] = {
            start: {
                name: [
                    None if loss is None else min((loss - best) / gain, MAX_REGRET) for loss in cell
                ]
                for name, cell in row.items()
            }
            for start, row in starts.items()
        }
    return found


def compare(apps: Sequence[Sequence[Sequence[float | None]]]) -> Comparison:
    """Compares two methods by paired t-tests over the searches of each app.

    Args:
        apps: The regrets of the two methods, in the same order of starts and search seeds.
    """
    outcomes = {-1: 0, 0: 0, 1: 0}
    for app in apps:
        pairs = [pair for pair in zip(*app, strict=True) if None not in pair]
        first, second = np.array(pairs, float).T
        # Without a spread the test has no p-value.
        is_constant = np.ptp(second - first) == 0
        is_significant = is_constant or ttest_rel(first, second).pvalue < ALPHA
        outcomes[int(np.sign(np.mean(second - first))) if is_significant else 0] += 1
    return Comparison(outcomes[1], outcomes[0], outcomes[-1])


def tables(losses: Losses, defaults: Mapping[str, float], own: Sequence[str] = OWN) -> str:
    """Mean regrets by method and start, and by method, app and start.

    A method and budget without a search for each app and start is left out.

    Args:
        losses: Of all searches.
        defaults: The loss of each app with the defaults of AdamW.
        own: The methods and budgets that the others are compared with.
    """
    found = regrets(losses, defaults)
    cells = {(app, start): row for app, rows in found.items() for start, row in rows.items()}
    every = dict.fromkeys(name for row in cells.values() for name in row)
    names = [name for name in every if all(_known(row.get(name)) for row in cells.values())]
    own = [each for each in own if each in names]
    starts = list(dict.fromkeys(start for _, start in cells))
    summary = [["method", "budget", *starts, "mean", "searches", *(f"vs. {each}" for each in own)]]
    details = [["app", "start", *names]]
    for name in names:
        column = {key: _known(row[name]) for key, row in cells.items()}
        means = {key: statistics.fmean(values) for key, values in column.items()}
        by_start = [[mean for key, mean in means.items() if key[1] == start] for start in starts]
        values = [f"{statistics.fmean(each):.3f}" for each in [*by_start, means.values()]]
        count = sum(len(values) for values in column.values())
        compared = [compare([_pooled(rows, each, name) for rows in found.values()]) for each in own]
        summary.append([*name.split(), *values, str(count), *map(str, compared)])
    for key, row in cells.items():
        details.append([*key, *(f"{statistics.fmean(_known(row[name])):.3f}" for name in names)])
    return "\n\n".join(_markdown(each) for each in (summary, details))


def _pooled(
    rows: Mapping[str, Mapping[str, list[float | None]]], *names: str
) -> tuple[list[float | None], ...]:
    return tuple([regret for row in rows.values() for regret in row[name]] for name in names)


def _known(cell: Sequence[float | None] | None) -> list[float]:
    return [each for each in cell or [] if each is not None]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    return "\n".join(lines)
