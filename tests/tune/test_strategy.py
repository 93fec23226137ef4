"""The requests and decisions of a search, with functions instead of training runs."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from lightning_adam.config.tune import Range, SpaceConfig
from lightning_adam.tune import space
from lightning_adam.tune import strategy as module
from lightning_adam.tune.configuration import Configuration
from lightning_adam.tune.runs import Outcome, Request, Run, Stage
from lightning_adam.tune.space import Space
from lightning_adam.tune.strategy import CONFIDENCE, Decision, Strategy, _SearchState
from tests.support.tables import each_row
from tests.tune.simulation import START, Objective, ended, of, search, used

BEST_LR = 10**-2.3


@pytest.fixture(autouse=True)
def _few_draws(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduces the draws per proposal to 100, which halves the time."""
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(space, "DRAWS", 100)


def strategy(budget: int, start: Configuration = START, seed: int = 0) -> Strategy:
    return Strategy(start, budget, SpaceConfig(), seed=seed)


def bowl(request: Request) -> float:
    """Returns a loss that is lowest at lr 0.005, and higher for shorter runs."""
    return math.log10(request.configuration.lr / BEST_LR) ** 2 + 0.1 / request.length


def noise(seed: int = 0) -> Objective:
    rng = np.random.default_rng(seed)
    return lambda _: float(rng.normal())


def ladder_rates(budget: int, fixed_length: str) -> set[float]:
    runs: list[Run] = []
    while (request := strategy(budget).next_request(runs)) and request.stage is not Stage.search:
        runs.append(ended(request, len(runs), bowl(request), fixed_length=fixed_length))
    rungs = [each.request for each in of(runs, Stage.ladder) if each.request.length != 1 / 3]
    return {each.configuration.lr for each in rungs}


# ---- Requests


def test_larger_budget_never_tries_fewer_learning_rates() -> None:
    for fixed_length in ("", "a run has only 9 steps"):
        budgets = (1, 2, 3, 4, 7, 11, 12, 20, 29, 30, 60)
        counts = [len(ladder_rates(each, fixed_length)) for each in budgets]
        assert counts == sorted(counts)
        assert counts[3] == (3 if fixed_length else 8)


def test_short_runs_count_partially_in_the_budget() -> None:
    for budget in (1, 2, 4, 7, 13):
        runs, _ = search(strategy(budget), bowl)
        assert budget - 1 < used(runs) <= budget + 1e-6
        lengths = {each.request.length for each in runs}
        assert (min(lengths) == 1 / 8) is (budget >= 4)


def test_eight_parallel_runs_need_at_most_nine_batches() -> None:
    runs, batches = search(strategy(40), bowl, n_jobs=8)
    assert batches <= 9
    assert 39 < used(runs) <= 40 + 1e-6
    keys = [each.request.key for each in runs]
    assert len(keys) == len(set(keys))


def test_app_that_cannot_be_shortened_is_searched_at_full_length() -> None:
    for facts in ({"steps": None}, {"fixed_length": "a run has only 9 steps"}):
        runs, _ = search(strategy(8), bowl, **facts)
        assert [each.request.length for each in runs] == [1.0] * 8
        assert len({each.request.configuration.lr for each in runs}) >= 4


def test_search_finds_the_learning_rate_of_either_direction() -> None:
    for sign in (1.0, -1.0):
        searching = Strategy(START, 12, SpaceConfig(), sign=sign)
        runs, _ = search(searching, bowl if sign > 0 else lambda request: -bowl(request))
        assert searching.decide(runs).chosen.lr == pytest.approx(BEST_LR, rel=0.8)
        assert searching.decide(runs).is_over


def decay_bowl(request: Request) -> float:
    """Returns a loss that only strong weight decay raises."""
    found, length = request.configuration, 10_000 * request.length
    assert found.weight_decay is not None
    decay = found.weight_decay * (found.lr * length if found.decoupled_weight_decay else 1e3)
    return bowl(request) + math.log10(1 + decay)


def test_harmful_weight_decay_is_avoided_with_small_and_large_budgets() -> None:
    rows = [(0.5, True, 7), (5.0, True, 7), (0.5, True, 20), (0.1, False, 7)]
    with each_row() as row:
        for decay, is_decoupled, budget in rows:
            with row((decay, is_decoupled, budget)):
                start = replace(START, weight_decay=decay, decoupled_weight_decay=is_decoupled)
                searching = strategy(budget, start)
                runs, _ = search(searching, decay_bowl, steps=10_000)
                chosen = searching.decide(runs).chosen
                assert chosen != start
                full = Request(Stage.search, chosen)
                assert decay_bowl(full) - bowl(full) < 0.05


def test_amsgrad_is_tried_last_with_a_large_budget() -> None:
    rates = np.geomspace(1e-4, 0.1, 23)
    requests = [Request(Stage.search, replace(START, lr=float(lr))) for lr in rates]
    runs = [
        ended(each, number, bowl(each), steps=None)
        for number, each in enumerate([Request(Stage.start, START), *requests])
    ]

    def proposal(budget: int, known: list[Run]) -> Request:
        request = _SearchState(strategy(budget), known).proposal()
        assert request is not None
        return request

    assert not proposal(29, runs[:22]).configuration.amsgrad
    assert not proposal(30, runs[:22]).configuration.amsgrad
    last = proposal(30, runs[:23])
    assert last.configuration == replace(START, lr=last.configuration.lr, amsgrad=True)
    assert bowl(last) == min(bowl(each) for each in requests)
    assert _SearchState(strategy(30), [*runs[:23], ended(last, 23, 9.0)]).proposal() is None


def test_eps_is_searched_for_states_of_16_bits_or_a_finding_about_eps() -> None:
    rows: list[tuple[dict[str, Any], bool]] = [
        ({"state_dtypes": ("float32",)}, False),
        ({"state_dtypes": ("bfloat16", "float32")}, True),
        ({"findings": ("update_lost",)}, False),
        ({"findings": ("eps_dominates",)}, True),
        ({"findings": ("exp_avg_sq_underflow",)}, True),
    ]
    with each_row() as row:
        for facts, is_searched in rows:
            with row(facts):
                run = ended(Request(Stage.start, START), 0, 0.5, **facts)
                found = strategy(20).space_of([run]).index("eps")
                assert (found is not None) is is_searched


def test_proposal_has_the_largest_expected_improvement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares with the mean improvement of samples."""
    runs, _ = search(strategy(7), bowl)
    state = _SearchState(strategy(20), runs)
    known, _ = state.process.predict(state.coordinates)
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(100_000, 1))
    for _ in range(5):
        draws = rng.uniform(state.space.low, state.space.high, size=(8, len(state.space.low)))
        draws[0] = state.coordinates[np.argmin(known)]
        mean, deviation = state.process.predict(draws)
        gains = np.maximum(known.min() - (mean + deviation * samples), 0).mean(0)
        monkeypatch.setattr(Space, "draw", lambda *_, draws=draws, **__: draws)
        assert np.array_equal(next(state._candidates(1)), draws[np.argmax(gains)])


# ---- Interruptions


def test_search_with_a_larger_budget_or_range_keeps_all_runs() -> None:
    first, _ = search(strategy(7), bowl)
    wide = SpaceConfig(lr=Range(1e-6, 1.0))
    for changed in (strategy(12), Strategy(START, 12, wide)):
        runs, _ = search(changed, bowl, first)
        assert runs[: len(first)] == first
        assert 11 < used(runs) <= 12 + 1e-6
        keys = [each.request.key for each in runs]
        assert len(keys) == len(set(keys))
    # The budget is already spent.
    assert strategy(7).next_request(first) is None


def test_run_that_was_killed_with_its_search_is_started_again_each_time() -> None:
    request = Request(Stage.start, START)
    killed = [Run(request, number, Outcome.failed, is_lost=True) for number in range(2)]
    assert strategy(8).next_request(killed) == request


def test_run_lost_by_its_launcher_is_retried_once() -> None:
    request = Request(Stage.start, START)
    lost = Run(request, 0, Outcome.failed, is_lost=True, is_given_up=True)
    again = strategy(8).next_request([lost])
    assert again == replace(request, attempt=2)
    running = Run(again, 1, Outcome.running)
    assert strategy(8).next_request([lost, running]) is None
    other = strategy(8).next_request([lost, replace(lost, request=again, number=1)])
    assert other is not None
    assert other.configuration != START
    assert used([lost]) + used(search(strategy(4), bowl, [lost])[0][1:]) <= 5


# ---- Decisions


def decide(at_start: list[float | None], at_best: list[float | None], budget: int) -> Decision:
    """Decides on runs of the start and another configuration; the first have the first seed."""
    other = replace(START, lr=BEST_LR)
    runs: list[Run] = []
    for configuration, values in ((START, at_start), (other, at_best)):
        for replicate, value in enumerate(values):
            stage = Stage.race if replicate else Stage.search
            request = Request(stage, configuration, replicate=replicate)
            runs.append(ended(request, len(runs), value))
    return strategy(budget).decide(runs)


def test_race_without_a_prior_is_a_paired_t_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PRIOR_DEGREES", 0.0)
    before, after = [0.51, 0.55, 0.48], [0.49, 0.50, 0.49]
    decision = decide([0.6, *before], [0.5, *after], 30)
    expected = ttest_rel(before, after, alternative="greater")
    assert decision.gain == pytest.approx(np.mean(before) - np.mean(after))
    assert decision.confidence == pytest.approx(1 - expected.pvalue)
    assert decision.standard_error == pytest.approx(decision.gain / expected.statistic)
    assert decision.chosen == START


def test_equal_differences_of_two_seeds_are_not_certain() -> None:
    decision = decide([0.6, 0.51, 0.52], [0.5, 0.50, 0.51], 20)
    assert decision.confidence is not None
    assert 0.5 < decision.confidence < 0.9 < CONFIDENCE
    assert decision.chosen == START


def test_first_seed_does_not_count_in_a_race() -> None:
    assert decide([9.0, 0.5, 0.5], [0.1, 0.5, 0.5], 20).chosen == START


def test_configuration_that_fails_on_a_fresh_seed_is_not_used() -> None:
    assert decide([0.6, 0.5, 0.5], [0.1, 0.1, None], 20).chosen == START
    assert decide([0.6, 0.5, None], [0.1, 0.1, 0.1], 20).chosen != START


def test_any_finite_loss_beats_a_failed_start() -> None:
    decision = decide([None], [3.0], 7)
    assert (decision.confidence, decision.gain) == (1.0, None)
    assert decision.chosen != START
    assert decide([None], [None], 7).chosen == START
    nothing = Decision(START, {0: 0.5}, {}, None, None, None, is_over=False)
    assert decide([0.5], [None], 7) == nothing


def test_start_that_is_far_behind_does_not_race() -> None:
    runs, _ = search(strategy(20, replace(START, lr=1.1e-5)), bowl)
    racing = {each.request.configuration for each in of(runs, Stage.race)}
    assert len(racing) == 2
    assert all(each.lr > 1e-3 for each in racing)
    assert len(of(runs, Stage.race)) == 4


def test_race_results_do_not_change_the_contestants() -> None:
    searching = strategy(12)
    runs, _ = search(searching, bowl)
    explored = [each for each in runs if each.request.stage is not Stage.race]
    best = _SearchState(searching, explored).contestants()[0]
    again, _ = search(searching, lambda request: 9.0, explored)
    racing = [each.request.configuration for each in of(again, Stage.race)]
    assert racing == [best, racing[1], best, racing[1]]


@pytest.mark.slow
def test_noise_is_rarely_chosen() -> None:
    """No configuration is better than another."""
    adopted = 0
    for seed in range(60):
        searching = strategy(20, seed=seed)
        runs, _ = search(searching, noise(seed))
        adopted += searching.decide(runs).chosen != START
    assert adopted <= 0.15 * 60


def test_contributions_add_up_to_the_gain() -> None:
    searching = strategy(24, replace(START, lr=1e-4, weight_decay=5.0))
    runs, _ = search(searching, decay_bowl, steps=10_000)
    shares = {name: gain for name, gain, _ in searching.contributions(runs)}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["lr"] + shares["decay_timescale"] > 0.7
    assert strategy(1).contributions(runs[:1]) == []
