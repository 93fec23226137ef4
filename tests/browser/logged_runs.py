"""Two W&B runs and a CSV run, their pages, and their numbers read without the page's own reader."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from lightning_adam.dashboard.report import write_report
from lightning_adam.dashboard.runs import read_runs
from lightning_adam.statistics.catalogue import STATISTICS
from tests.dashboard.logged_training import log_training
from tests.support.commands import GLOBAL_STEP, history, offline_runs
from tests.support.offline import tables
from tests.support.shared import shared

LRS = ("0.002", "0.005")
EPS = ("1e-08", "0.0001")
"""The settings of the two W&B runs."""
BATCHES = 25
Numbers = dict[str, dict[str, dict[int, float]]]
"""By key or statistic, scope and step."""


class LoggedRuns(NamedTuple):
    """The folders of the runs, and the pages of each and of the first two."""

    folders: Sequence[Path]
    csv: Path
    first_page: Path
    csv_page: Path
    both_page: Path

    @property
    def labels(self) -> list[str]:
        """How a page of both runs distinguishes them."""
        return [
            f"{run_name(run)} (lr={lr}, eps={eps})"
            for run, lr, eps in zip(self.folders, LRS, EPS, strict=True)
        ]


def logged_runs(factory: pytest.TempPathFactory) -> LoggedRuns:
    """Trains once for all test processes."""
    folder = shared(factory, "logged_runs", _make)
    pages = [folder / f"{name}.html" for name in ("first", "csv", "both")]
    runs = [run for name in ("first", "second") for run in offline_runs(folder / name)]
    return LoggedRuns(runs, folder / "csv/lightning_logs/version_0", *pages)


def _make(folder: Path) -> None:
    scopes = ["model", "group", "layer"]
    loggers: dict[str, Logger] = {
        "first": WandbLogger(offline=True, save_dir=folder / "first"),
        "second": WandbLogger(offline=True, save_dir=folder / "second"),
        "csv": CSVLogger(folder / "csv"),
    }
    settings = zip((*LRS, LRS[0]), (*EPS, EPS[0]), strict=True)
    for (name, logger), (lr, eps) in zip(loggers.items(), settings, strict=True):
        (folder / name).mkdir()
        optimizer = {"lr": float(lr), "eps": float(eps)}
        log_training(
            folder / name, [logger], BATCHES, optimizer, scopes=scopes, histograms_every_n_steps=5
        )
    first, second, csv = read_runs([folder / name for name in loggers])
    for name, runs in {"first": [first], "csv": [csv], "both": [first, second]}.items():
        write_report(runs, folder / f"{name}.html")


def run_name(offline_run: Path) -> str:
    return offline_run.name.rpartition("-")[2]


def curves_of(offline_run: Path) -> Numbers:
    """Reads the numbers that are drawn as curves."""
    found: Numbers = {}
    for row in history(offline_run):
        for key, value in row.items():
            base, scope = _split(key)
            is_number = isinstance(value, int | float)
            if is_number and GLOBAL_STEP in row and not scope.startswith("layer/"):
                lines = found.setdefault(base, {})
                lines.setdefault(scope.removeprefix("group/"), {})[row[GLOBAL_STEP]] = float(value)
    return found


def _split(key: str) -> tuple[str, str]:
    """Returns a key of the monitor without its scope, and the scope; another key has none."""
    if not key.startswith("adam_"):
        return key, ""
    *base, scope = [*key.split("/", 2), "model"][:3]
    return "/".join(base), scope


def layers_of(offline_run: Path) -> Numbers:
    """Reads the numbers of the layers, by the name of a statistic."""
    found: Numbers = {}
    for table in tables(offline_run, history(offline_run), "adam_layers"):
        for cells in table.rows:
            row = dict(zip(table.columns, cells, strict=True))
            for name in STATISTICS.keys() & row.keys():
                if row[name] is not None:
                    layer = found.setdefault(name, {}).setdefault(row["layer"], {})
                    layer[row[GLOBAL_STEP]] = float(row[name])
    return found


def shares_of(offline_run: Path, quantity: str, scope: str) -> dict[tuple[int, int], float]:
    """Reads a histogram: the share of the elements by step and octave."""
    key = f"adam_histogram/{quantity}" + ("" if scope == "model" else f"/group/{scope}")
    found = {}
    for row in history(offline_run):
        if f"{key}.values" in row:
            counts, edges = row[f"{key}.values"], row[f"{key}.bins"]
            for count, edge in zip(counts, edges[:-1], strict=True):
                if count:
                    found[row[GLOBAL_STEP], int(edge)] = count / sum(counts)
    return found
