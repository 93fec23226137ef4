"""Reading runs: the same numbers as W&B's reader, also from damaged files."""

import functools
import json
import math
import random
from collections.abc import Collection, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import wandb
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_adam.config.errors import ConfigError
from lightning_adam.config.monitor import Severity
from lightning_adam.findings.finding import Finding
from lightning_adam.reports.runs import Run, read_runs
from tests.reports.run_files import (
    BLOCK,
    FIRST,
    FULL,
    KEY,
    LAST,
    LAYER_KEY,
    MIDDLE,
    Chunk,
    Record,
    Values,
    chunks_of,
    comparable,
    histogram,
    only,
    records_of,
    rows_of,
    to_dict,
    values_in,
    wandb_content,
    wandb_values,
    write_csv,
    write_wandb,
)
from tests.support.commands import GLOBAL_STEP
from tests.support.tables import each_row

CONFIG = {"lr": 0.001, "nested": {"kept": [1, {"a": None}], "changed": 1}, "optimizer": "adam"}
UPDATES: list[dict[str, Any]] = [
    {"nested": {"kept": [1, {"a": None}], "changed": 2}},
    {"a.b": {"c": "ü"}, "optimizer": 1},
]
NAME = "Δ <script>alert(1)</script> & 😀"


def random_values(count: int, seed: int) -> list[float]:
    """Returns random values of all magnitudes."""
    generator = np.random.default_rng(seed)
    scales = 10.0 ** generator.uniform(-300, 300, count)
    return list((generator.standard_normal(count) * scales).tolist())


def varied_rows() -> list[dict[str, Any]]:
    """Returns rows with all kinds of values, repeated steps and steps out of order."""
    special = [math.nan, math.inf, -math.inf, 0.0, -1, 2**53, 5e-324, 1.7976931348623157e308]
    rows: list[dict[str, Any]] = []
    for place, value in enumerate([*special, *random_values(40, seed=1)]):
        rows.append(
            {
                GLOBAL_STEP: (7 * place) % 30,
                KEY: value,
                "nested": {"inner": {"number": place}},
                "with.dots": place / 3,
                "späte/Verluste 😀": -value,
                "text": "12",
                "flag": True,
                "nothing": None,
                "epoch": place,
            }
        )
    rows += [{GLOBAL_STEP: 100, "text": "alone"}, {"without its own step": 1.5}]
    return rows


def long_rows(count: int = 150) -> list[dict[str, Any]]:
    numbers = random_values(10 * count, seed=2)
    return [
        {GLOBAL_STEP: step}
        | {LAYER_KEY.format(f"net.{layer}"): numbers[10 * step + layer] for layer in range(10)}
        for step in range(count)
    ]


def wide_rows() -> list[dict[str, Any]]:
    """Returns rows, the second and fourth of which are larger than a block."""
    return [
        {GLOBAL_STEP: 1000 + step}
        | {LAYER_KEY.format(f"net.{layer}{'.x' * 60}"): step + layer / 7 for layer in range(width)}
        for step, width in enumerate([2, 600, 3, 300, 1])
    ]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [*varied_rows(), *long_rows(), *wide_rows()]
    return write_wandb(tmp_path_factory.mktemp("run"), rows, name="varied")


# ---- Compared with W&B's own reader


def test_numbers_equal_the_logged_ones_and_those_of_wandbs_reader(run_file: Path) -> None:
    chunks = chunks_of(run_file.read_bytes())
    assert chunks[-1].end > 5 * BLOCK
    assert {each.kind for each in chunks} == {FULL, FIRST, MIDDLE, LAST}
    run = only(run_file)
    found = to_dict(run)
    assert run.notes == []
    assert found == wandb_values(run_file)
    assert all((np.diff(series.steps) > 0).all() for series in run.series.values())
    logged: Values = {}
    for row in [*long_rows(), *wide_rows()]:
        for key in row.keys() - {GLOBAL_STEP}:
            logged.setdefault(key, {})[row[GLOBAL_STEP]] = comparable(row[key])
    assert {key: found[key] for key in found if "/layer/" in key} == logged


def test_later_row_of_a_step_counts_and_texts_are_no_numbers(run_file: Path) -> None:
    later = {row[GLOBAL_STEP]: row for row in varied_rows() if KEY in row}
    found = to_dict(only(run_file))
    assert found[KEY] == {step: comparable(row[KEY]) for step, row in later.items()}
    assert list(found["nested.inner.number"]) == sorted(later)
    assert 100 not in found[KEY]
    assert {key for key in found if "/layer/" not in key} == {
        KEY,
        "nested.inner.number",
        "with.dots",
        "späte/Verluste 😀",
        "without its own step",
    }


def test_name_and_config_are_the_latest(tmp_path: Path) -> None:
    file = write_wandb(tmp_path, [{KEY: 1.0}], name=NAME, config=CONFIG, updates=UPDATES)
    run = only(file)
    assert run.name == NAME
    assert run.path == file.parent
    assert run.config == {
        "lr": 0.001,
        "nested": {"kept": [1, {"a": None}], "changed": 2},
        "optimizer": 1,
        "a.b": {"c": "ü"},
    }
    assert run.is_monitored


def test_name_of_a_run_without_a_name_is_its_id(tmp_path: Path) -> None:
    run = only(write_wandb(tmp_path, [], run_id="3xy"))
    assert (run.name, run.series, run.histograms, run.notes) == ("3xy", {}, {}, [])
    assert not run.is_monitored


def test_histograms_and_tables_of_layers_are_read(tmp_path: Path) -> None:
    counts = {step: [step, 0, 5 * step] for step in (0, 3)}
    edges = [-9.0, -8.0, -7.0, -6.0]
    columns: list[str | int] = [GLOBAL_STEP, "optimizer", "layer", "grad_norm", "lr"]
    pieces: list[list[list[Any]]] = [
        [[0, None, "net.0", 1.5, 0.1], [0, None, "net.1", math.nan, None]],
        [[3, None, "net.0", math.inf, 0.2], [3, "generator", "net.1", -0.5, 0.3]],
    ]
    rows: list[dict[str, Any]] = [
        {
            GLOBAL_STEP: step,
            "adam_histogram/grad": histogram(counts[step], edges),
            "adam_layers": wandb.Table(columns=columns, data=piece),
            "others": wandb.Table(columns=columns, data=[[0, None, "other", 1.0, 1.0]]),
        }
        for step, piece in zip(counts, pieces, strict=True)
    ]
    run = only(write_wandb(tmp_path, rows))
    assert run.notes == []
    assert run.histograms == {
        "adam_histogram/grad": {step: (counts[step], edges) for step in counts}
    }
    found = {key: values for key, values in to_dict(run).items() if "/layer/" in key}
    assert found == {
        "adam_gradient/layer/net.0/grad_norm": {0: 1.5, 3: math.inf},
        "adam_gradient/layer/net.1/grad_norm": {0: "nan"},
        "adam_gradient/optimizer/generator/layer/net.1/grad_norm": {3: -0.5},
        "adam_schedule/layer/net.0/lr": {0: 0.1, 3: 0.2},
        "adam_schedule/optimizer/generator/layer/net.1/lr": {3: 0.3},
    }


def test_table_that_cannot_be_read_is_noted(tmp_path: Path) -> None:
    columns: list[str | int] = [GLOBAL_STEP, "layer", "grad_norm"]
    table = wandb.Table(columns=columns, data=[[0, "net.0", 1.5]])
    file = write_wandb(tmp_path, [{GLOBAL_STEP: 0, KEY: 2.0, "adam_layers": table}], name="mine")
    (stored,) = file.parent.rglob("*.table.json")
    with each_row() as row:
        for content in ('{"columns": ["lay', "[]", "{}", '{"columns": []}', None):
            with row(content):
                stored.unlink()
                if content is not None:
                    stored.write_text(content, encoding="utf-8")
                run = only(file)
                assert to_dict(run)[KEY] == {0: 2.0}
                assert run.notes == [f"mine: a table of layers could not be read: {stored.name}."]


def test_record_may_begin_anywhere_in_a_block(tmp_path: Path) -> None:
    """A chunk has a header of 7 bytes; if only these fit in a block, it has no data."""
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "run-3xy.wandb"
    left = set()
    for size in range(BLOCK - 80, BLOCK - 45):
        rows = [
            {"_step": "0", "text": f'"{"a" * size}"'},
            {"_step": "1", KEY: "2.5"},
            {"_step": "2", KEY: "3"},
        ]
        file.write_bytes(wandb_content(rows))
        assert to_dict(only(file)) == {KEY: {1: 2.5, 2: 3.0}}
        filler = chunks_of(file.read_bytes())[0]
        left.add(BLOCK - filler.end)
        if filler.end == BLOCK - 7:
            assert to_dict(only(file)) == wandb_values(file)
    assert {0, 1, 6, 7, 8} <= left


def test_rows_in_any_order_and_separate_settings_are_read(tmp_path: Path) -> None:
    rows = [{GLOBAL_STEP: str(step), "_step": "0", KEY: str(step)} for step in (5, 1_200, 3)]
    config = {("a", "b", "c"): "1", ("a", "b", "d"): "2", ("e",): "[3]"}
    file = tmp_path / "run-3xy.wandb"
    file.write_bytes(wandb_content(rows, config))
    run = only(file)
    assert to_dict(run) == {KEY: {3: 3.0, 5: 5.0, 1_200: 1_200.0}}
    assert list(run.series[KEY].steps) == [3, 5, 1_200]
    assert run.config == {"a": {"b": {"c": 1, "d": 2}}, "e": [3]}
    assert run.notes == ["run-3xy is still running, or was interrupted: shown up to step 1,200."]


# ---- Where runs are found


def test_runs_in_a_folder_are_found_once_with_any_path(tmp_path: Path) -> None:
    first = write_wandb(tmp_path / "a", [{KEY: 1.0}], run_id="one")
    second = write_wandb(tmp_path / "b", [{KEY: 2.0}], run_id="two")
    table = write_csv(tmp_path / "c", [(0, {KEY: 3.0})])
    folders = [first.parent, second.parent, table.parent]
    assert [run.path for run in read_runs([tmp_path])] == folders
    latest = tmp_path / "a" / "wandb" / "latest-run"
    assert latest.is_symlink()
    assert [run.path for run in read_runs([latest])] == [first.parent]
    several = [table, second.parent, latest / first.name, latest, first, tmp_path]
    assert [run.path for run in read_runs(several)] == folders[::-1][:2] + folders[:1]
    assert [run.name for run in read_runs([tmp_path])] == ["one", "two", "lightning_logs/version_0"]


def test_killed_and_resumed_run_has_ended(tmp_path: Path) -> None:
    killed = write_wandb(tmp_path / "1", [{GLOBAL_STEP: 0, KEY: 1.0}], run_id="same")
    killed.write_bytes(killed.read_bytes()[: chunks_of(killed.read_bytes())[-1].start])
    (note,) = only(tmp_path).notes
    assert note == "same is still running, or was interrupted: shown up to step 0."
    write_wandb(tmp_path / "2", [{GLOBAL_STEP: 1, KEY: 1.0}], run_id="same")
    assert only(tmp_path).notes == []


WORST = "adam_update/worst_1/update_norm"
NAMED = {0: "net.0.weight", 3: "7"}
"""The tensor with the largest value by step; the name of a module may be a number."""


def test_names_of_the_tensors_with_the_largest_values_are_read(tmp_path: Path) -> None:
    rows = {step: {WORST: 2.0 + step, f"{WORST}_tensor": name} for step, name in NAMED.items()}
    logged = [{GLOBAL_STEP: step, **row} for step, row in rows.items()]
    files = [
        write_wandb(tmp_path / "wandb", logged),
        write_csv(tmp_path / "csv", rows.items()),  # type: ignore[arg-type]
    ]
    for file in files:
        run = only(file)
        assert to_dict(run) == {WORST: {0: 2.0, 3: 5.0}}
        assert run.tensors == {WORST: NAMED}
        assert run.notes == []


def test_table_uses_the_layer_names_of_the_keys(tmp_path: Path) -> None:
    table = wandb.Table(columns=[GLOBAL_STEP, "layer", "update_norm"], data=[[0, "block-1", 2.0]])
    rows: list[dict[str, Any]] = [{LAYER_KEY.format("block_1"): 1.0}, {"adam_layers": table}]
    written = write_wandb(tmp_path, [{GLOBAL_STEP: 0, **row} for row in rows])
    found = to_dict(only(written))
    assert {key: found[key] for key in found if "block" in key} == {
        LAYER_KEY.format("block_1"): {0: 2.0}
    }


def test_resumed_run_is_one_run_in_which_the_later_row_of_a_step_counts(tmp_path: Path) -> None:
    def rows(steps: Iterable[int], value: float) -> list[dict[str, Any]]:
        return [
            {
                GLOBAL_STEP: step,
                KEY: value,
                f"only {value}": step,
                "adam_histogram/grad": histogram([int(value)], [0, 1]),
            }
            for step in steps
        ]

    first = rows(range(6), 1.0)
    write_wandb(tmp_path / "1", first, run_id="same", name="first", config={"a": {"b": 1, "c": 1}})
    write_wandb(tmp_path / "2", rows(range(4, 8), 2.0), run_id="same", config={"a": {"b": 2}})
    run = only(tmp_path)
    assert to_dict(run) == {
        KEY: {step: 1.0 if step < 4 else 2.0 for step in range(8)},
        "only 1.0": {step: float(step) for step in range(6)},
        "only 2.0": {step: float(step) for step in range(4, 8)},
    }
    histograms = run.histograms["adam_histogram/grad"]
    assert {step: each.counts for step, each in histograms.items()} == {
        step: [1 if step < 4 else 2] for step in range(8)
    }
    assert run.config == {"a": {"b": 2, "c": 1}}
    assert run.name == "first"
    assert run.notes == []


def stored(findings: Iterable[Finding], **changes: Any) -> str:
    """Returns the content of adam_findings.json."""
    facts = {"measurements": 5, "seconds": 2.5, "has_ended": True, **changes}
    return json.dumps({**facts, "findings": [each.as_row() for each in findings]})


def finding(step: int, closed: int | None = None) -> Finding:
    code, severity = "eps_dominates", Severity.warning
    return Finding(code, severity, "model", step, "", {}, {}, (), "", closed=closed)


def test_findings_of_a_resumed_run_are_the_latest_of_all_parts(tmp_path: Path) -> None:
    parts = {"1": [finding(3), finding(4)], "2": [finding(3, closed=5), finding(6)], "3": None}
    for part, findings in parts.items():
        file = write_wandb(tmp_path / part, [{GLOBAL_STEP: int(part), KEY: 1.0}], run_id="same")
        if findings is not None:
            (file.parent / "files").mkdir(exist_ok=True)
            (file.parent / "files/adam_findings.json").write_text(stored(findings))
    run = only(tmp_path)
    assert run.findings == [finding(3, closed=5), finding(4), finding(6)]
    assert (run.seconds, run.measurements) == (5.0, 10)


def test_times_of_a_resumed_run_are_those_of_its_rows_and_its_seconds_add_up(
    tmp_path: Path,
) -> None:
    def rows(steps: Iterable[int], start: float) -> list[dict[str, str]]:
        return [
            {GLOBAL_STEP: str(step), KEY: "1", "_timestamp": str(start + 10 * step)}
            for step in steps
        ]

    file = tmp_path / "run.wandb"
    file.write_bytes(wandb_content(rows(range(3), 1000.0)))
    run = only(file)
    assert run.times is not None
    assert run.times.steps.tolist() == [0, 1, 2]
    assert run.times.values.tolist() == [1000.0, 1010.0, 1020.0]
    assert (run.source, run.seconds, run.has_ended) == ("W&B", 20.0, False)
    parts = [
        write_wandb(tmp_path / part, [{GLOBAL_STEP: 0}, {GLOBAL_STEP: 1}], run_id="same")
        for part in ("1", "2")
    ]
    resumed = only(*parts)
    assert resumed.seconds == pytest.approx(sum(only(part).seconds or 0.0 for part in parts))
    assert resumed.has_ended


def test_missing_run_raises_with_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere does not exist. Pass the folder"):
        read_runs([tmp_path / "nowhere"])
    (tmp_path / "metrics.txt").touch()
    for path in (tmp_path, tmp_path / "metrics.txt"):
        with pytest.raises(ConfigError) as raised:
            read_runs([path])
        assert str(raised.value).startswith(f"{path} contains no run: no .wandb file")
        assert "\n" not in str(raised.value)


def test_folder_or_link_with_the_name_of_a_run_is_ignored(tmp_path: Path) -> None:
    file = write_csv(tmp_path, [(0, {KEY: 1.0})])
    (tmp_path / ".wandb").mkdir()
    (tmp_path / "gone.wandb").symlink_to(tmp_path / "nowhere.wandb")
    assert only(tmp_path).path == file.parent


# ---- Damaged W&B runs


@dataclass
class IntactRun:
    content: bytes
    records: list[Record]
    folder: Path
    """For what is left of it."""

    def read(self, content: bytes) -> Run:
        """Reads the file with other content."""
        (self.folder / "run.wandb").write_bytes(content)
        return only(self.folder)

    @functools.cached_property
    def numbers(self) -> Values:
        return values_in(rows_of(self.records))

    @property
    def chunks(self) -> list[Chunk]:
        return [chunk for record in self.records for chunk in record.chunks]

    @property
    def large_chunks(self) -> list[Chunk]:
        """Returns the chunks of records that span several blocks."""
        return [chunk for chunk in self.chunks if chunk.kind != FULL]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> IntactRun:
    """A run with several blocks, and records that span two and three of them."""
    rows = long_rows(60)
    rows[30] |= {f"{LAYER_KEY}/net.{layer}{'.x' * 100}": 1.0 for layer in range(350)}
    folder = tmp_path_factory.mktemp("intact")
    file = write_wandb(folder / "intact", rows, name="intact")
    (folder / "left").mkdir()
    found = IntactRun(file.read_bytes(), records_of(file), folder / "left")
    assert {chunk.kind for chunk in found.large_chunks} == {FIRST, MIDDLE, LAST}
    return found


def cut_note(name: str, steps: Collection[int]) -> str:
    shown = f"shown up to step {max(steps):,}" if steps else "it has no rows yet"
    return f"{name} is still running, or was interrupted: {shown}."


def test_file_that_is_cut_anywhere_is_read_up_to_its_last_complete_record(
    intact: IntactRun,
) -> None:
    lengths = set(range(7, intact.chunks[3].end, 5))
    for start, end, _ in [*intact.large_chunks, *intact.chunks[::20]]:
        lengths |= {start, start + 1, start + 6, start + 7, (start + end) // 2, end - 1, end}
    for boundary in range(BLOCK, len(intact.content), BLOCK):
        lengths |= {boundary - 1, boundary, boundary + 1}
    lengths |= set(random.Random(0).choices(range(7, len(intact.content)), k=20))
    for length in sorted(lengths & set(range(len(intact.content)))):
        complete = [each for each in intact.records if each.chunks[-1].end <= length]
        rows = rows_of(complete)
        run = intact.read(intact.content[:length])
        assert to_dict(run) == values_in(rows)
        assert run.notes == [cut_note(run.name, [row[GLOBAL_STEP] for row in rows])]


def test_file_that_is_no_wandb_run_is_noted(intact: IntactRun) -> None:
    with each_row() as row:
        for content in (b"", b":W", b"\0" * 100, b"no run\n" * 10_000):
            with row(content[:20]):
                run = intact.read(content)
                assert (run.series, run.histograms, run.config) == ({}, {}, {})
                file = intact.folder / "run.wandb"
                assert run.notes == [
                    f"{file}: nothing could be read; it is empty, or not a run of W&B."
                ]


def damaged_notes(run: Run) -> list[str]:
    return [note for note in run.notes if "is damaged" in note]


def check_damage(intact: IntactRun, start: int, replacement: bytes) -> None:
    """Asserts that all numbers are correct, intact blocks are complete, and one note is added."""
    content = bytearray(intact.content)
    content[start : start + len(replacement)] = replacement
    if content == intact.content:
        return
    run = intact.read(bytes(content))
    hit = {place // BLOCK for place in range(start, start + len(replacement))}
    safe = [
        record
        for record in intact.records
        if not hit & {chunk.start // BLOCK for chunk in record.chunks}
    ]
    found = to_dict(run)
    for key, values in values_in(rows_of(safe)).items():
        assert values.items() <= found.get(key, {}).items()
    for key, values in found.items():
        assert values.items() <= intact.numbers[key].items()
    assert len(damaged_notes(run)) == 1


CHUNK_DAMAGE = {
    "checksum": (0, b"\xff\xff"),
    "a longer chunk": (4, b"\xff\xff"),
    "a shorter chunk": (4, b"\x01\x00"),
    "no kind": (6, b"\x00"),
    "an unknown kind": (6, b"\x09"),
    "nothing but zeros": (0, bytes(7)),
    "data": (9, b"\xff\x00\xff"),
}


def test_damage_anywhere_is_noted_and_the_other_blocks_are_shown(intact: IntactRun) -> None:
    # In the last block it may as well be a cut.
    last_block = len(intact.content) // BLOCK
    chunks = [chunk for chunk in intact.chunks if chunk.start // BLOCK < last_block]
    several = [chunk for chunk in intact.large_chunks if chunk in chunks] + chunks[3::25]
    luck = random.Random(0)
    with each_row() as row:
        for damage, (offset, replacement) in CHUNK_DAMAGE.items():
            for chunk in several:
                with row((damage, chunk)):
                    check_damage(intact, chunk.start + offset, replacement)
        for chunk in luck.choices(chunks, k=12):
            start = luck.randrange(chunk.start, chunk.end)
            replacement = luck.randbytes(luck.randint(1, min(20, chunk.end - start)))
            with row((chunk, start, replacement)):
                check_damage(intact, start, replacement)
    content = bytearray(intact.content)
    for block in (1, 3):
        chunk = next(each for each in intact.chunks if each.start >= block * BLOCK)
        content[chunk.start + 8] ^= 0xFF
    run = intact.read(bytes(content))
    assert run.notes == ["intact: its file is damaged in 2 places; the rest is shown."]


def test_name_of_a_file_without_its_first_block_is_the_file_name(intact: IntactRun) -> None:
    content = bytearray(intact.content)
    content[9] ^= 0xFF
    run = intact.read(bytes(content))
    assert run.name == "run"
    assert to_dict(run)
    assert damaged_notes(run) == ["run: its file is damaged in one place; the rest is shown."]


# ---- A run that is still being written


def test_rows_that_are_written_while_the_last_block_is_read_are_read_or_left(
    intact: IntactRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = intact.folder / "run.wandb"
    # The progress bar is updated after every block.
    bar = SimpleNamespace(update=lambda _: file.write_bytes(intact.content))
    monkeypatch.setattr("lightning_adam.reports.runs.reader.tqdm", lambda **_: nullcontext(bar))
    with each_row() as row:
        for length in (5_000, BLOCK - 3, BLOCK, BLOCK + 3, 2 * BLOCK + 10_000):
            with row(length):
                run = intact.read(intact.content[:length])
                steps = {step for series in run.series.values() for step in series.steps.tolist()}
                assert steps == set(range(len(steps)))
                if len(steps) == 60:
                    assert run.notes == []
                else:
                    assert run.notes == [cut_note(run.name, steps)]


# ---- CSVLogger

CSV_ROWS = [
    (0, {"loss": 1.5, KEY: math.nan}),
    (0, {"val/loss": 2.0}),
    (3, {"loss": math.inf, "a, b": 1e-30}),
    (2, {"loss": -math.inf}),
    (3, {"loss": 7.0, "epoch": 1.0}),
    (4, {KEY: 0.1, '"quoted" 😀': 4.0}),
]
HPARAMS = {"lr": 0.1, "nested": {"betas": (0.9, 0.99)}, "name": "ü"}


def test_csv_run_is_read(tmp_path: Path) -> None:
    file = write_csv(tmp_path, CSV_ROWS, HPARAMS)
    run = only(file.parent)
    assert run.notes == []
    assert run.path == file.parent
    assert run.name == "lightning_logs/version_0"
    assert run.config["lr"] == 0.1
    assert run.config["name"] == "ü"
    assert list(run.config["nested"]["betas"]) == [0.9, 0.99]
    assert run.histograms == {}
    assert to_dict(run) == {
        "loss": {0: 1.5, 2: -math.inf, 3: 7.0},
        "val/loss": {0: 2.0},
        "a, b": {3: 1e-30},
        KEY: {0: "nan", 4: 0.1},
        '"quoted" 😀': {4: 4.0},
    }


TEXT = "".join(["step,loss,epoch\n", *(f"{step},{step / 7},0\n" for step in range(20))]).encode()


@pytest.fixture(scope="module")
def csv_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("csv")


def read_csv(folder: Path, content: bytes) -> Run:
    (folder / "metrics.csv").write_bytes(content)
    return only(folder)


def csv_note(folder: Path) -> str:
    return f"{'/'.join(folder.parts[-2:])}: its file has lines that are cut; the rest is shown."


def test_csv_that_is_cut_anywhere_is_read_up_to_its_last_complete_line(csv_folder: Path) -> None:
    for length in range(len(TEXT)):
        run = read_csv(csv_folder, TEXT[:length])
        complete = TEXT[:length].decode().count("\n") - 1
        steps = list(range(complete))
        assert to_dict(run) == ({"loss": {step: step / 7 for step in steps}} if steps else {})
        if complete < 0:
            assert run.notes == [no_steps(csv_folder)]
        else:
            assert run.notes == ([] if TEXT[:length].endswith(b"\n") else [csv_note(csv_folder)])


def no_steps(folder: Path) -> str:
    return f"{folder / 'metrics.csv'}: nothing could be read; it has no column step."


DAMAGED_LINES = (
    b"1,2\n",
    b"1,2,3,4\n",
    b",,\n",
    b"-1,2.0,0\n",
    b"1.5,2.0,0\n",
    "²,2.0,0\n".encode(),
    b"99999999999999999999,2.0,0\n",
    b"\xff\xfe,2.0,0\n",
    b"\0\0\0\n",
)


def test_damaged_line_of_a_csv_is_skipped_and_noted(csv_folder: Path) -> None:
    lines = TEXT.splitlines(keepends=True)
    with each_row() as row:
        for line in DAMAGED_LINES:
            with row(line):
                run = read_csv(csv_folder, b"".join([*lines[:10], line, *lines[10:]]))
                assert to_dict(run) == {"loss": {step: step / 7 for step in range(20)}}
                assert run.notes == [csv_note(csv_folder)]


@settings(max_examples=100, deadline=None)
@given(place=st.integers(20, len(TEXT) - 1), replacement=st.binary(min_size=1, max_size=5))
@example(place=100, replacement=b'"')
@example(place=100, replacement=b',"')
@example(place=100, replacement=b"\r")
def test_overwritten_bytes_of_a_csv_change_only_their_lines(
    place: int, replacement: bytes, csv_folder: Path
) -> None:
    """A damaged number may be valid, but the other lines are intact."""
    content = bytearray(TEXT)
    content[place : place + len(replacement)] = replacement
    run = read_csv(csv_folder, bytes(content))
    first, last = (
        TEXT[:end].count(b"\n") - 1 for end in (place, min(place + len(replacement), len(TEXT)))
    )
    untouched = {step: step / 7 for step in range(20) if not first <= step <= last}
    found = to_dict(run).get("loss", {})
    # Under a step that was overwritten another may have got a second row.
    assert untouched.keys() <= found.keys()
    assert sum(found[step] != value for step, value in untouched.items()) <= 1


def test_open_quote_in_a_long_csv_damages_only_its_line(csv_folder: Path) -> None:
    lines = ["step,loss\n", '0,"1.0\n', *(f"{step},0.5\n" for step in range(1, 30_000))]
    run = read_csv(csv_folder, "".join(lines).encode())
    assert len(run.series["loss"].steps) >= 29_999


def test_csv_without_steps_is_noted(csv_folder: Path) -> None:
    contents = (b"", b"\n", b"loss,epoch\n1.0,0\n", b"\0" * 100, b"\xff\xfe\n", b'"step\n0\n')
    with each_row() as row:
        for content in contents:
            with row(content):
                run = read_csv(csv_folder, content)
                assert (run.series, run.histograms) == ({}, {})
                assert run.notes == [no_steps(csv_folder)]


PLAIN = """\
config: !!python/object:src.config.Config
  lr: 0.1
  path: !!python/object/apply:pathlib.PosixPath [data, train]
  color: !!python/object/apply:src.Color [2]
  betas: !!python/tuple [0.9, 0.99]
  activation: !!python/name:torch.nn.functional.relu ''
  text: !custom hello
harmful: !!python/object/apply:os.mkdir [planted]
lightning_adam: {version: 0.1.0}
"""


def test_objects_in_hparams_are_read_as_plain_values_and_never_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hparams.yaml").write_text(PLAIN)
    run = read_csv(tmp_path, TEXT)
    assert run.config == {
        "config": {
            "lr": 0.1,
            "path": ["data", "train"],
            "color": [2],
            "betas": [0.9, 0.99],
            "activation": "torch.nn.functional.relu",
            "text": "hello",
        },
        "harmful": ["planted"],
        "lightning_adam": {"version": "0.1.0"},
    }
    assert run.notes == []
    assert not (tmp_path / "planted").exists()


UNREADABLE = "its hparams.yaml could not be read, so it has no config."
HPARAMS_NOTES: dict[bytes | None, list[str]] = {
    b"lr: [0.1\n": [UNREADABLE],
    b"lr: \xff\n": [UNREADABLE],
    b"born: 2020-13-45\n": [UNREADABLE],
    b"{lr: 1}: 2\n": [UNREADABLE],
    b"": [],
    b"- a list\n": [],
    # A folder of that name.
    None: [UNREADABLE],
}
"""Contents of hparams.yaml that are not settings, and the notes."""


def test_invalid_hparams_give_an_empty_config(tmp_path: Path) -> None:
    hparams = tmp_path / "hparams.yaml"
    with each_row() as row:
        for content, notes in HPARAMS_NOTES.items():
            with row(content):
                hparams.unlink(missing_ok=True)
                if content is None:
                    hparams.mkdir()
                else:
                    hparams.write_bytes(content)
                run = read_csv(tmp_path, TEXT)
                assert len(run.series["loss"].steps) == 20
                assert run.config == {}
                assert [note.split(": ", 1)[1] for note in run.notes] == notes


# ---- What the monitor writes beside a run


def test_run_without_a_findings_file_is_not_judged_and_has_ended(tmp_path: Path) -> None:
    run = read_csv(tmp_path, TEXT)
    assert (run.findings, run.seconds, run.measurements) == (None, None, None)
    assert run.has_ended
    assert run.notes == []


def test_csv_run_gets_its_duration_and_its_end_from_the_monitors_file(tmp_path: Path) -> None:
    file = tmp_path / "adam_findings.json"
    file.write_text(stored([]))
    run = read_csv(tmp_path, TEXT)
    assert (run.findings, run.seconds, run.measurements) == ([], 2.5, 5)
    assert run.has_ended
    file.write_text(stored([finding(3)], has_ended=False))
    run = read_csv(tmp_path, TEXT)
    assert run.findings == [finding(3)]
    assert not run.has_ended
    assert run.notes == [f"{run.name} is still running, or was interrupted: shown up to step 19."]


def test_measurements_of_a_live_run_are_counted_in_its_rows(tmp_path: Path) -> None:
    (tmp_path / "adam_findings.json").write_text(stored([], measurements=0, has_ended=False))
    keys = [
        KEY,
        "adam_update/layer/net.0/update_norm",
        "adam_update/optimizer/second/update_norm",
        "adam_moments/denominator_p50",
        "loss",
    ]
    counts = (3, 4, 2, 9, 9)
    lines = [
        f"{step}," + ",".join("1.0" if step < count else "" for count in counts)
        for step in range(9)
    ]
    content = "\n".join([",".join(["step", *keys]), *lines, ""])
    assert read_csv(tmp_path, content.encode()).measurements == 4 + 2


def test_file_of_the_monitor_that_cannot_be_read_is_noted(tmp_path: Path) -> None:
    file = tmp_path / "adam_findings.json"
    with each_row() as row:
        for content in ("", "[]", "{}", '{"findings": [{}]}', '{"findings": 1}', "\xff"):
            with row(content):
                file.write_text(content, encoding="latin-1")
                run = read_csv(tmp_path, TEXT)
                assert run.notes == [f"{run.name}: its adam_findings.json could not be read."]
                assert len(run.series["loss"].steps) == 20
