"""The flight recorder of two ranks: what one process would have written, written once."""

from pathlib import Path
from typing import Any

import pytest

from tests.ranks.rank_trainings import KINDS, STEPS
from tests.ranks.recorded_ranks import Ending, recorded
from tests.support.exploding import Row, files_of, numbers, read, steps_of
from tests.support.ranks import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Any]:
    return launch("tests.ranks.recorded_ranks", 2, folder)


def by_place(rows: list[Row]) -> dict[tuple[str, str], Row]:
    return {(row["optimizer_step"], row["layer"]): row for row in rows}


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_is_written_once_as_one_process_would(
    ranks: list[Any], kind: str, folder: Path, tmp_path: Path
) -> None:
    (file,) = files_of(folder / f"{kind}, ended")
    assert file.name == f"step_{STEPS}_exception.csv"
    recorded(kind, tmp_path / "alone", Ending())
    (alone,) = files_of(tmp_path / "alone")
    rows, expected = by_place(read(file)), by_place(read(alone))
    assert rows.keys() == expected.keys()
    for place, row in rows.items():
        assert numbers(row) == pytest.approx(numbers(expected[place]), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "DDP"])
def test_what_breaks_on_one_rank_is_written_by_the_first(
    ranks: list[Any], kind: str, folder: Path
) -> None:
    first, *_ = files_of(folder / f"{kind}, broken")
    assert first.name == "step_4_not_finite.csv"
    rows = read(first)
    assert steps_of(rows) == [1, 2, 3, 4]
    broken = {row["layer"] for row in rows if float(row["nonfinite_count"]) > 0}
    assert broken == {"", "net.3"}


def test_a_fault_on_one_rank_ends_the_recording_and_no_training(
    ranks: list[Any], folder: Path
) -> None:
    of_first, of_second = (rank["faulty"]["said"] for rank in ranks)
    assert len(of_first) == len(of_second) == 1
    assert "AdamMonitor has failed on rank 1, which says why" in of_first[0]
    assert "ZeroDivisionError: planted" in of_second[0]
    assert files_of(folder / "FSDP2, faulty") == []
