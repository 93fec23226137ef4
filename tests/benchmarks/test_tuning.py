"""The benchmark of hyperparameter search: its apps, methods, stored runs and table."""

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.tuning import __main__ as command
from benchmarks.tuning import searches
from benchmarks.tuning.apps import APPS, DEFAULT, STARTS, train
from benchmarks.tuning.methods import METHODS, Problem
from benchmarks.tuning.results import Comparison, compare, regrets, tables
from benchmarks.tuning.searches import FRESH_SEEDS, Store, Task, collect, search
from lightning_adam.tune.configuration import Configuration

README = Path(command.__file__).parents[1] / "README.md"
without_neps = pytest.mark.skipif(
    importlib.util.find_spec("neps") is None, reason="NePS is not installed"
)
every_method = pytest.mark.parametrize(
    "method", [pytest.param(each, marks=[without_neps] * (each == "priorband")) for each in METHODS]
)


def bowl(configuration: Configuration) -> float:
    """Has its minimum at lr 0.003, and diverges above lr 0.05."""
    lr = configuration.lr
    return math.inf if lr > 0.05 else 1 + (math.log10(lr) - math.log10(0.003)) ** 2


def test_stored_run_is_not_repeated_even_if_the_file_was_cut(tmp_path: Path) -> None:
    runs: list[list[object]] = []

    def compute(store: Store, key: list[object]) -> float:
        def run() -> float:
            runs.append(key)
            return math.inf

        return float(store.compute(key, run))

    file = tmp_path / "runs.jsonl"
    first = Store(file)
    assert compute(first, ["mlp", 1e-3]) == compute(first, ["mlp", 1e-3]) == math.inf
    with file.open("a") as handle:
        handle.write('{"key": "cut')
    # Another process appends while the first is open.
    assert compute(Store(file), ["cnn", 1e-3]) == math.inf
    assert compute(first, ["cnn", 1e-3]) == compute(Store(file), ["mlp", 1e-3]) == math.inf
    assert runs == [["mlp", 1e-3], ["cnn", 1e-3]]


@pytest.mark.parametrize("app", APPS)
def test_loss_of_an_app_falls_with_the_number_of_steps(app: str) -> None:
    configuration = replace(DEFAULT, lr=3e-3)
    state = torch.get_rng_state()
    short, longer = (train(app, configuration, 0, share) for share in (1 / 50, 1 / 4))
    assert longer < short < 10
    assert train(app, configuration, 0, 1 / 50) == short != train(app, configuration, 1, 1 / 50)
    # Some methods sample from this state.
    assert torch.equal(torch.get_rng_state(), state)


def test_diverged_run_has_an_infinite_loss() -> None:
    assert train("embedding", replace(DEFAULT, lr=1e38), 0, 1 / 50) == math.inf


@every_method
def test_method_starts_at_the_configuration_of_the_app_and_keeps_its_budget(method: str) -> None:
    runs: list[tuple[Configuration, float]] = []

    def record(configuration: Configuration, replicate: int, share: float) -> float:
        runs.append((configuration, share))
        return bowl(configuration)

    start = STARTS["bad_lr"]
    chosen = METHODS[method](Problem(start, 100, record), 20, 3)
    assert runs[0] == (start, 1.0)
    assert 19 < sum(share for _, share in runs) <= 20
    assert (chosen, 1.0) in runs
    assert bowl(chosen) < 1.5 < bowl(start)


def test_chosen_configuration_is_evaluated_with_seeds_that_no_search_uses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seeds: list[int] = []

    def fake_train(app: str, configuration: Configuration, seed: int, share: float) -> float:
        seeds.append(seed)
        return bowl(configuration) + (seed >= min(FRESH_SEEDS))

    monkeypatch.setattr(searches, "train", fake_train)
    task = Task("mlp", "bad_lr", "lightning_adam", 20, seed=2)
    result = search(task, tmp_path)
    assert {each for each in seeds if each not in FRESH_SEEDS} == {20, 21, 22}
    assert 2 <= result["loss"] < result["default"] == 1 + bowl(DEFAULT)
    count = len(seeds)
    assert search(task, tmp_path) == result
    assert len(seeds) == count
    losses, defaults = collect([task, replace(task, seed=3)], tmp_path)
    cell = losses["mlp"]["bad_lr"]["lightning_adam 20"]
    assert cell == [pytest.approx(result["loss"], abs=1e-6), None]
    assert defaults == {"mlp": pytest.approx(result["default"], abs=1e-6)}


def test_regret_is_relative_to_the_best_and_the_defaults() -> None:
    row: dict[str, list[float | None]] = {
        "tpe 7": [0.5, 0.7, None, 5.0],
        "gp 7": [0.6, 0.3, 0.4, 0.4],
    }
    found = regrets({"mlp": {"bad_lr": row}}, {"mlp": 0.7})["mlp"]["bad_lr"]
    assert found["tpe 7"] == [pytest.approx(0.5), pytest.approx(1), None, 1]
    assert found["gp 7"] == pytest.approx([0.75, 0, 0.25, 0.25])


def test_paired_comparison_counts_wins_ties_and_losses() -> None:
    better, worse = [0.1, 0.3, 0.2, 0.4], [0.3, 0.52, 0.41, 0.6]
    noisy = [0.2, 0.1, 0.3, 0.35]
    apps = [(better, worse), (better, noisy), (worse, better), (noisy, noisy)]
    assert compare(apps) == Comparison(wins=1, ties=2, losses=1)
    # A missing search is omitted together with its pair.
    first: list[float | None] = [0.0, 1.0, None, 2.0]
    assert compare([(first, [0.1, 1.11, 0.0, 2.1])]) == Comparison(wins=1)
    assert compare([([0.5, 0.5], [1.0, 1.0])]) == Comparison(wins=1)


def test_table_averages_starts_and_compares_searches_of_all_starts() -> None:
    row: dict[str, list[float | None]] = {
        "lightning_adam 20": [0.1, 0.2],
        "tpe 20": [0.31, 0.4],
        "gp 20": [None, None],
    }
    other: dict[str, list[float | None]] = {
        "lightning_adam 20": [0.2, None],
        "tpe 20": [0.4, 0.9],
        "gp 20": [0.1, None],
    }
    summary, details = tables({"mlp": {"default": row, "bad_lr": other}}, {"mlp": 1.1}).split(
        "\n\n"
    )
    assert summary.splitlines()[2:] == [
        "| lightning_adam | 20 | 0.050 | 0.100 | 0.075 | 3 | 0 / 1 / 0 |",
        "| tpe | 20 | 0.255 | 0.550 | 0.403 | 4 | 1 / 0 / 0 |",
    ]
    assert details.splitlines()[2:] == [
        "| mlp | default | 0.050 | 0.255 |",
        "| mlp | bad_lr | 0.100 | 0.550 |",
    ]


def test_stored_results_are_those_of_the_readme() -> None:
    results = json.loads(command.RESULTS.read_text())
    assert tables(results["losses"], results["defaults"]) in README.read_text()
