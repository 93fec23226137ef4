"""Chooses the next run and evaluates the runs, as a pure function of the existing runs.

1. The configuration of the app, once.
2. A ladder of learning rates half a decade apart, with the other hyperparameters at calibrated
   defaults and an eighth of the steps; then the best three with a third of the steps.
3. Configurations that a Gaussian process over all hyperparameters and the length proposes.
4. A race on fresh seeds between the best configuration and the app's.

There is no other state. A search that resumes, also with a larger budget or another range, uses all
of its runs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import norm, t

from lightning_adam.config.tune import SpaceConfig
from lightning_adam.tune.configuration import Configuration
from lightning_adam.tune.gaussian_process import Array, GaussianProcess
from lightning_adam.tune.runs import MIN_LENGTH, Outcome, Request, Run, Stage
from lightning_adam.tune.space import Space

LADDER = tuple(10 ** (-4.5 + step / 2) for step in range(8))
"""Learning rates of the first short runs."""
FULL_LADDER = (1e-3, 1e-2, 1e-4)
"""Learning rates of the first runs if runs cannot be shortened."""
MEDIUM_LENGTH = 1 / 3
PROMOTED = 3
"""Rungs of the ladder that are trained longer."""
PROBE_EVERY = 3
"""One in this many proposals is trained for a third of the steps."""
LADDER_MIN_BUDGET = 4
RACE_MIN_BUDGET = 12
AMSGRAD_MIN_BUDGET = 30
"""Smallest budgets with a ladder, a race, and a run with the other amsgrad."""
CONFIDENCE = 0.95
"""Probability of being better that a configuration needs to replace the app's. On pure noise,
about 10 % of the searches choose one, because it is the best of many."""
SKIP_RACE_CONFIDENCE = 0.99
"""Probability of being better above which the app's configuration does not race."""
PRIOR_DEGREES = 4.0
"""Weight of the noise that the Gaussian process has fitted, in degrees of freedom."""
EPS_FINDINGS = ("eps_", "exp_avg_sq_underflow")
"""Prefixes of the findings that add eps to the search."""
ROUNDING = 1e-6


@dataclass(frozen=True)
class Decision:
    """The result of a search so far.

    Attributes:
        chosen: The configuration to use.
        start: Losses of the app's configuration, by replicate.
        best: Losses of the best other configuration, by replicate; empty if there is none.
        gain: Expected decrease of the loss; None if either has no finite loss.
        standard_error: Standard error of the gain; None unless both have raced.
        confidence: Probability that the best other configuration is better; None without one.
        is_over: Whether the budget is spent.
    """

    chosen: Configuration
    start: dict[int, float]
    best: dict[int, float]
    gain: float | None
    standard_error: float | None
    confidence: float | None
    is_over: bool


class Strategy:
    """The search of one study.

    Args:
        start: The configuration of the app.
        budget: Budget in full training runs, at least 1.
        space: The ranges.
        sign: 1 to minimize the metric, -1 to maximize it (default: 1).
        seed: Seed of the proposals (default: 0).

    Example:
        >>> strategy = Strategy(Configuration(1e-4), budget=7, space=SpaceConfig())
        >>> runs = []
        >>> while (request := strategy.next_request(runs)) is not None:
        ...     loss = (math.log10(request.configuration.lr) + 2) ** 2 + 1 / request.length
        ...     runs.append(Run(request, len(runs), Outcome.complete, loss, steps=1000))
        >>> 6 < sum(each.request.length for each in runs) <= 7
        True
        >>> 3e-3 < strategy.decide(runs).chosen.lr < 3e-2
        True
    """

    def __init__(
        self,
        start: Configuration,
        budget: int,
        space: SpaceConfig,
        sign: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.start = start
        self.budget = budget
        self.sign = sign
        self._config = space
        self._seed = seed

    def next_request(self, runs: Sequence[Run]) -> Request | None:
        """Returns the next run to start.

        Args:
            runs: All runs, including those that have not ended.

        Returns:
            The request; None if it depends on a run that has not ended, or the search is over.
        """
        latest = {each.request.key: each for each in runs}
        for run in latest.values():
            if run.is_retried:
                return replace(run.request, attempt=run.request.attempt + run.is_given_up)
        runs = [each for each in runs if not each.is_retried]
        if not runs:
            return Request(Stage.start, self.start)
        start = runs[0]
        if start.outcome is Outcome.running:
            return None
        state = _SearchState(self, runs)
        return state.ladder() or state.proposal() or state.race()

    def decide(self, runs: Sequence[Run]) -> Decision:
        """Returns the result of the runs so far."""
        runs = [each for each in runs if not each.is_retried]
        is_over = bool(runs) and all(each.outcome is not Outcome.running for each in runs)
        is_over = is_over and self.next_request(runs) is None
        return _SearchState(self, runs).decide(is_over)

    def space_of(self, runs: Sequence[Run]) -> Space:
        """Returns the search space, which depends on the steps, dtypes and findings of the runs."""
        first = runs[0] if runs else None
        codes = {code for each in runs for code in each.findings}
        is_half = any("16" in dtype for each in runs for dtype in each.state_dtypes)
        search_eps = is_half or any(code.startswith(EPS_FINDINGS) for code in codes)
        return Space(self.start, self._config, first.steps if first else None, search_eps)

    def contributions(self, runs: Sequence[Run]) -> list[tuple[str, float, float]]:
        """Returns the contribution of each dimension to the gain of the chosen configuration.

        The Gaussian process predicts the loss as one dimension after the other takes its new value,
        in the usual order of tuning, the learning rate first.

        Returns:
            Name, expected decrease of the warped loss, and its standard deviation, both as
            fractions of the whole decrease; empty if the start is chosen.
        """
        state = _SearchState(self, [each for each in runs if not each.is_retried])
        chosen = state.decide(False).chosen
        if chosen == self.start:
            return []
        x, goal = (state.space.coordinates(each) for each in (self.start, chosen))
        total, _ = state.process.difference(x, goal)
        found = []
        for index, dimension in enumerate(state.space.dimensions):
            if x[index] == goal[index] or total <= 0:
                continue
            after = x.copy()
            after[index] = goal[index]
            gain, deviation = state.process.difference(x, after)
            found.append((dimension.name, gain / total, deviation / total))
            x = after
        return found


class _SearchState:
    """The runs of a strategy, with the Gaussian process fitted to them."""

    def __init__(self, strategy: Strategy, runs: Sequence[Run]) -> None:
        self.strategy = strategy
        self.runs = runs
        self.space = strategy.space_of(runs)
        self.used = sum(each.request.length for each in runs)
        self.is_flexible = bool(runs) and runs[0].steps is not None and not runs[0].fixed_length
        self.has_race = strategy.budget >= RACE_MIN_BUDGET
        reserve = (4 if strategy.budget < AMSGRAD_MIN_BUDGET else 6) if self.has_race else 0
        self.left = strategy.budget - reserve - self.used + ROUNDING
        self.coordinates = np.stack(
            [self._coordinates(each) for each in runs] or [self.space.coordinates(strategy.start)]
        )
        self._process: GaussianProcess | None = None

    def ladder(self) -> Request | None:
        """Returns the next rung of the ladder; None if all rungs have started."""
        index = self.space.index("lr")
        if index is None or self.strategy.budget < LADDER_MIN_BUDGET:
            return None
        rates = LADDER if self.is_flexible else FULL_LADDER
        length = MIN_LENGTH if self.is_flexible else 1.0
        started = {each.request.key for each in self.runs}
        low, high = self.space.low[index], self.space.high[index]
        for lr in rates:
            if low <= math.log10(lr) <= high and self._fits(length):
                request = self._request_at(self._default(math.log10(lr)), Stage.ladder, length)
                if request.key not in started:
                    return request
        if not self.is_flexible or not self._fits(MEDIUM_LENGTH):
            return None
        rungs = self._runs_of(Stage.ladder, MIN_LENGTH)
        if any(each.outcome is Outcome.running for each in rungs):
            return None
        for each in sorted(rungs, key=self._loss)[:PROMOTED]:
            x = self.space.coordinates(each.request.configuration, MIN_LENGTH)
            request = self._request_at(x, Stage.ladder, MEDIUM_LENGTH)
            if request.key not in started and math.isfinite(self._loss(each)):
                return request
        return None

    def proposal(self) -> Request | None:
        """Returns the next proposal of the Gaussian process; None if the budget is spent."""
        if any(each.outcome is Outcome.running for each in self._runs_of(Stage.ladder, MIN_LENGTH)):
            return None
        count = len(self._runs_of(Stage.search))
        amsgrad = self.strategy.start.amsgrad
        if (
            self.strategy.budget >= AMSGRAD_MIN_BUDGET
            and self.strategy._config.amsgrad
            and amsgrad is not None
            and 1 <= self.left < 2
        ):
            other = replace(self._best().request.configuration, amsgrad=not amsgrad)
            if not any(each.request.configuration.amsgrad is not amsgrad for each in self.runs):
                return Request(Stage.search, other)
        is_probe = self.is_flexible and count % PROBE_EVERY == 1
        length = MEDIUM_LENGTH if is_probe and self.left >= 1 + MEDIUM_LENGTH else 1.0
        if not self._fits(length):
            return None
        started = {each.request.key for each in self.runs}
        requests = (self._request_at(x, Stage.search, length) for x in self._candidates(count))
        return next((each for each in requests if each.key not in started), None)

    def race(self) -> Request | None:
        """Returns the next run of the race; None if all of its runs have started."""
        search = [each for each in self.runs if each.request.stage is not Stage.race]
        if not self.has_race or any(each.outcome is Outcome.running for each in search):
            return None
        room = self.strategy.budget - self.used + ROUNDING
        started = {each.request.key for each in self.runs}
        for replicate in (1, 2) if self.strategy.budget < AMSGRAD_MIN_BUDGET else (1, 2, 3):
            for configuration in self.contestants():
                request = Request(Stage.race, configuration, replicate=replicate)
                if request.key not in started and room >= 1:
                    return request
        return None

    def contestants(self) -> list[Configuration]:
        """Returns the best configuration and its rival in the race; empty without a configuration.

        The rival is the start, or the second best if the start is far behind. Results of the race
        do not change the contestants, because a new best one would need fresh seeds again.
        """
        is_race = [each.request.stage is Stage.race for each in self.runs]
        if is_race[-1]:
            before = len(is_race) - is_race[::-1].index(False)
            return _SearchState(self.strategy, self.runs[:before]).contestants()
        start = self.strategy.start
        ranked = [each.request.configuration for each in self._ranked()]
        others = [each for each in ranked if each != start]
        if not others:
            return []
        is_sure = len(others) > 1 and self._better_than_start(others[0]) >= SKIP_RACE_CONFIDENCE
        return [others[0], others[1] if is_sure else start]

    def decide(self, is_over: bool) -> Decision:
        start = self.strategy.start
        at_start = self._losses(start)
        contestants = self.contestants() if self.runs else []
        if not contestants:
            return Decision(start, at_start, {}, None, None, None, is_over)
        best, rival = contestants
        if rival != start:
            raced = [self._fresh_mean(each) for each in contestants]
            best = rival if raced[1] < raced[0] else best
        at_best = self._losses(best)
        fresh = sorted(key for key in at_best.keys() & at_start.keys() if key > 0)
        if rival != start or not fresh:
            confidence = self._better_than_start(best)
            before, after = self._mean(at_start), self._mean(at_best)
            gain = before - after if math.isfinite(before - after) else None
            error = None
        else:
            differences = [at_start[each] - at_best[each] for each in fresh]
            gain, error, confidence = self._race_result(differences, at_best)
        chosen = best if confidence >= CONFIDENCE else start
        return Decision(chosen, at_start, at_best, gain, error, confidence, is_over)

    @property
    def process(self) -> GaussianProcess:
        """The Gaussian process. It uses its own expectation for runs that have not ended."""
        if self._process is None:
            lengths = np.array([-math.log2(each.request.length) for each in self.runs])
            losses = np.array([self._loss(each) for each in self.runs])
            over = np.array([each.outcome is not Outcome.running for each in self.runs])
            known = GaussianProcess(
                self.coordinates[over], lengths[over], losses[over], self.space.length_scale
            )
            self._process = known.with_expected(self.coordinates[~over], lengths[~over])
        return self._process

    def _race_result(
        self, differences: Sequence[float], at_best: dict[int, float]
    ) -> tuple[float | None, float | None, float]:
        """Returns the gain, its standard error, and the probability that it is above 0.

        The variance of a few differences is uncertain, so it is shrunk towards the noise of the
        Gaussian process (Smyth 2004, doi 10.2202/1544-6115.1027).
        """
        finite = [each for each in differences if math.isfinite(each)]
        if len(finite) < len(differences):
            return None, None, float(math.isfinite(self._mean(at_best)))
        gain, count = float(np.mean(finite)), len(finite)
        degrees = PRIOR_DEGREES + count - 1
        noise = self._noise(self._mean(at_best))
        # `noise**2` would raise on overflow.
        prior = 2 * noise * noise
        squares = float(np.sum((np.array(finite) - gain) ** 2))
        error = math.sqrt((PRIOR_DEGREES * prior + squares) / degrees / count)
        return gain, error, float(t.cdf(gain / max(error, 1e-30), degrees))

    def _noise(self, loss: float) -> float:
        """Returns the standard deviation between seeds at a loss, as fitted by the process."""
        process = self.process
        return float(math.sqrt(process.noise) * process.deviation * process.warp.slope(loss))

    def _better_than_start(self, configuration: Configuration) -> float:
        """Returns the predicted probability that a configuration is better than the start."""
        at_start = self._losses(self.strategy.start)
        if not all(math.isfinite(each) for each in at_start.values()):
            return 1.0
        gain, deviation = self.process.difference(
            self.space.coordinates(self.strategy.start), self.space.coordinates(configuration)
        )
        return float(norm.cdf(gain / deviation))

    def _ranked(self) -> list[Run]:
        """Returns the full runs with the first seed and a finite loss, the predicted best first."""
        full = [
            (index, each)
            for index, each in enumerate(self.runs)
            if each.request.length == 1 and each.request.replicate == 0
            if math.isfinite(self._loss(each))
        ]
        if not full:
            return []
        mean, _ = self.process.predict(self.coordinates[[index for index, _ in full]])
        order = np.argsort(mean, kind="stable")
        return [full[index][1] for index in order]

    def _best(self) -> Run:
        ranked = self._ranked()
        return ranked[0] if ranked else self.runs[0]

    def _candidates(self, count: int) -> Iterator[Array]:
        """Yields coordinates to try, by decreasing expected improvement.

        The first proposal of a search is the best of the longest rungs of the ladder.
        """
        rungs = [each for each in self._runs_of(Stage.ladder) if math.isfinite(self._loss(each))]
        if count == 0 and rungs and self.is_flexible:
            longest = max(each.request.length for each in rungs)
            best = min((each for each in rungs if each.request.length == longest), key=self._loss)
            yield self.space.coordinates(best.request.configuration, longest)
        rng = np.random.default_rng([self.strategy._seed, len(self.runs)])
        known, _ = self.process.predict(self.coordinates)
        draws = self.space.draw(self.coordinates[np.argmin(known)], rng, use_prior=count % 4 != 3)
        mean, deviation = self.process.predict(draws)
        u = (known.min() - mean) / deviation
        gain = deviation * (u * norm.cdf(u) + norm.pdf(u))
        yield from draws[np.argsort(-gain, kind="stable")]

    def _default(self, lr: float) -> Array:
        x: Array = self.space.default.copy()
        index = self.space.index("lr")
        x[index] = lr
        return x

    def _request_at(self, x: Array, stage: Stage, length: float) -> Request:
        return Request(stage, self.space.configuration(x, length), length)

    def _coordinates(self, run: Run) -> Array:
        return self.space.coordinates(run.request.configuration, run.request.length)

    def _fits(self, length: float) -> bool:
        return length <= self.left

    def _runs_of(self, stage: Stage, length: float | None = None) -> list[Run]:
        return [
            each
            for each in self.runs
            if each.request.stage is stage and length in (None, each.request.length)
        ]

    def _loss(self, run: Run) -> float:
        """Returns a run's loss; infinite if it failed, nan if it has not ended."""
        if run.outcome is Outcome.running:
            return math.nan
        loss = run.loss(self.strategy.sign)
        return loss if math.isfinite(loss) else math.inf

    def _losses(self, configuration: Configuration) -> dict[int, float]:
        """Returns the losses of the full runs of a configuration, by replicate."""
        return {
            each.request.replicate: self._loss(each)
            for each in self.runs
            if each.request.configuration == configuration and each.request.length == 1
            if each.outcome is not Outcome.running
        }

    def _mean(self, values: dict[int, float]) -> float:
        """Returns the mean loss, only of the fresh seeds if there are any."""
        fresh = [value for replicate, value in values.items() if replicate > 0]
        return float(np.mean(fresh or [*values.values()] or [math.nan]))

    def _fresh_mean(self, configuration: Configuration) -> float:
        values = self._losses(configuration)
        return self._mean(values) if len(values) > 1 else math.inf
