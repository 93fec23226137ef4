"""The table of layers in a real W&B run: its rows, its pieces, and when they are sent."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from lightning_adam import AdamMonitor
from lightning_adam.statistics.catalogue import select
from tests.support.commands import GLOBAL_STEP, history, offline_runs
from tests.support.offline import Row, Table, fitted, steps_of, tables, with_logger
from tests.support.training import ADAMW, Lit

LAYERS = ("net.0", "net.1", "net.3")
MAX_ROWS = 4
ROWS_AT_ONCE = 7


def layer_rows(rows: Sequence[Row], statistics: str) -> dict[tuple[int, str], list[Any]]:
    """What the table has to say of each step and layer, from the keys of the scope `layer`."""
    keys = [statistic.key for statistic in select([statistics])]
    measured = [row for row in rows if any("/layer/" in key for key in row)]
    return {
        (row[GLOBAL_STEP], layer): [row.get(f"{key}/layer/{layer}") for key in keys]
        for row in measured
        for layer in LAYERS
    }


@pytest.mark.parametrize("statistics", ["headline", "all"])
def test_its_rows_are_the_keys_of_the_layers(statistics: str, tmp_path: Path) -> None:
    monitor = AdamMonitor(2, scopes=["layer"], statistics=statistics, layer_table=True)
    trained = fitted(tmp_path, monitor, batches=5)
    (table,) = tables(trained.offline_run, trained.rows, "adam_layers")
    names = [statistic.name for statistic in select([statistics])]
    assert table.columns[:3] == [GLOBAL_STEP, "optimizer", "layer"]
    assert len(table.columns) == len({*table.columns}) == 3 + len(names)
    assert table.columns[3:] == names
    expected = layer_rows(trained.rows, statistics)
    assert [(step, layer) for step, _, layer, *_ in table.rows] == [
        (step, layer) for step in (0, 1, 3) for layer in ("net.0", "net.3", "net.1")
    ]
    for step, optimizer, layer, *values in table.rows:
        assert optimizer is None
        assert values == expected[step, layer]


@pytest.fixture
def _small_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(wandb.Table, "MAX_ROWS", MAX_ROWS)
    monkeypatch.setattr("lightning_adam.monitor.ROWS_AT_ONCE", ROWS_AT_ONCE)


class Failing(Lit):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 8:
            raise ZeroDivisionError("planted")
        return super().training_step(batch, batch_idx)


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("module", [Lit, Failing])
def test_pieces_are_sent_as_training_goes_and_the_rest_at_its_end(
    module: type[Lit], tmp_path: Path
) -> None:
    batches = 8 if module is Lit else 20
    monitor = AdamMonitor(1, scopes=["layer"], layer_table=True)
    logger = WandbLogger(offline=True, save_dir=tmp_path)
    try:
        with_logger(monitor, logger, batches, module(ADAMW))
    except ZeroDivisionError:
        assert module is Failing
    finally:
        wandb.finish()
    (offline_run,) = offline_runs(tmp_path)
    rows = history(offline_run)
    pieces = tables(offline_run, rows, "adam_layers")
    assert [(piece.step, len(piece.rows)) for piece in pieces] == [
        (2, 4), (2, 4), (2, 1), (5, 4), (5, 4), (5, 1), (8, 4), (8, 2),
    ]  # fmt: skip
    assert joined(pieces) == layer_rows(rows, "headline")
    assert steps_of(rows, "adam_underflow/eps_curve_table.path") == []
    assert not [key for row in rows for key in row if key.startswith("adam_histogram/")]


def joined(pieces: Sequence[Table]) -> dict[tuple[int, str], list[Any]]:
    rows = [row for piece in pieces for row in piece.rows]
    found = {(step, layer): values for step, _, layer, *values in rows}
    assert len(found) == len(rows), "no row is sent twice"
    return found
