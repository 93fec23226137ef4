"""The search: its budget and stages, its decisions, and how it resumes after a kill."""

import itertools
import math
import random
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_adam.config.errors import ConfigError
from lightning_adam.tune import sampling
from lightning_adam.tune import search as search_module
from lightning_adam.tune.alive import Observer
from lightning_adam.tune.archive import Archive
from lightning_adam.tune.point import Point
from lightning_adam.tune.search import Search
from lightning_adam.tune.story import START, Outcome
from tests.support.tables import each_row
from tests.tune.searching import (
    DEFAULT,
    LR,
    archive_of,
    bowl,
    end,
    plan_of,
    run_out,
    search_of,
    shipped_stages,
    skipped,
    steps_of,
    trials_of,
)

SMALL_BUDGETS = {
    1: set(),
    5: {"lr"},
    9: {"lr"},
    10: {"lr", "warmup", "beta1"},
    25: {"lr", "warmup", "beta1"},
    26: {"lr", "warmup", "beta1", "beta2", "weight_decay"},
    40: {"lr", "warmup", "beta1", "beta2", "weight_decay", "amsgrad"},
}
"""The stages of a budget, where nothing calls for another eps."""


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "SECONDS_BETWEEN_LOOKS", 0.01)


@pytest.fixture
def _at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points are drawn at random, where it does not matter which: it is quicker."""
    monkeypatch.setattr(sampling, "RANDOM_FIRST", 1000)


@pytest.mark.usefixtures("_at_random")
def test_only_the_first_seed_of_a_searched_point_can_be_pruned() -> None:
    batches = run_out(search_of(plan_of(n_trials=20, n_seeds=2)), bowl)
    runs = [run for batch in batches for run in batch]
    assert {run.seed for run in runs if run.stage != START} == {0, 1}
    for run in runs:
        assert run.may_stop == (run.stage != START and run.seed == 0)


@pytest.mark.usefixtures("_at_random")
def test_budget_goes_to_the_stages_that_it_can_pay_for() -> None:
    with each_row() as row:
        for n_trials, expected in SMALL_BUDGETS.items():
            with row(n_trials):
                search = search_of(plan_of(n_trials=n_trials))
                run_out(search, bowl)
                stages = {each.stage for each in trials_of(search)} - {START}
                assert stages == expected
                # All is used, but for confirmations that were not needed.
                assert 0 <= n_trials - len(trials_of(search)) <= len(stages)
                assert {*stages, *skipped(search)} == set(shipped_stages()) or n_trials == 1


@pytest.mark.slow
def test_search_finds_the_minimum_of_a_bowl() -> None:
    search = search_of(plan_of(n_trials=80))
    run_out(search, bowl)
    point = steps_of(search)[-1].after.point
    assert point.betas is not None
    assert abs(math.log10(point.lr / 3e-3)) < 0.1
    assert abs(math.log10((1 - point.betas[0]) / 0.2)) < 0.15
    assert abs(math.log10((1 - point.betas[1]) / 0.01)) < 0.3
    assert point.amsgrad is False
    assert bowl(point, 0) < 0.03 < bowl(DEFAULT, 0)


def test_search_maximizes_where_the_direction_says_so() -> None:
    search = search_of(plan_of(LR, direction="maximize", n_trials=12))
    run_out(search, lambda point, seed: -((math.log10(point.lr) + 2) ** 2))
    steps = steps_of(search)
    assert 0.007 < steps[-1].after.point.lr < 0.014
    assert steps[-1].gain is not None
    assert steps[-1].gain > 0.9
    _, step = steps
    assert step.challenger == step.after


@settings(deadline=None, derandomize=True, max_examples=8)
@given(
    n_trials=st.integers(1, 45),
    n_seeds=st.integers(1, 4),
    n_jobs=st.integers(1, 5),
    chance=st.sampled_from([0.0, 0.2, 0.6]),
    seed=st.integers(0, 1000),
)
def test_search_keeps_its_budget_and_ends_whatever_fails(
    n_trials: int, n_seeds: int, n_jobs: int, chance: float, seed: int
) -> None:
    luck = random.Random(seed)
    is_first = itertools.count()

    def objective(point: Point, training_seed: int) -> float:
        fate = luck.random() if next(is_first) else 1.0
        if fate < chance / 2:
            raise RuntimeError("out of memory")
        return math.nan if fate < chance else bowl(point, training_seed) + luck.gauss(0, 0.1)

    search = search_of(plan_of(n_trials=n_trials, n_seeds=n_seeds, n_jobs=n_jobs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "RANDOM_FIRST", 1000)
        batches = run_out(search, objective)
    trials = trials_of(search)
    assert len(trials) <= n_trials
    assert all(len(batch) <= n_jobs for batch in batches)
    keys = [(each.stage, each.point, each.seed) for each in trials]
    assert len(keys) == len(set(keys))
    # Stages follow each other: none begins before the one in front of it has ended.
    order = [stage for stage, _ in itertools.groupby(each.stage for each in trials)]
    assert len(order) == len(set(order))
    for before, after in itertools.pairwise(steps_of(search)):
        assert after.before == before.after
    # What is taken ended well with every seed it was run with.
    for step in steps_of(search)[1:]:
        if step.after != step.before:
            assert all(map(math.isfinite, step.after.values))


def test_stage_ends_early_when_all_its_values_are_known() -> None:
    stages = {"eps": {"space": {"eps": {"low": 1e-8, "high": 1e-6}}}}
    search = search_of(plan_of(stages, n_trials=20))
    run_out(search, lambda point, seed: float(point.eps or 0))
    assert {each.point.eps for each in trials_of(search)} == {1e-8, 1e-7, 1e-6}
    assert len(trials_of(search)) == 2 + 2


def test_exactly_the_listed_values_are_tried() -> None:
    stages = {"lr": {"space": {"lr": [1e-4, 1e-3, 3e-3]}}}
    search = search_of(plan_of(stages, n_trials=20))
    run_out(search, bowl)
    assert {each.point.lr for each in trials_of(search)} == {1e-4, 1e-3, 3e-3}
    assert steps_of(search)[-1].after.point.lr == 3e-3


@pytest.mark.usefixtures("_at_random")
def test_initial_points_come_first_and_beta2_follows_beta1() -> None:
    search = search_of(plan_of(n_trials=40))
    run_out(search, bowl)
    lrs = [each.point.lr for each in trials_of(search) if each.stage == "lr"]
    # 1e-3 is the start's own.
    assert lrs[:2] == [1e-4, 1e-2]
    first = next(each.point for each in trials_of(search) if each.stage == "beta2")
    assert first.betas is not None
    assert first.betas[0] == first.betas[1] != 0.999


@pytest.mark.usefixtures("_at_random")
def test_diverging_start_is_replaced_by_a_point_that_converges() -> None:
    search = search_of(plan_of(LR, n_trials=8), DEFAULT.with_values(lr=0.1))
    run_out(search, lambda point, seed: math.nan if point.lr > 0.05 else bowl(point, seed))
    # No second seed for what fails with the first.
    assert len([each for each in trials_of(search) if each.stage == START]) == 1
    step = steps_of(search)[-1]
    assert math.isnan(step.before.mean)
    assert step.gain is None
    assert "no finite metric" in step.words
    assert step.after.point.lr < 0.05


@pytest.mark.usefixtures("_at_random")
def test_point_that_fails_with_the_second_seed_is_not_taken() -> None:
    search = search_of(plan_of(LR, n_trials=8))

    def objective(point: Point, seed: int) -> float:
        return math.nan if seed and point != DEFAULT else bowl(point, seed)

    run_out(search, objective)
    step = steps_of(search)[-1]
    assert step.after.point == DEFAULT
    assert "fails with another" in step.words


@pytest.mark.usefixtures("_at_random")
def test_search_in_which_every_run_fails_stops_with_the_exception() -> None:
    search = search_of(plan_of(LR, n_trials=30))

    def objective(point: Point, seed: int) -> float:
        raise RuntimeError("FileNotFoundError: data/train.bin")

    with pytest.raises(ConfigError, match=r"All of the first 5 .*data/train\.bin.* without -m"):
        run_out(search, objective)
    assert len(trials_of(search)) == 5


EPS_IS_SEARCHED: tuple[tuple[str, list[str], bool], ...] = (
    ("bf16-true bfloat16", [], True),
    ("16-mixed float32", [], True),
    ("32-true float32", ["eps_dominates"], True),
    ("32-true float32", ["exp_avg_sq_underflow"], True),
    ("32-true float32", ["updates_lost"], False),
    ("64-true float64", [], False),
)
"""Precisions and findings of the runs, and whether they call for another eps."""


@pytest.mark.usefixtures("_at_random")
def test_eps_is_searched_where_precision_or_a_finding_calls_for_it() -> None:
    with each_row() as row:
        for precision, findings, is_searched in EPS_IS_SEARCHED:
            with row((precision, findings)):
                stages = {"eps": shipped_stages()["eps"]}
                search = search_of(plan_of(stages, n_trials=26))
                while batch := search.next_batch():
                    for begun in batch:
                        notes: dict[str, Any] = {"precision": precision, "findings": findings}
                        search.archive.note(begun.stage, begun.number, **notes)
                        end(search.archive, begun, bowl)
                tried = {each.point.eps for each in trials_of(search) if each.stage == "eps"}
                assert bool(tried) is is_searched
                assert tried <= {float(f"1e-{exponent}") for exponent in range(3, 13)}
                assert ("eps" in skipped(search)) is not is_searched


@pytest.mark.usefixtures("_at_random")
def test_stage_of_a_missing_setting_is_skipped_with_the_reason() -> None:
    point = Point(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1, decoupled_weight_decay=False)
    search = search_of(plan_of(n_trials=60), point)

    def objective(point: Point, seed: int) -> float:
        return math.log10(point.lr / 3e-3) ** 2

    run_out(search, objective)
    assert skipped(search)["amsgrad"] == "the optimizer has no amsgrad"
    assert skipped(search)["eps"] == "the optimizer has no eps"
    assert "no schedule that could warm up" in skipped(search)["warmup"]
    assert "space.weight_decay={low:1e-6,high:1e-2}" in skipped(search)["weight_decay"]


@pytest.mark.parametrize(
    ("n_jobs", "random_first"),
    [(1, 1000), (3, 1000), pytest.param(1, sampling.RANDOM_FIRST, marks=pytest.mark.slow)],
)
def test_search_that_is_killed_anywhere_gives_the_same_result(
    n_jobs: int, random_first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process is killed between batches, or while a batch is running."""
    monkeypatch.setattr(sampling, "RANDOM_FIRST", random_first)
    plan = plan_of(n_trials=26, n_jobs=n_jobs)
    uncut = search_of(plan)
    run_out(uncut, bowl)
    expected = [(each.stage, each.point, each.seed, each.value) for each in trials_of(uncut)]
    luck = random.Random(n_jobs)
    place = f"journal:{tmp_path / 'trials.journal'}"
    dead: set[str] = set()
    monkeypatch.setattr(Observer, "is_alive", lambda self, process: process not in dead)
    trained: list[tuple[str, Point, int | None]] = []
    cut: set[tuple[Point, int | None]] = set()
    for _ in range(200):
        search = search_of(plan, archive=Archive(place, "search", "minimize"))
        batch = search.next_batch()
        if not batch:
            break
        for begun in batch:
            key = (begun.point, begun.seed)
            if luck.random() < 0.25 and key not in cut:
                # One that is cut twice has failed.
                cut.update((each.point, each.seed) for each in batch)
                break
            end(search.archive, begun, bowl)
            trained.append((begun.stage, begun.point, begun.seed))
        dead.add(search.owner)
    assert not batch, "the search does not end"
    assert len(cut) > 3
    found = {(each.stage, each.point, each.seed, each.value) for each in trials_of(search)}
    assert len(trained) == len(set(trained))
    # With several jobs what is learned from in between depends on who was lost.
    if n_jobs == 1:
        assert found == set(expected)
    assert all(each.outcome is Outcome.complete for each in trials_of(search))
    assert len(found) == len(trials_of(search)) <= 26


@pytest.mark.usefixtures("_at_random")
def test_run_whose_process_dies_twice_has_failed() -> None:
    archive = archive_of(plan_of())
    plan = plan_of(n_trials=6, n_seeds=1)
    deaths = 0
    for _ in range(20):
        search = Search(plan, DEFAULT, archive, [0])
        # As if the process before this one had been killed.
        search._observer.is_alive = lambda process: False  # type: ignore[method-assign]
        batch = search.next_batch()
        if not batch:
            break
        for begun in batch:
            if begun.point.lr == 1e-2:
                deaths += 1
            else:
                end(archive, begun, bowl)
    assert not batch, "the search does not end"
    assert deaths == 2
    (failed,) = [each for each in trials_of(search) if each.outcome is Outcome.failed]
    assert (failed.point.lr, failed.error) == (1e-2, "its process was killed")
    assert len(trials_of(search)) == 6


@pytest.mark.usefixtures("_at_random")
def test_batch_that_its_launcher_lost_is_repeated_one_by_one() -> None:
    search = search_of(plan_of(LR, n_trials=8, n_jobs=3, n_seeds=1))
    first = search.next_batch()
    for begun in first:
        end(search.archive, begun, bowl)
    batch = search.next_batch()
    assert len(batch) == 3
    end(search.archive, batch[0], bowl)
    search.lose(batch, "BrokenProcessPool")
    again = search.next_batch()
    assert [each.point for each in again] == [batch[1].point]
    search.archive.note("lr", again[0].number, job=f"{socket.gethostname()}/1.1/a")
    search.lose(again, "BrokenProcessPool")
    record = next(
        each for each in search.archive.records("lr") if each.trial.number == again[0].number
    )
    assert record.trial.outcome is Outcome.failed
    assert record.trial.error == "its process was killed"
    (other,) = search.next_batch()
    assert other.point == batch[2].point
    end(search.archive, other, bowl)
    run_out(search, bowl)
    assert len(trials_of(search)) == 8


def test_launcher_that_starts_nothing_is_reported_with_its_exception() -> None:
    search = search_of(plan_of(LR, n_trials=20, n_jobs=2))

    def run_all() -> None:
        while batch := search.next_batch():
            search.lose(batch, "no srun")

    with pytest.raises(ConfigError, match=r"did not begin it: no srun. .*hydra/launcher=basic"):
        run_all()


@pytest.mark.usefixtures("_at_random")
def test_larger_budget_continues_from_known_trials() -> None:
    archive = archive_of(plan_of())
    run_out(search_of(plan_of(n_trials=10), archive=archive), bowl)
    search = search_of(plan_of(n_trials=30), archive=archive)
    before = trials_of(search)
    run_out(search, bowl)
    after = trials_of(search)
    assert after[: len(before)] == before
    assert 10 < len(after) <= 30
    assert bowl(steps_of(search)[-1].after.point, 0) <= min(
        each.value for each in before if each.value is not None
    )
