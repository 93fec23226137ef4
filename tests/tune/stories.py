"""Synthetic reports of searches, in every shape that a search can leave."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import strategies as st

from lightning_adam.tune.decision import gain_of
from lightning_adam.tune.dimensions import DIMENSIONS
from lightning_adam.tune.point import Point
from lightning_adam.tune.story import Outcome, Score, Step, Story, Trial

START = Point(1e-3, (0.9, 0.999), 1e-8, 0.0, True, False, None)
NASTY = "</script><script>alert(1)</script> | a\nb [x](y) `*_ \x1b😀\udc80 {{ 7 * 7 }} &amp;"
OVERRIDES = ["optimizer.lr=0.005", "optimizer.betas=[0.9,0.99]"]


def score(point: Point, *values: float) -> Score:
    mean = statistics.fmean(values) if values else math.nan
    is_known = len(values) > 1 and math.isfinite(mean)
    return Score(point, values, mean, statistics.stdev(values) if is_known else None)


def trials(stage: str, point: Point, *values: float, number: int = 0) -> list[Trial]:
    """Returns one trial for each seed. One whose metric is not finite has failed."""
    return [
        Trial(stage, number + seed, point, seed, Outcome.complete, value, 61.5, f"{stage}/{seed}")
        if math.isfinite(value)
        else Trial(stage, number + seed, point, seed, Outcome.failed, None, 3.0, error="diverged")
        for seed, value in enumerate(values)
    ]


def start(*values: float) -> Step:
    own = score(START, *values)
    return Step("start", own, own, None, None, None, "The app's own settings.")


def stage(
    name: str,
    before: Score,
    challenger: Score | None,
    *dimensions: str,
    is_taken: bool = True,
    is_over: bool = True,
) -> Step:
    gain, spread = (None, None) if challenger is None else gain_of(before, challenger, 1.0)
    after = challenger if challenger is not None and is_taken else before
    words = "Better: taken." if is_taken else "It stays."
    return Step(name, before, after, challenger, gain, spread, words, dimensions, is_over)


def story(steps: Sequence[Step], all_trials: Sequence[Trial], **others: object) -> Story:
    made = Story("mnist", "train", "minimize", 40, 2, list(steps), list(all_trials))
    return replace(made, **others)  # type: ignore[arg-type]


def tuned() -> Story:
    """Returns a search of two stages, of which the first has found something better."""
    lr, betas = replace(START, lr=0.005), replace(START, lr=0.005, betas=(0.9, 0.99))
    first = start(0.5, 0.52)
    better = stage("lr", first.after, score(lr, 0.3, 0.34), "lr")
    same = stage("beta2", better.after, score(betas, 0.31), "beta2", is_taken=False)
    pruned = replace(START, lr=0.0001)
    all_trials = [
        *trials("start", START, 0.5, 0.52),
        *trials("lr", replace(START, lr=0.1), math.nan),
        Trial("lr", 1, pruned, 0, Outcome.stopped, 0.9, 20.0, findings=("update_lost",)),
        *trials("lr", lr, 0.3, 0.34, number=2),
        *trials("beta2", betas, 0.31),
    ]
    skipped = {"amsgrad": "it takes part from n_trials=40 on"}
    overrides, fixed = OVERRIDES[:1], ["data=small"]
    return story(
        [first, better, same],
        all_trials,
        skipped=skipped,
        overrides=overrides,
        fixed=fixed,
        is_over=True,
    )


def shapes() -> dict[str, Story]:
    first = start(0.5, 0.52)
    own = trials("start", START, 0.5, 0.52)
    none = start(math.nan)
    lr = replace(START, lr=0.005)
    running = Trial("lr", 0, lr, None, Outcome.running)
    decay = replace(START, weight_decay=0.1)
    tied = replace(START, betas=(0.9, 0.9))
    amsgrad = replace(START, amsgrad=True)
    warm = replace(START, warmup_ratio=0.1)
    alone = start(0.5)
    huge = [*trials("lr", lr, 1e308), *trials("lr", replace(START, lr=0.01), -1e308, number=1)]
    found = stage("lr", none.after, score(lr, 0.3, 0.34), "lr")
    both = stage("all", first.after, score(warm, 0.4), *DIMENSIONS)
    return {
        "tuned": tuned(),
        "empty": story([], []),
        "begun": story([], [Trial("start", 0, START, 0, Outcome.running)]),
        "start alone": story([first], own),
        "failed, then found": story(
            [none, found],
            [*trials("start", START, math.nan), *trials("lr", lr, 0.3, 0.34)],
        ),
        "one seed": story(
            [alone, stage("lr", alone.after, score(lr, 0.3), "lr")],
            [*own[:1], *trials("lr", lr, 0.3)],
            n_seeds=1,
        ),
        "stage under way": story(
            [first, stage("lr", first.after, score(lr, 0.3), "lr", is_taken=False, is_over=False)],
            [*own, *trials("lr", lr, 0.3, number=1), running],
        ),
        "no decay": story(
            [first, stage("decay", first.after, score(decay, 0.4), "decay_per_step")],
            [*own, *trials("decay", decay, 0.4)],
        ),
        "tied": story(
            [first, stage("beta2", first.after, score(tied, 0.4), "beta2")],
            [*own, *trials("beta2", tied, 0.4)],
        ),
        "categories": story(
            [first, stage("amsgrad", first.after, score(amsgrad, 0.4, 0.41), "amsgrad")],
            [*own, *trials("amsgrad", amsgrad, 0.4, 0.41)],
        ),
        "warm-up in steps": story(
            [first, stage("warmup", first.after, score(warm, 0.4), "warmup_ratio")],
            [*own, *trials("warmup", warm, 0.4)],
        ),
        "all at once": story([first, both], [*own, *trials("all", warm, 0.4)]),
        "huge": story([first, stage("lr", first.after, score(lr, 1e308), "lr")], [*own, *huge]),
        "all failed": story(
            [none, stage("lr", none.after, None, "lr", is_taken=False)],
            [*trials("start", START, math.nan), *trials("lr", lr, math.nan, math.nan)],
            is_over=True,
        ),
        "nasty": replace(
            tuned(),
            name=NASTY,
            job=NASTY,
            skipped={NASTY: NASTY},
            trials=[replace(each, error=NASTY, folder=NASTY) for each in tuned().trials],
            fixed=["note=a|b<i>", "other=it's"],
        ),
    }


VALUES = st.floats() | st.floats(0.1, 10.0)
POINTS = st.builds(
    Point,
    lr=st.floats(0, 1e3),
    betas=st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
    eps=st.floats(0, 1),
    weight_decay=st.just(0.0) | st.floats(0, 1e6),
    decoupled_weight_decay=st.just(True),
    amsgrad=st.booleans(),
    warmup_ratio=st.none() | st.floats(0, 1),
)
WORDS = st.text(max_size=20)


@st.composite
def made_up(draw: st.DrawFn) -> Story:
    def made_up_trial(stage: str, number: int) -> Trial:
        outcome = draw(st.sampled_from(Outcome))
        has_value = outcome in (Outcome.complete, Outcome.stopped)
        return Trial(
            stage=stage,
            number=number,
            point=draw(st.sampled_from(points)),
            seed=draw(st.none() | st.integers(0, 9)),
            outcome=outcome,
            value=draw(VALUES) if has_value else draw(st.none() | st.just(math.nan)),
            seconds=draw(st.floats(0, 1e6)),
            folder=draw(WORDS),
            error=draw(WORDS),
            findings=draw(st.tuples() | st.tuples(WORDS)),
        )

    points = draw(st.lists(POINTS, min_size=1, max_size=4))
    values = st.lists(VALUES, min_size=1, max_size=2)
    scores = [score(point, *_bounded(draw(values))) for point in points]
    names = draw(st.lists(WORDS, unique=True, max_size=4))
    steps: list[Step] = []
    for place, name in enumerate(names):
        before = steps[-1].after if steps else scores[0]
        best = draw(st.none() | st.sampled_from(scores))
        dimensions = draw(st.lists(st.sampled_from([*DIMENSIONS]), unique=True, max_size=3))
        is_taken, is_over = draw(st.booleans()), place + 1 < len(names) or draw(st.booleans())
        new = stage(name, before, best, *dimensions, is_taken=is_taken, is_over=is_over)
        steps.append(new if place else replace(new, before=new.after, dimensions=()))
    run = [
        made_up_trial(name, number) for name in names for number in range(draw(st.integers(0, 4)))
    ]
    return Story(
        name=draw(WORDS),
        job=draw(WORDS),
        direction=draw(st.sampled_from(["minimize", "maximize"])),
        n_trials=draw(st.integers(1, 50)),
        n_seeds=draw(st.integers(1, 3)),
        steps=steps,
        trials=run,
        skipped=draw(st.dictionaries(WORDS, WORDS, max_size=2)),
        overrides=draw(st.lists(st.sampled_from(OVERRIDES))),
        fixed=draw(st.lists(st.sampled_from(["a='b c'", "d=1"]))),
        is_over=draw(st.booleans()),
    )


def _bounded(values: Sequence[float]) -> list[float]:
    """Returns metrics whose deviation is a number, too."""
    return [each if abs(each) < 1e150 else math.nan for each in values]
