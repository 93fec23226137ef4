"""Properties of the schedules for any settings, and comparisons with torch and transformers."""

import io
import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, NamedTuple, cast

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.optim import Adam
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
)
from transformers.optimization import (
    get_constant_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from lightning_adam import build_scheduler
from lightning_adam.optim.schedulers import Schedule
from lightning_adam.optim.shapes import SHAPES

PEAK = 10.0
LONGEST = 2000
DECAYS = {"cosine": "cosine", "linear": "linear", "sqrt": "1-sqrt"}
"""Names of the decays here and in transformers."""

TO_THE_MINIMUM = ("linear", "cosine", "cosine_restarts", "polynomial", "wsd")
"""The schedules that end at the minimum."""
FALLING = ("constant", "linear", "cosine", "polynomial", "inverse_sqrt", "exponential", "wsd")
"""The schedules that are continuous and never rise after the warm-up."""
IN_TRANSFORMERS = (
    "constant",
    "linear",
    "cosine",
    "cosine_restarts",
    "polynomial",
    "inverse_sqrt",
    "wsd",
)

deterministic = settings(deadline=None, derandomize=True)


class Case(NamedTuple):
    """A schedule's config, with its fields in steps."""

    config: dict[str, Any]
    warmup: int
    total: int
    minimum: float

    @property
    def name(self) -> str:
        return str(self.config["name"])

    @property
    def length(self) -> int:
        """The steps after the warm-up."""
        return self.total - self.warmup


def optimizer(peak: float = PEAK) -> Adam:
    return Adam([torch.zeros(1, requires_grad=True)], lr=peak)


def schedule(case: Case) -> Callable[[float], float]:
    """Returns the factor on the peak, a function that is also defined between steps."""
    scheduler = build_scheduler(optimizer(), case.config, case.total)
    assert isinstance(scheduler, Schedule)
    return cast("Callable[[float], float]", scheduler.curve)


minima = st.floats(0.0, 1.0) | st.sampled_from([0.0, 0.1, 1.0])
powers = st.floats(0.1, 8.0) | st.sampled_from([0.5, 1.0, 2.0])
inner_shares = st.floats(0.0, 1.0, exclude_min=True, exclude_max=True)


@st.composite
def cases(
    draw: st.DrawFn,
    names: Iterable[str] = SHAPES,
    minima: st.SearchStrategy[float] = minima,
    longest: int = LONGEST,
) -> Case:
    """Draws a schedule with valid settings and at least one step after the warm-up."""
    name = draw(st.sampled_from(sorted(names)))
    total = draw(st.integers(1, longest))
    warmup = 0 if name == "one_cycle" else draw(st.integers(0, total - 1))
    config: dict[str, Any] = {"name": name}
    if name != "one_cycle":
        config["warmup_steps"] = warmup
    minimum = 0.0
    if name in (*TO_THE_MINIMUM, "exponential"):
        config["min_lr_ratio"] = minimum = draw(minima)
    if name == "polynomial":
        config["power"] = draw(powers)
    if name == "inverse_sqrt":
        config["timescale"] = draw(st.none() | st.integers(1, 20_000))
    if name == "wsd":
        config["decay_steps"] = draw(st.integers(1, total - warmup))
        config["decay"] = draw(st.sampled_from(sorted(DECAYS)))
    if name == "cosine_restarts":
        config["num_cycles"] = draw(st.integers(1, 9))
        config["cycle_mult"] = draw(st.floats(0.5, 3.0) | st.sampled_from([1.0, 2.0]))
    if name == "exponential":
        config["gamma"] = draw(st.floats(0.5, 1.0))
        config["decay_steps"] = draw(st.integers(total // 100 + 1, 2 * total))
    if name == "multistep":
        places = inner_shares | st.integers(1, longest).map(float)
        config["milestones"] = draw(st.lists(places, max_size=5))
        config["gamma"] = draw(st.floats(0.01, 1.0))
    if name == "one_cycle":
        config["pct_start"] = draw(inner_shares)
        config["div_factor"] = draw(st.floats(1.0, 100.0))
        config["final_div_factor"] = draw(st.floats(1.0, 1e6))
        config["anneal"] = draw(st.sampled_from(["cosine", "linear"]))
    return Case(config, warmup, total, minimum)


shares = st.floats(0.0, 1.5) | st.sampled_from([0.0, 1.0])
"""Fractions of the schedule's length, the end and beyond included."""


def transformers_schedule(case: Case, later: int = 0) -> Callable[[int], float]:
    """Returns the function of transformers that means the same.

    Args:
        case: The schedule.
        later: Steps by which the peak and the end come later.
    """
    adam, warmup, total = optimizer(), case.warmup + later, case.total + later
    config, minimum = case.config, case.minimum
    shape = config["name"]
    if shape == "constant":
        scheduler = get_constant_schedule_with_warmup(adam, warmup)
    elif shape == "linear" and not minimum:
        scheduler = get_linear_schedule_with_warmup(adam, warmup, total)  # type: ignore[no-untyped-call]
    elif shape in ("linear", "polynomial"):
        scheduler = get_polynomial_decay_schedule_with_warmup(  # type: ignore[no-untyped-call]
            adam, warmup, total, minimum * PEAK, config.get("power", 1.0)
        )
    elif shape == "cosine":
        scheduler = get_cosine_with_min_lr_schedule_with_warmup(
            adam, warmup, total, min_lr_rate=minimum
        )
    elif shape == "cosine_restarts":
        scheduler = get_cosine_with_hard_restarts_schedule_with_warmup(
            adam, warmup, total, config["num_cycles"]
        )
    elif shape == "inverse_sqrt":
        scheduler = get_inverse_sqrt_schedule(adam, warmup, config["timescale"])
    else:
        scheduler = get_wsd_schedule(
            adam,
            warmup,
            config["decay_steps"],
            total,
            decay_type=DECAYS[config["decay"]],
            min_lr_ratio=minimum,
        )
    (multiplier,) = scheduler.lr_lambdas
    return cast("Callable[[int], float]", multiplier)


def restarts(case: Case) -> set[int]:
    """Returns the steps at which a cycle of equal length ends, where transformers rounds."""
    if case.name != "cosine_restarts":
        return set()
    ends = (Fraction(case.length * each, case.config["num_cycles"]) for each in range(1, 10))
    return {case.warmup + int(end) for end in ends if end.denominator == 1}


@deterministic
@given(cases(IN_TRANSFORMERS, minima=st.floats(0.0, 0.99) | st.just(0.0)))
def test_agrees_with_transformers_at_every_step(case: Case) -> None:
    if case.name == "cosine_restarts":
        case = case._replace(
            minimum=0.0, config={**case.config, "min_lr_ratio": 0, "cycle_mult": 1}
        )
    ours, theirs = schedule(case), transformers_schedule(case)
    # The cosine of transformers rises again after the end.
    last = case.total if case.name == "cosine" else case.total + case.length
    compared = sorted({*range(case.warmup, last + 1)} - restarts(case))
    assert [ours(step) for step in compared] == pytest.approx(
        [theirs(step) for step in compared], rel=0, abs=1e-6
    )


@deterministic
@given(cases(IN_TRANSFORMERS, minima=st.just(0.0)))
def test_warmup_is_that_of_transformers_one_step_earlier(case: Case) -> None:
    """transformers starts with a learning rate of 0, and this package does not."""
    ours, theirs = schedule(case), transformers_schedule(case, later=1)
    steps = range(case.warmup + 1)
    assert [ours(step) for step in steps] == pytest.approx([theirs(step + 1) for step in steps])


def factors_of_torch(build: Callable[[Adam], LRScheduler], steps: int) -> list[float]:
    """Returns the learning rates of a torch scheduler with the peak 1."""
    adam = optimizer(1.0)
    scheduler = build(adam)
    factors = []
    for _ in range(steps):
        factors.append(adam.param_groups[0]["lr"])
        adam.step()
        if len(factors) < steps:
            scheduler.step()
    return factors


@deterministic
@given(cases(["one_cycle"], longest=60))
def test_one_cycle_agrees_with_torch_at_every_step(case: Case) -> None:
    config = case.config
    # torch divides by the length of the rise, and of the fall.
    assume(config["pct_start"] * case.total != 1 and config["pct_start"] * case.total < case.total)
    expected = factors_of_torch(
        lambda adam: OneCycleLR(
            adam,
            1.0,
            case.total,
            pct_start=config["pct_start"],
            anneal_strategy={"cosine": "cos", "linear": "linear"}[config["anneal"]],  # type: ignore[arg-type]
            cycle_momentum=False,
            div_factor=config["div_factor"],
            final_div_factor=config["final_div_factor"],
        ),
        case.total,
    )
    ours = schedule(case)
    assert [ours(step) for step in range(case.total)] == pytest.approx(expected, rel=1e-9)


@deterministic
@given(st.integers(1, 20), st.sampled_from([1, 2, 3]), st.integers(1, 4), minima)
def test_restarts_agree_with_torch_at_every_step(
    cycle: int, mult: int, num_cycles: int, minimum: float
) -> None:
    total = cycle * sum(mult**each for each in range(num_cycles))
    expected = factors_of_torch(
        lambda adam: CosineAnnealingWarmRestarts(adam, cycle, mult, eta_min=minimum), total
    )
    config = {"name": "cosine_restarts", "num_cycles": num_cycles, "cycle_mult": mult}
    ours = schedule(Case({**config, "min_lr_ratio": minimum}, 0, total, minimum))
    assert [ours(step) for step in range(total)] == pytest.approx(expected)


@deterministic
@given(st.lists(st.integers(1, 60), max_size=5), st.floats(0.1, 1.0))
def test_multistep_agrees_with_torch_at_every_step(milestones: list[int], gamma: float) -> None:
    expected = factors_of_torch(lambda adam: MultiStepLR(adam, milestones, gamma), 60)
    config = {"name": "multistep", "milestones": milestones, "gamma": gamma}
    ours = schedule(Case(config, 0, 60, 0.0))
    assert [ours(step) for step in range(60)] == pytest.approx(expected)


@deterministic
@given(st.integers(1, 20), st.floats(0.5, 1.0))
def test_exponential_agrees_with_torch_at_each_epoch(epoch: int, gamma: float) -> None:
    expected = factors_of_torch(lambda adam: ExponentialLR(adam, gamma), 5)
    scheduler = build_scheduler(optimizer(), {"name": "exponential", "gamma": gamma}, None, epoch)
    assert isinstance(scheduler, Schedule)
    assert [scheduler.curve(epoch * each) for each in range(5)] == pytest.approx(expected)
    steps = range(3 * epoch)
    assert [scheduler.curve(step) for step in steps] == pytest.approx(
        [gamma ** (step / epoch) for step in steps]
    )


@deterministic
@given(cases())
def test_every_step_of_the_run_moves(case: Case) -> None:
    multiplier = schedule(case)
    assert min(multiplier(step) for step in range(case.total)) > 0
    if case.name in TO_THE_MINIMUM and case.minimum < 1:
        # A high power is lost in the precision of the minimum.
        is_above = multiplier(case.total - 1) > multiplier(case.total)
        assert is_above or (case.config.get("power", 1) > 1 and case.minimum)


@deterministic
@given(cases(), shares)
def test_factor_is_between_the_minimum_and_1(case: Case, share: float) -> None:
    step = share * case.total
    lowest = case.minimum if step >= case.warmup else 0.0
    if case.name == "one_cycle":
        lowest = 1 / (case.config["div_factor"] * case.config["final_div_factor"])
    assert lowest * (1 - 1e-9) <= schedule(case)(step) <= 1.0


@deterministic
@given(cases((*FALLING, "multistep", "plateau")), shares, shares)
def test_factor_never_rises_after_the_warmup(case: Case, one: float, other: float) -> None:
    multiplier = schedule(case)
    earlier, later = (case.warmup + share * case.length for share in sorted((one, other)))
    assert multiplier(earlier) >= multiplier(later)


def largest_change(case: Case, width: float) -> float:
    """Returns the largest possible change of the factor within `width` steps.

    A warm-up has the slope 1/(warmup + 1). A way of `length` steps from 1 to the minimum has a
    slope of at most 1/length if straight, π/2 times that if half a cosine (in its middle) and
    `power` times that if a power of at least 1 (at its beginning), all times the whole fall.
    A smaller power, and the square root, has no bounded slope, but |xᵃ-yᵃ| ≤ |x-y|ᵃ for 0 < a ≤ 1.
    The derivatives of 1/√(1+step/timescale) and of an exponential are largest at 0.
    """
    config, fall = case.config, 1 - case.minimum
    in_warmup = width / (case.warmup + 1) if case.warmup else 0.0
    kind = config["decay"] if case.name == "wsd" else case.name
    decay_steps = config["decay_steps"] if case.name in ("wsd", "exponential") else case.length
    share = width / decay_steps
    power = {"sqrt": 0.5, "polynomial": config.get("power")}.get(kind) or 1.0
    after: dict[str, float] = {
        "constant": 0.0,
        "linear": fall * share,
        "cosine": fall * share * math.pi / 2,
        "polynomial": fall * (power * share if power >= 1 else share**power),
        "sqrt": fall * share**power,
        "inverse_sqrt": width / (2 * (config.get("timescale") or case.warmup or 10_000)),
        "exponential": -math.log(config.get("gamma", 1.0)) * share,
    }
    return in_warmup + after[kind]


@deterministic
@given(cases(FALLING), shares, st.floats(1e-3, 1.0))
def test_factor_is_continuous(case: Case, share: float, width: float) -> None:
    multiplier = schedule(case)
    step = share * case.total
    change = abs(multiplier(step + width) - multiplier(step))
    assert change <= largest_change(case, width) + 1e-9


@deterministic
@given(cases(FALLING))
def test_factor_is_continuous_where_its_parts_meet(case: Case) -> None:
    multiplier = schedule(case)
    decay = case.config["decay_steps"] if case.name == "wsd" else case.length
    for meeting in (case.warmup, case.total - decay, case.total):
        before, after = multiplier(max(0.0, meeting - 1e-6)), multiplier(meeting + 1e-6)
        assert abs(after - before) <= largest_change(case, 2e-6) + 1e-9


@deterministic
@given(cases([*SHAPES.keys() - {"one_cycle", "multistep"}]))
def test_warmup_is_linear_and_its_first_step_moves(case: Case) -> None:
    multiplier = schedule(case)
    line = [(step + 1) / (case.warmup + 1) for step in range(case.warmup)]
    assert [multiplier(step) for step in range(case.warmup + 1)] == pytest.approx([*line, 1.0])


@deterministic
@given(cases(TO_THE_MINIMUM), st.floats(0.0, 1e6))
def test_factor_ends_at_the_minimum_and_stays_there(case: Case, later: float) -> None:
    multiplier = schedule(case)
    at_end, after = multiplier(case.total), multiplier(case.total + later)
    assert at_end == after == pytest.approx(case.minimum, rel=1e-12)


@deterministic
@given(cases(["inverse_sqrt"]), st.floats(0.0, 1e6))
def test_inverse_sqrt_has_no_end(case: Case, later: float) -> None:
    multiplier = schedule(case)
    timescale = case.config["timescale"] or case.warmup or 10_000
    assert multiplier(case.total) == pytest.approx((1 + case.length / timescale) ** -0.5)
    assert multiplier(case.total + later) <= multiplier(case.total)


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial"])
def test_warmup_as_long_as_the_run_ends_at_the_minimum(name: str) -> None:
    case = Case({"name": name, "warmup_steps": 8, "min_lr_ratio": 0.25}, 8, 8, 0.25)
    multiplier = schedule(case)
    assert [multiplier(step) for step in (6, 7, 8, 9)] == [7 / 9, 8 / 9, 0.25, 0.25]


@deterministic
@given(st.integers(1, LONGEST), st.floats(0.0, 0.6), st.floats(1e-6, 0.4))
def test_ratio_equals_the_steps_it_rounds_to(total: int, warmup: float, decay: float) -> None:
    warmup_steps, decay_steps = round(warmup * total), max(1, round(decay * total))
    assume(warmup_steps + decay_steps <= total)
    by_ratio = {"name": "wsd", "warmup_ratio": warmup, "decay_ratio": decay}
    by_steps = {"name": "wsd", "warmup_steps": warmup_steps, "decay_steps": decay_steps}
    first, second = (schedule(Case(each, 0, total, 0.0)) for each in (by_ratio, by_steps))
    assert first == second


@deterministic
@given(cases(), st.integers(1, LONGEST))
def test_total_steps_of_the_config_is_the_length(case: Case, trainers: int) -> None:
    own = case._replace(config={**case.config, "total_steps": case.total}, total=trainers)
    assert schedule(own) == schedule(case)


PLATEAU: dict[str, Any] = {"name": "plateau", "patience": 1, "factor": 0.5, "cooldown": 1}
TORCHS_PLATEAU: dict[str, Any] = {
    "_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau",
    "patience": 1,
    "factor": 0.5,
}
ONE_CYCLE: dict[str, Any] = {
    "_target_": "torch.optim.lr_scheduler.OneCycleLR",
    "max_lr": PEAK,
    "total_steps": "total_steps",
}
MOMENTUM = "ignore:OneCycleLR cycles the momentum"
resumed_cases = cases() | st.sampled_from(
    [Case({**PLATEAU, "warmup_steps": each}, 0, 60, 0.0) for each in (0, 3)]
    + [Case({**PLATEAU, "mode": "max"}, 0, 60, 0.0), Case(TORCHS_PLATEAU, 0, 60, 0.0)]
    + [Case(ONE_CYCLE, 0, total, 0.0) for total in (20, 60)]
)


class Run:
    """An optimizer with its scheduler."""

    def __init__(self, case: Case) -> None:
        self.optimizer = optimizer()
        self.scheduler = build_scheduler(self.optimizer, case.config, case.total)

    def rates(self, metrics: list[float]) -> list[tuple[float, Any]]:
        """Returns the learning rate and the betas of each step; a step for each metric."""
        seen = []
        for metric in metrics:
            (group,) = self.optimizer.param_groups
            seen.append((group["lr"], group["betas"]))
            self.optimizer.step()
            self.scheduler.step()
            if self.scheduler.plateau is not None:
                self.scheduler.step(metric)
        return seen

    def checkpoint(self) -> bytes:
        file = io.BytesIO()
        torch.save([self.optimizer.state_dict(), self.scheduler.state_dict()], file)
        return file.getvalue()

    def resume(self, checkpoint: bytes) -> None:
        states = torch.load(io.BytesIO(checkpoint), weights_only=True)
        self.optimizer.load_state_dict(states[0])
        self.scheduler.load_state_dict(states[1])


metrics_of_a_run = st.lists(st.floats(-10.0, 10.0), min_size=8, max_size=18)


@pytest.mark.filterwarnings(MOMENTUM)
@deterministic
@given(resumed_cases, metrics_of_a_run, st.data())
def test_checkpoint_at_any_step_continues_the_schedule(
    case: Case, metrics: list[float], data: st.DataObject
) -> None:
    saved_after = data.draw(st.integers(0, len(metrics)), label="saved after")
    uninterrupted = Run(case).rates(metrics)
    first, second = Run(case), Run(case)
    begun = first.rates(metrics[:saved_after])
    second.resume(first.checkpoint())
    assert begun + second.rates(metrics[saved_after:]) == uninterrupted


@deterministic
@given(cases(), st.integers(0, LONGEST), st.integers(0, LONGEST))
def test_state_dict_alone_restores_the_schedule(case: Case, saved_after: int, further: int) -> None:
    first, second = (build_scheduler(optimizer(), case.config, case.total) for _ in range(2))
    first.last_epoch = saved_after
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for scheduler in (first, second):
        scheduler.optimizer.step()
        scheduler.last_epoch += further
        scheduler.step()
    assert second.last_epoch == saved_after + further + 1
    assert second.get_last_lr() == first.get_last_lr()
    assert first.get_last_lr() == [PEAK * schedule(case)(second.last_epoch)]


@pytest.mark.filterwarnings(MOMENTUM)
@pytest.mark.parametrize("config", [PLATEAU, ONE_CYCLE], ids=["plateau", "OneCycleLR"])
def test_checkpoints_after_each_step_continue_the_schedule(config: dict[str, Any]) -> None:
    metrics = [1.0, 0.5, 0.6, 0.7, 0.8, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]
    case = Case(config, 0, len(metrics), 0.0)
    uninterrupted = Run(case).rates(metrics)
    assert len({rate for rate, _ in uninterrupted}) > 2
    run, seen = Run(case), []
    for metric in metrics:
        seen += run.rates([metric])
        checkpoint, run = run.checkpoint(), Run(case)
        run.resume(checkpoint)
    assert seen == uninterrupted
