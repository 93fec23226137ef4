"""Two W&B runs, their pages, and the numbers that the pages must show."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from lightning.pytorch.loggers import WandbLogger

from lightning_adam.reports.keys import read_key
from lightning_adam.reports.report import write_report
from lightning_adam.reports.runs import Run, Series, read_runs
from tests.reports.logged_training import log_training
from tests.support.monitored import scoped
from tests.support.shared import shared

LRS = ("0.002", "0.005")
EPS = ("1e-08", "0.0001")
"""The settings of the two runs."""
BATCHES = 25
GROUPS = ("decay", "no_decay")


class LoggedRuns(NamedTuple):
    """The runs, and the pages of the first run and of both."""

    runs: Sequence[Run]
    first_page: Path
    both_page: Path

    @property
    def labels(self) -> list[str]:
        """The labels of the runs on the page of both."""
        return [
            f"{run.name} (lr={lr}, eps={eps})"
            for run, lr, eps in zip(self.runs, LRS, EPS, strict=True)
        ]


def logged_runs(factory: pytest.TempPathFactory) -> LoggedRuns:
    """Trains once for all test processes."""
    folder = shared(factory, "logged_runs", _make)
    runs = read_runs([folder / "0", folder / "1"])
    return LoggedRuns(runs, folder / "first.html", folder / "both.html")


def _make(folder: Path) -> None:
    scopes = ["model", "group", "layer"]
    for place, (lr, eps) in enumerate(zip(LRS, EPS, strict=True)):
        own = folder / str(place)
        own.mkdir()
        loggers = [WandbLogger(offline=True, save_dir=own)]
        optimizer = {"lr": float(lr), "eps": float(eps)}
        log_training(own, loggers, BATCHES, optimizer, scopes=scopes, histograms_every_n_steps=5)
    runs = read_runs([folder / "0", folder / "1"])
    write_report(runs[:1], folder / "first.html")
    write_report(runs, folder / "both.html")


def curves_of(run: Run, key: str) -> dict[str, dict[int, float]]:
    keys = {"model": key} | {group: scoped(f"group/{group}", key) for group in GROUPS}
    return {scope: line(run.series[each]) for scope, each in keys.items() if each in run.series}


def layers_of(run: Run, key: str) -> dict[str, dict[int, float]]:
    return {
        scope.name: line(series)
        for (base, _, scope), series in zip(
            map(read_key, run.series), run.series.values(), strict=True
        )
        if (base, scope.kind) == (key, "layer")
    }


def line(series: Series) -> dict[int, float]:
    return dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))


def shares_of(run: Run, quantity: str, scope: str) -> Mapping[tuple[int, int], float]:
    """Returns the fraction of elements by step and octave."""
    key = f"adam_histogram/{quantity}"
    key = key if scope == "model" else scoped(f"group/{scope}", key)
    return {
        (step, int(edge)): count / sum(counts)
        for step, (counts, edges) in run.histograms[key].items()
        for count, edge in zip(counts, edges[:-1], strict=True)
        if count
    }
