"""`lightning-adam report --watch`: rewrites the page while runs are training."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lightning_adam.cli import main
from lightning_adam.reports.runs import Run
from tests.reports.run_files import KEY

Pages = list[tuple[list[Any], Any]]


class Stage:
    """Runs actions while the command sleeps, and records the pages that it writes."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.pages: Pages = []
        self.slept: list[float] = []
        self.events: list[Callable[[], object]] = []
        monkeypatch.chdir(folder)
        monkeypatch.setattr("lightning_adam.reports.watch.write_report", self.write)
        monkeypatch.setattr("lightning_adam.reports.watch.time", self)

    def write(self, runs: Sequence[Run], file: Path, refresh: float | None = None) -> None:
        assert file == Path("report.html")
        self.pages.append(([run.last_step for run in runs], refresh))

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        assert self.events, "it has not ended"
        self.events.pop(0)()

    def log(self, steps: int, name: str = "run") -> None:
        file = self.folder / name / "metrics.csv"
        file.parent.mkdir(exist_ok=True)
        rows = [f"{step},{step / 7}\n" for step in range(steps)]
        file.write_text(f"step,{KEY}\n{''.join(rows)}")

    def judge(self, has_ended: bool, name: str = "run") -> None:
        facts = f'{{"measurements": 1, "seconds": 1.0, "has_ended": {str(has_ended).lower()}'
        file = self.folder / name / "adam_findings.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(facts + ', "findings": []}')
        # As if written later, whatever the clock of the file system.
        os.utime(file, (time.time(), time.time() + has_ended))


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(tmp_path, monkeypatch)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_page_is_rewritten_when_the_run_changes_until_it_has_ended(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.events = [
        lambda: stage.judge(has_ended=False),
        lambda: stage.log(0),
        lambda: stage.log(3),
        lambda: None,
        lambda: stage.log(5),
        lambda: stage.judge(has_ended=True),
        # A logger may write its last rows after the monitor.
        lambda: stage.log(6),
        lambda: None,
    ]
    main(["report", "run", "--watch"])
    pages = [([2], 10.0), ([4], 10.0), ([4], 10.0), ([5], 10.0), ([5], None)]
    assert stage.pages == pages
    assert stage.slept == [10.0] * 8
    assert capsys.readouterr().out.splitlines() == [
        "waiting for AdamMonitor to log to run",
        "step 2, 1 of 1 runs still training",
        "step 4, 1 of 1 runs still training",
        "step 4, 0 of 1 runs still training",
        "step 5, 0 of 1 runs still training",
        "report: report.html",
    ]


def test_all_runs_must_have_ended(stage: Stage) -> None:
    for name in ("a", "b"):
        stage.log(2, name)
    stage.judge(has_ended=True, name="a")
    stage.judge(has_ended=False, name="b")
    stage.events = [lambda: stage.judge(has_ended=True, name="b"), lambda: None]
    main(["report", ".", "--watch", "0.5"])
    assert stage.pages == [([1, 1], 0.5), ([1, 1], 0.5), ([1, 1], None)]


def test_interrupt_leaves_a_page_that_does_not_reload(stage: Stage) -> None:
    stage.log(2)
    stage.judge(has_ended=False)
    stage.events = [interrupt]
    main(["report", "run", "--watch"])
    assert stage.pages == [([1], 10.0), ([1], None)]


def test_interrupt_before_the_first_row_is_an_error(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.events = [interrupt]
    with pytest.raises(SystemExit, match=r"^1$"):
        main(["report", "run", "--watch"])
    assert "AdamMonitor has logged nothing to run yet." in capsys.readouterr().err
    assert stage.pages == []


@pytest.mark.parametrize("seconds", ["0", "-1", "inf", "nan", "run"])
def test_invalid_interval_is_rejected(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["report", "run", f"--watch={seconds}"])
    assert f"{seconds} is not a number of seconds" in capsys.readouterr().err
