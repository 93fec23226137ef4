"""The benchmark of tuning: its stored results, the seeds of its searches, and its table."""

import math
from pathlib import Path

import pytest
from optuna.samplers import RandomSampler

from benchmarks import tuning
from benchmarks.tuning import DEFAULT, PLAN, Kept, Task, table
from lightning_adam.tune import sampling
from lightning_adam.tune.point import Point
from tests.tune.searching import bowl, plan_of

BASELINES = ("random", "tpe")


def test_stored_training_is_not_run_again_even_if_the_file_is_cut() -> None:
    runs: list[tuple[Point, int]] = []

    def training(point: Point, seed: int) -> float:
        runs.append((point, seed))
        return 0.25 if seed else math.nan

    file = Path("trainings.jsonl")
    kept = Kept(file, "gpt", training)
    assert kept(DEFAULT, 1) == kept(DEFAULT, 1) == 0.25
    assert math.isnan(kept(DEFAULT, 0))
    with file.open("a") as handle:
        handle.write('{"training": "cut')
    again = Kept(file, "gpt", training)
    assert again(DEFAULT, 1) == 0.25
    assert math.isnan(again(DEFAULT, 0))
    assert len(runs) == 2
    # Another app's is another training.
    Kept(file, "mnist", training)(DEFAULT, 1)
    assert len(runs) == 3


@pytest.mark.parametrize(
    "method", ["staged", *(pytest.param(each, marks=pytest.mark.slow) for each in BASELINES)]
)
def test_methods_have_equal_budgets_and_do_not_see_the_final_seeds(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "RANDOM_FIRST", 1000)
    seen: list[int] = []

    def train(app: str, point: Point, seed: int) -> float:
        seen.append(seed)
        return bowl(point, seed)

    monkeypatch.setattr(tuning, "train", train)
    task = Task("gpt", "bad", method, seed=2)
    result = tuning.search(task, PLAN, 12, 2, Path("trainings.jsonl"))
    assert 10 <= result["trainings"] <= 12
    assert len(result["best_so_far"]) == result["trainings"]
    judged = [seed for seed in seen if seed >= 1000]
    assert {seed for seed in seen if seed < 1000} == ({20, 21} if method == "staged" else {20})
    assert set(judged) == set(tuning.FRESH_SEEDS)
    assert result["loss"] < result["start_loss"]
    point = {**result["point"], "betas": tuple(result["point"]["betas"])}
    assert result["loss"] == pytest.approx(bowl(Point(**point), 1001))


def test_diverging_training_is_never_the_best() -> None:
    plan = plan_of(n_trials=20)
    sampler = RandomSampler(0)

    def training(point: Point, seed: int) -> float:
        return math.nan if point.lr > 1e-3 else bowl(point, seed)

    found = tuning.jointly(plan, DEFAULT, 0, training, sampler)
    assert found[-1][0].lr <= 1e-3
    assert math.isfinite(found[-1][1])


def test_table_holds_means_and_deviations() -> None:
    results = [
        {"app": "gpt", "start": "bad", "method": method, "loss": loss, "start_loss": 5.0}
        for method, losses in {"staged": (2.0, 2.2), "random": (2.1, 2.5)}.items()
        for loss in losses
    ]
    assert table(results).splitlines() == [
        "| app | start | as it is | staged | random | least |",
        "| --- | --- | --- | --- | --- | --- |",
        "| gpt | bad | 5.0000 | 2.1000 ± 0.1414 | 2.3000 ± 0.2828 | staged |",
    ]
