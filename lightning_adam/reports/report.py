"""The panels as one page that needs no network: the data and plotly.js stand in the file."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lightning_adam.config.errors import ConfigError, format_value
from lightning_adam.findings.describe import format_numbers
from lightning_adam.reports.comparison import TOLERANCE, config_differences, parting
from lightning_adam.reports.keys import BASES, Key, Scope, read_key
from lightning_adam.reports.panels import SECTIONS, Drawing, Panel
from lightning_adam.reports.reduction import (
    COLUMNS,
    STRETCHES,
    Floats,
    below_edges,
    compact,
    gridded,
    is_logarithmic,
    octaves,
    packed,
    thinned,
)
from lightning_adam.reports.runs import Run, Series
from lightning_adam.statistics.catalogue import STATISTICS, SYMBOLS, key_part
from lightning_adam.version import __version__

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the report is drawn with plotly: pip install 'lightning-adam[dashboard]'"
    ) from error

CELLS = 2_000_000
"""How many cells the maps of the layers may have together."""
MAIN_SETTINGS = ("class", "lr", "betas", "eps", "weight_decay", "amsgrad")
"""By which runs are told apart in a legend."""

Logged = TypeVar("Logged")
"""A series, or the histograms of a key."""


def write_report(runs: Sequence[Run], file: Path) -> None:
    """Writes the page of some runs.

    Args:
        runs: What `read_runs` returned; the others are compared with the first.
        file: Where to; a file that is there is replaced.

    Raises:
        ConfigError: If no run has anything that AdamMonitor logs, or the file cannot be written.

    Example:
        >>> write_report([Run("baseline", Path("baseline"), {}, {}, {}, [])], Path("report.html"))
        ... # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        lightning_adam.config.errors.ConfigError: baseline: no run has keys ...
    """
    if not any(run.is_monitored for run in runs):
        notes = " ".join(note for run in runs for note in run.notes)
        raise ConfigError(
            f"{', '.join(str(run.path) for run in runs)}: no run has keys that begin with adam_",
            f"Train with callbacks=[AdamMonitor()]. {notes}".rstrip(" ."),
        )
    try:
        # A name that the filesystem has no text for can be written all the same.
        file.write_bytes(page(runs).encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be written: {error.strerror}",
            "Use for example -o report.html",
        ) from error


def page(runs: Sequence[Run]) -> str:
    """The page of some runs, as HTML."""
    panels = list(itertools.chain.from_iterable(SECTIONS.values()))
    names = labels(runs)
    drawn = {panel.title: DRAWINGS[panel.drawing](panel, runs) for panel in panels}
    drawn = {title: data for title, data in drawn.items() if any(data.values())}
    environment = Environment(
        loader=PackageLoader("lightning_adam.reports", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        version=__version__,
        symbols=SYMBOLS,
        tolerance=TOLERANCE,
        stretches=STRETCHES,
        columns=COLUMNS,
        runs=runs,
        labels=names,
        settings=[_described(run) for run in runs],
        differences=config_differences(runs),
        partings=_partings(runs),
        sections=SECTIONS,
        has_data=set(drawn),
        found=[
            (label, run.findings)
            for label, run in zip(names, runs, strict=True)
            if run.findings is not None
        ],
        numbers=format_numbers,
        data={"runs": names, "panels": drawn, "findings": _marks(runs)},
        format_value=format_value,
        plotly=get_plotlyjs(),
    )


def _marks(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Where findings were raised during the run: one mark for each optimizer and code."""
    first: dict[tuple[int, str, str], int] = {}
    for index, run in enumerate(runs):
        for each in run.findings or []:
            if each.is_above_info and not each.is_notice:
                # The first optimizer step is logged at 0.
                first.setdefault((index, each.optimizer, each.code), each.step - 1)
    return [
        {
            "run": index,
            "scope": None,
            "code": f"{code} of {optimizer}" if optimizer else code,
            "step": step,
        }
        for (index, optimizer, code), step in first.items()
    ]


def labels(runs: Sequence[Run]) -> list[str]:
    """The runs' names, each with the main settings in which it differs, and no two alike.

    Example:
        >>> def run_of(lr):
        ...     config = {"lightning_adam": {"optimizer": {"class": "AdamW", "lr": lr}}}
        ...     return Run("run", Path(), config, {}, {}, [])
        >>> labels([run_of(0.1), run_of(0.2), run_of(0.2)])
        ['run (lr=0.1)', 'run (lr=0.2)', 'run (lr=0.2) #2']
    """
    optimizers = [_mapping(_ours(run).get("optimizer")) for run in runs]
    telling = [
        name
        for name in MAIN_SETTINGS
        if any(each.get(name) != optimizers[0].get(name) for each in optimizers)
    ]
    found: list[str] = []
    for run, optimizer in zip(runs, optimizers, strict=True):
        told = ", ".join(f"{name}={format_value(optimizer.get(name))}" for name in telling)
        label = f"{run.name} ({told})" if told else run.name
        numbered = (f"{label} #{number}" for number in itertools.count(2))
        found.append(next(each for each in itertools.chain([label], numbered) if each not in found))
    return found


def _ours(run: Run) -> dict[str, Any]:
    """What AdamMonitor has put into a run's config."""
    return _mapping(run.config.get("lightning_adam"))


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _described(run: Run) -> str:
    """A run's optimizer and schedule in a line; of several, each with its name."""
    optimizers = _mapping(_ours(run).get("optimizer"))
    schedulers = _mapping(_ours(run).get("scheduler"))
    if "class" in optimizers:
        optimizers, schedulers = {"": optimizers}, {"": schedulers}
    lines = []
    for name, optimizer in optimizers.items():
        schedule = _mapping(schedulers.get(name))
        parts = [
            _listed(_mapping(optimizer), "class", MAIN_SETTINGS),
            _listed(schedule, "name", schedule),
        ]
        lines.append(": ".join(filter(None, [name, "; ".join(filter(None, parts))])))
    return " | ".join(filter(None, lines))


def _listed(settings: Mapping[str, Any], title: str, names: Iterable[str]) -> str:
    shown = [f"{name}={format_value(settings[name])}" for name in names if name in settings]
    return " ".join(shown).replace(f"{title}=", "", 1)


def _partings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Where each run leaves the first: at all, and clearly."""
    return [
        {"at_all": parting(runs[0], run, 0), "clearly": parting(runs[0], run), "run": place}
        for place, run in enumerate(runs[1:], start=1)
    ]


def _curves(panel: Panel, runs: Sequence[Run]) -> dict[str, Any]:
    """Of each key that the panel draws the lines of its scopes."""
    choices: dict[str, list[dict[str, Any]]] = {}
    all_values: dict[str, list[Floats]] = {}
    for place, key, (base, _, scope), series in _drawn(panel, [run.series for run in runs]):
        if not scope.is_inner:
            shown = thinned(series)
            arrays = {"steps": packed(shown.steps), "values": packed(shown.values)}
            told: dict[str, Any] = {"run": place, "scope": str(scope) if base in BASES else None}
            if scope.kind == "worst":
                told["tensors"] = _tensors(runs[place], key, shown.steps.tolist())
            choices.setdefault(base, []).append(told | arrays)
            all_values.setdefault(base, []).append(series.values)
    return {
        "choices": [
            {"label": key, "isLog": is_logarithmic(panel.unit, values), "lines": choices[key]}
            for key, values in sorted(
                all_values.items(), key=lambda each: (-_points(each[1]), each[0])
            )
        ]
    }


def _tensors(run: Run, key: str, steps: Iterable[int]) -> dict[str, list[Any]]:
    """The tensors that the values of a key are of: their names, and each step's place in these."""
    by_step = run.tensors.get(key, {})
    names = [by_step.get(step, "") for step in steps]
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return {"names": [*places], "places": [places[name] for name in names]}


def _layers(panel: Panel, runs: Sequence[Run]) -> dict[str, Any]:
    """Of each statistic and run the values by layer and step."""
    maps = _layer_maps(panel, [run.series for run in runs])
    return {"maps": [{"run": place} | entry for place, entry in maps]}


def _events(panel: Panel, runs: Sequence[Run]) -> dict[str, Any]:
    """The same of each event of a run."""
    events = [(place, event) for place, run in enumerate(runs) for event in run.events]
    maps = []
    for number, entry in _layer_maps(panel, [event.series for _, event in events]):
        place, event = events[number]
        maps.append({"run": place, "event": str(event)} | entry)
    # Those of an event stand together, the first one's first.
    return {"maps": sorted(maps, key=lambda entry: entry["run"])}


def _layer_maps(
    panel: Panel, logged: Sequence[Mapping[str, Series]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Of each statistic and what was logged the values by layer and step."""
    found: dict[tuple[str, int], dict[str, Series]] = {}
    for place, _, (key, _, scope), series in _drawn(panel, logged):
        if scope.is_inner:
            found.setdefault((key, place), {})[str(scope)] = series
    columns = min(max(CELLS // max(sum(map(len, found.values())), 1), 20), COLUMNS)
    for statistic, place in itertools.product(STATISTICS.values(), range(len(logged))):
        by_layer = found.get((statistic.key, place), {})
        if by_layer:
            layers = sorted(by_layer, key=_natural)
            steps, values = gridded([by_layer[layer] for layer in layers], columns)
            entry: dict[str, Any] = {"statistic": statistic.name, "unit": statistic.unit}
            entry |= {"meaning": statistic.meaning, "layers": layers}
            entry |= {"isLog": is_logarithmic(statistic.unit, [values.ravel()])}
            entry |= {"steps": packed(steps), "values": packed(compact(values))}
            yield place, entry


def _histograms(panel: Panel, runs: Sequence[Run]) -> dict[str, Any]:
    """Of each quantity, scope and run the shares by octave and step."""
    maps = []
    for place, _, (base, _, scope), by_step in _drawn(panel, [run.histograms for run in runs]):
        steps, lowest, shares = octaves(by_step)
        entry = {"run": place, "scope": str(scope), "quantity": base.rpartition("/")[2]}
        entry |= {"eps": _eps_of(runs[place], scope), "lowest": lowest}
        entry |= {"steps": packed(steps), "shares": packed(compact(shares))}
        maps.append(entry)
    return {"maps": maps}


def _eps_curves(panel: Panel, runs: Sequence[Run]) -> dict[str, Any]:
    """Of each run and scope the share of the last step's elements below every power of two."""
    lines = []
    for place, _, (_, _, scope), by_step in _drawn(panel, [run.histograms for run in runs]):
        step = max(by_step)
        at, shares = below_edges(by_step[step])
        line = {"run": place, "scope": str(scope), "eps": _eps_of(runs[place], scope)}
        lines.append(line | {"step": step, "at": packed(at), "shares": packed(shares)})
    return {"lines": lines}


DRAWINGS: dict[Drawing, Callable[[Panel, Sequence[Run]], dict[str, Any]]] = {
    Drawing.CURVES: _curves,
    Drawing.LAYERS: _layers,
    Drawing.EVENTS: _events,
    Drawing.HISTOGRAM: _histograms,
    Drawing.EPS_CURVE: _eps_curves,
}
"""What the page is given of a panel; page.js draws it."""


def _drawn(
    panel: Panel, logged: Iterable[Mapping[str, Logged]]
) -> Iterator[tuple[int, str, Key, Logged]]:
    """What a panel draws of each run: its number, and its keys with their values, by scope."""
    for place, by_key in enumerate(logged):
        keys = {key: read_key(key) for key in by_key}
        order = {key: [*map(_natural, (each.base, *each.scope))] for key, each in keys.items()}
        for key in sorted(keys, key=order.__getitem__):
            if panel.draws(keys[key].base):
                yield place, key, keys[key], by_key[key]


def _natural(key: str) -> list[tuple[int, str]]:
    """Sorts net.2 before net.10."""
    return [
        (int(part or 0), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", key)
    ]


def _points(values: Iterable[Floats]) -> int:
    return sum(map(len, values))


def _named(settings: dict[str, Any], part: str) -> dict[str, Any]:
    """The settings of a name, given as it stands in a key."""
    found = (value for name, value in settings.items() if key_part(name) == part)
    return _mapping(next(found, None))


def _eps_of(run: Run, scope: Scope) -> list[float]:
    """The different eps of a scope, as the run's config has them; 0 has no place on a log axis."""
    optimizer = _mapping(_ours(run).get("optimizer"))
    if scope.optimizer:
        optimizer = _named(optimizer, scope.optimizer)
    groups = _mapping(optimizer.get("param_groups"))
    chosen = [_named(groups, scope.name)] if scope.kind == "group" else [*groups.values()]
    return sorted({float(group["eps"]) for group in chosen if group.get("eps")})
