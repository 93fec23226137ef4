"""The flight recorder on two ranks writes one file, equal to that of one process."""

import itertools
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lightning_adam import AdamMonitor
from lightning_adam.statistics import kernels
from tests.support.exploding import Row, files_of, numbers, read, steps_of
from tests.support.parallel import KINDS, STEPS, fit_ranks
from tests.support.ranks import Ranks

pytestmark = pytest.mark.slow


class FailingAtTheEnd(L.Callback):
    """Raises at the end of the run, on all ranks."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        raise ZeroDivisionError("planted")


class BreakingWeight(L.Callback):
    """Sets the last rank's part of a weight to infinity before the fourth step."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 3 and trainer.global_rank == trainer.world_size - 1:
            weight = pl_module.net[3].weight
            (weight.to_local() if isinstance(weight, DTensor) else weight).data.fill_(float("inf"))


def record(kind: str, other: type[L.Callback] | None) -> list[str]:
    """Trains with a flight recorder, and returns the warnings that the monitor failed."""
    callbacks = [*([other()] if other else []), AdamMonitor(every_n_steps=100, flight_recorder=4)]
    with warnings.catch_warnings(record=True) as caught, suppress(ZeroDivisionError):
        warnings.simplefilter("always")
        fit_ranks(kind, callbacks, default_root_dir=Path.cwd())
    messages = [str(each.message) for each in caught]
    return [each for each in messages if "AdamMonitor failed" in each]


def record_ended(kind: str) -> list[str]:
    return record(kind, FailingAtTheEnd)


def record_broken(kind: str) -> list[str]:
    return record(kind, BreakingWeight)


def record_with_fault(kind: str) -> list[str]:
    """Trains while the second rank's third measurement fails."""
    measure, calls = kernels.measure, itertools.count()

    def fails(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == 2 and dist.get_rank() == 1:
            raise ZeroDivisionError("planted")
        return measure(*arguments, **keywords)

    with mock.patch.object(kernels, "measure", fails):
        return record(kind, None)


def by_place(rows: list[Row]) -> dict[tuple[str, str], Row]:
    return {(row["optimizer_step"], row["layer"]): row for row in rows}


@pytest.mark.parametrize("kind", KINDS)
def test_exception_is_recorded_once_like_by_one_process(
    ranks: Ranks, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks.run(record_ended, kind)
    (file,) = files_of(tmp_path)
    assert file.name == f"step_{STEPS}_exception.csv"
    alone = tmp_path / "alone"
    alone.mkdir()
    monkeypatch.chdir(alone)
    record_ended(kind)
    (file_alone,) = files_of(alone)
    rows, expected = by_place(read(file)), by_place(read(file_alone))
    assert rows.keys() == expected.keys()
    for place, row in rows.items():
        assert numbers(row) == pytest.approx(numbers(expected[place]), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "DDP"])
def test_first_rank_records_what_breaks_on_another(ranks: Ranks, kind: str, tmp_path: Path) -> None:
    ranks.run(record_broken, kind)
    first, *_ = files_of(tmp_path)
    assert first.name == "step_4_not_finite.csv"
    rows = read(first)
    assert steps_of(rows) == [1, 2, 3, 4]
    broken = {row["layer"] for row in rows if float(row["nonfinite_count"]) > 0}
    assert broken == {"", "net.3"}


def test_fault_on_one_rank_ends_recording(ranks: Ranks, tmp_path: Path) -> None:
    (of_first,), (of_second,) = ranks.run(record_with_fault, "FSDP2")
    assert "AdamMonitor failed on rank 1, which prints the error." in of_first
    assert "ZeroDivisionError: planted" in of_second
    assert files_of(tmp_path) == []
