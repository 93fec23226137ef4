"""`lightning-adam report` in a shell: what it prints, and how it ends."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.dashboard.conftest import Trained
from tests.dashboard.written import write_csv
from tests.support.commands import BIN, environment


def report(*words: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "lightning-adam", "report", *words],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def test_it_prints_where_the_page_is(trained: Trained, tmp_path: Path) -> None:
    finished = report(trained.wandb, folder=tmp_path)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout == "report: report.html\n"
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_several_runs_with_what_could_not_be_read(trained: Trained, tmp_path: Path) -> None:
    cut = shutil.copytree(trained.wandb, tmp_path / "cut")
    (file,) = cut.glob("*.wandb")
    file.write_bytes(file.read_bytes()[:-500])
    write_csv(tmp_path / "csv", [(0, {"loss": 1.0})])
    finished = report(cut, trained.csv, "csv", "--output", "new page.html", folder=tmp_path)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.splitlines() == [
        "trained has not ended, or was cut: shown up to step 12.",
        "lightning_logs/version_0 has no keys that begin with adam_; train with"
        " callbacks=[AdamMonitor()].",
        "report: new page.html",
    ]
    assert (tmp_path / "new page.html").exists()
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere: there is no such run; expected the folder that is named"),
        (["."], ".: there is no run below; expected .wandb files, which"),
        (["csv"], "csv/lightning_logs/version_0: expected a run with keys that begin with adam_;"),
        (["ours", "-o", "nowhere/page.html"], "nowhere/page.html: expected a file that can be"),
    ],
)
def test_a_refusal_is_one_sentence(words: list[str], said: str, tmp_path: Path) -> None:
    if words != ["."]:
        write_csv(tmp_path / "csv", [(0, {"loss": 1.0})])
        write_csv(tmp_path / "ours", [(0, {"adam_update/update_norm": 1.0})])
    finished = report(*words, folder=tmp_path)
    assert (finished.returncode, finished.stdout) == (1, "")
    (line,) = finished.stderr.splitlines()
    assert line.startswith("lightning-adam report: ")
    assert said in line
    assert not list(tmp_path.rglob("*.html"))


def test_without_a_run_it_says_how_it_is_called(tmp_path: Path) -> None:
    finished = report(folder=tmp_path)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "the following arguments are required: RUN" in finished.stderr
    assert "Traceback" not in finished.stderr
