"""The report of a search as Markdown, HTML and values."""

import logging
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lightning_adam.config.tune import SpaceConfig
from lightning_adam.tune import report as module
from lightning_adam.tune.report import html, markdown, write_report
from lightning_adam.tune.runs import Outcome, Request, Run, Stage
from lightning_adam.tune.strategy import CONFIDENCE, Strategy
from tests.support.html_page import HtmlPage
from tests.support.tables import each_row
from tests.tune.simulation import START, ended, report_of, search, used

SPECIAL_CHARACTERS = (
    "</script><script>alert(1)</script> | a\nb [x](y) `*_ \x1b😀\udc80 {{ 7 * 7 }} &amp;"
)
BETTER = replace(START, lr=0.005, betas=(0.8, 0.99))


def strategy(budget: int = 7, sign: float = 1.0) -> Strategy:
    return Strategy(START, budget, SpaceConfig(), sign=sign)


def race_runs(*values: float | None, stage: Stage = Stage.search) -> list[Run]:
    """Returns pairs of runs of the start and a better configuration, each with a new seed."""
    return [
        ended(
            Request(stage, BETTER if number % 2 else START, replicate=number // 2),
            number,
            value,
            seed=7 + number // 2,
            seconds=61.2,
            error="" if value is not None else "ValueError: no data",
        )
        for number, value in enumerate(values)
    ]


RACE = race_runs(0.5, 0.3, 0.52, 0.31, 0.53, 0.3)
SHAPES: dict[str, list[Run]] = {
    "nothing has begun": [],
    "the first run is under way": [Run(Request(Stage.start, START), 0, Outcome.running)],
    "the first run alone": race_runs(0.5),
    "the first run has failed": race_runs(None),
    "all have failed": race_runs(None, None),
    "only the start has failed": race_runs(None, 0.3),
    "huge": race_runs(1e300, -1e300, 1e300, -1e300),
    "a race": RACE,
    "no facts": [
        replace(each, steps=None, folder=SPECIAL_CHARACTERS, error=SPECIAL_CHARACTERS)
        for each in RACE
    ],
}


def table_rows(text: str, title: str) -> list[list[str]]:
    (part,) = re.findall(rf"^## {title}\n\n(?:[^|\n].*\n\n)?((?:\|.*\n)+)", text, re.MULTILINE)
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in part.splitlines()]
    return [[cell.strip() for cell in row] for row in cells[2:]]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Returns the log messages, without those of Optuna."""
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def text_of(runs: list[Run], budget: int = 7, sign: float = 1.0, is_seeded: bool = True) -> str:
    return " ".join(report_of(strategy(budget, sign), runs, is_seeded=is_seeded).sentences())


def test_report_is_complete_for_every_state_of_a_search(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with each_row() as row:
        for shape, runs in SHAPES.items():
            with row(shape):
                made = report_of(strategy(20), runs, SPECIAL_CHARACTERS)
                write_report(made, tmp_path)
                assert warnings(caplog) == []
                assert names(tmp_path) == ["optimization_results.yaml", "tune.html", "tune.md"]
                text = (tmp_path / "tune.md").read_text()
                assert text.splitlines()[-1] == (made.line or "none")
                page = HtmlPage((tmp_path / "tune.html").read_text())
                assert page.misplaced == []
                assert page.texts("pre") == [made.line or "none"]
                for element in page.elements:
                    assert not {"src", "srcset", "action"} & element.attributes.keys()
                listed = table_rows(text, "Runs") if runs else []
                assert [each[0] for each in listed] == [str(each.number) for each in runs]


def test_names_are_escaped_in_html_and_markdown() -> None:
    made = report_of(strategy(20), SHAPES["no facts"], SPECIAL_CHARACTERS)
    page = HtmlPage(html(made))
    (heading,) = page.texts("h1")
    assert heading.startswith("Adam tuning report: </script><script>alert(1)</script> | a b [x](y)")
    assert "{{ 7 * 7 }} &amp;" in heading
    assert "alert(1)</script>" not in html(made)
    first = markdown(made).splitlines()[0]
    assert r"\| a b [x]\(y) \`\*" in first
    assert "<" not in re.sub(r"\\<", "", first)


def test_last_line_has_the_overrides_of_the_chosen_configuration() -> None:
    text = markdown(report_of(strategy(), race_runs(0.5, 0.3, 0.5, 0.3)))
    words = shlex.split(text.splitlines()[-1])
    assert words == ["data=small one", "optimizer.lr=0.005", "optimizer.betas=[0.8,0.99]"]
    kept = report_of(strategy(20), race_runs(0.3, 0.3), arguments=[])
    assert markdown(kept).splitlines()[-1] == "none"
    assert kept.summary_lines("a b")[-1] == "overrides: none, the app's are kept"
    assert kept.summary_lines("a b")[1] == "report: 'a b/tune.md'"


def test_report_states_seeds_and_confidence() -> None:
    assert "is in progress: 6 runs, worth 6 of 20 full runs, 6 min 7 s of training" in text_of(
        RACE, 20
    )
    assert "The configuration of the app has a metric of 0.525." in text_of(RACE, 20)
    better = r"has 0\.305 \(mean of 2 fresh seeds\), a gain of 0\.22 ± \d\.\d+, and is better with"
    assert re.search(better, text_of(RACE, 20))
    assert "it is used." in text_of(RACE, 20)
    assert f"it is not used, as that is below {CONFIDENCE}." in text_of(
        race_runs(0.5, 0.5, 0.5, 0.5), 20
    )
    maximized = [each if each.value is None else replace(each, value=-each.value) for each in RACE]
    assert "has -0.305 (mean of 2 fresh seeds), a gain of 0.22" in text_of(maximized, 20, sign=-1.0)
    assert "The best other configuration has 0.3 (one seed)" in text_of(race_runs(0.5, 0.3))
    assert "has a metric of no finite metric" in text_of(race_runs(None, 0.3))


def test_report_states_reasons() -> None:
    assert "not seeded" not in text_of(RACE)
    assert "The runs are not seeded: the app's config has no seed." in text_of(
        RACE, is_seeded=False
    )
    full = "All runs have the full length: "
    assert full not in text_of(RACE)
    trainer = "no Lightning Trainer of the app trains the tuned optimizer"
    assert f"{full}{trainer}." in text_of([replace(each, steps=None) for each in RACE])
    fixed = [replace(each, fixed_length="a run has only 9 steps") for each in RACE]
    assert f"{full}a run has only 9 steps." in text_of(fixed)


def test_report_counts_short_runs_partially_and_names_values_at_range_ends() -> None:
    searching = strategy(7)
    runs, _ = search(searching, lambda request: 1 - request.configuration.lr)
    sentences = " ".join(report_of(searching, runs).sentences())
    assert f"is complete: {len(runs)} runs, worth {used(runs):.3g} of 7 full runs" in sentences
    assert used(runs) <= 7 + 1e-6 < len(runs)
    advice = "To widen it, set hydra.sweeper.space.lr.high=VALUE."
    assert f"lr is at the high end of its range. {advice}" in sentences


def test_tables_list_hyperparameters_runs_failures_and_findings() -> None:
    failed = [
        ended(Request(Stage.search, replace(START, lr=lr)), 6 + number, None, error="no data")
        for number, lr in enumerate((0.1, 0.11, 0.12, 0.13, 0.14, 0.1))
    ]
    runs = [*RACE, *(replace(each, findings=("update_lost",)) for each in failed)]
    text = markdown(report_of(strategy(20), runs))
    changed = {row[0]: row[1:3] for row in table_rows(text, "Hyperparameters")}
    assert changed["lr"] == ["0.001", "0.005"]
    assert changed["beta1"] == ["0.9", "0.8"]
    assert table_rows(text, "Runs")[1] == [
        *("1", "search", "1", "lr=0.005 betas=[0.8,0.99]"),
        *("7", "0.3", "complete", "1 min 1 s"),
    ]
    named = "lr=0.1; lr=0.11; lr=0.12; lr=0.13; and 1 more"
    assert table_rows(text, "Failures") == [["no data", "6", named]]
    assert table_rows(text, "Findings") == [["update_lost", "6", named]]


def test_results_have_the_fields_of_other_sweepers(tmp_path: Path) -> None:
    write_report(report_of(strategy(20), RACE), tmp_path)
    results = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert results.name == "optuna"
    assert results.best_params == {"optimizer.lr": 0.005, "optimizer.betas": [0.8, 0.99]}
    assert (results.best_value, results.start_value) == pytest.approx((0.305, 0.525))
    assert results.gain == pytest.approx(0.22)
    assert not results.is_complete


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_report_that_cannot_be_written_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(report_of(strategy(), RACE), tmp_path)
    before = (tmp_path / "tune.md").read_text()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_logged", set())
    with monkeypatch.context() as full:
        full.setattr(os, "replace", fail)
        for _ in range(3):
            write_report(report_of(strategy(), RACE, "another"), tmp_path)
    assert names(tmp_path) == ["optimization_results.yaml", "tune.html", "tune.md"]
    assert (tmp_path / "tune.md").read_text() == before
    assert len(warnings(caplog)) == 3
    assert warnings(caplog)[0].startswith("adam_tune: tune.md was not written (OSError: ")
