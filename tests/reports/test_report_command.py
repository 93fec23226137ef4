"""`lightning-adam report`: output and exit status."""

import re
import shutil
from pathlib import Path

import pytest

from lightning_adam.cli import main
from tests.reports.conftest import LoggedRun
from tests.reports.run_files import write_csv
from tests.support.commands import run
from tests.support.tables import each_row

REFUSED = {
    ("nowhere",): "nowhere does not exist. Pass the folder that AdamMonitor prints",
    (".",): ". contains no run: no .wandb file",
    ("csv",): "csv/lightning_logs/version_0: no run has keys that begin with adam_.",
    ("ours", "-o", "nowhere/page.html"): "nowhere/page.html cannot be written",
}
"""Arguments and a part of the error."""


@pytest.mark.slow
def test_command_prints_where_the_page_is(logged_run: LoggedRun, tmp_path: Path) -> None:
    """Runs in a new process, without any imports."""
    finished = run(["lightning-adam", "report", logged_run.wandb], tmp_path, cold=True)
    *read, report = finished.lines
    assert (finished.returncode, report) == (0, "report: report.html")
    assert [line.startswith(f"read {logged_run.wandb} (W&B: ") for line in read] == [True]
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_report_of_several_runs_lists_unreadable_files(
    logged_run: LoggedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = shutil.copytree(logged_run.wandb, tmp_path / "cut")
    (file,) = cut.glob("*.wandb")
    file.write_bytes(file.read_bytes()[:-500])
    write_csv(tmp_path / "csv", [(0, {"loss": 1.0})])
    main(["report", str(cut), str(logged_run.csv), "csv", "--output", "new page.html"])
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert re.fullmatch(r"read cut \(W&B: \d+ keys, up to step \d+\)", lines[0])
    assert re.fullmatch(rf"read {logged_run.csv} \(CSVLogger: \d+ keys, up to step 11\)", lines[1])
    assert lines[2:] == [
        "read csv/lightning_logs/version_0 (CSVLogger: 1 keys, up to step 0)",
        "trained is still running, or was interrupted: shown up to step 12.",
        "lightning_logs/version_0 has no keys that begin with adam_; train with"
        " callbacks=[AdamMonitor()].",
        "report: new page.html",
    ]
    assert (tmp_path / "new page.html").exists()
    assert not (tmp_path / "report.html").exists()


def test_many_runs_are_summarized_by_their_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in range(11):
        write_csv(tmp_path / str(place), [(0, {"adam_update/update_norm": 1.0})])
    main(["report", *map(str, range(10))])
    assert capsys.readouterr().out.count("read ") == 10
    main(["report", "."])
    assert capsys.readouterr().out.splitlines() == [
        "read 11 runs (11 CSVLogger)",
        "report: report.html",
    ]


def test_error_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    write_csv(tmp_path / "csv", [(0, {"loss": 1.0})])
    write_csv(tmp_path / "ours", [(0, {"adam_update/update_norm": 1.0})])
    with each_row() as row, pytest.MonkeyPatch.context() as patch:
        for arguments, sentence in REFUSED.items():
            patch.chdir(tmp_path / "empty" if arguments == (".",) else tmp_path)
            with row(arguments):
                with pytest.raises(SystemExit, match=r"^1$"):
                    main(["report", *arguments])
                printed = capsys.readouterr()
                assert printed.out == ""
                (line,) = printed.err.splitlines()
                assert line.startswith("lightning-adam report: ")
                assert sentence in line
                assert not list(tmp_path.rglob("*.html"))
