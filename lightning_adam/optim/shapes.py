"""Shapes of schedules: the factor on the peak learning rate as a function of the step."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_adam.config.errors import ConfigError, ConfigPath, Placeholder
from lightning_adam.config.schedule import (
    Decay,
    DecayScheduleConfig,
    ExponentialConfig,
    InverseSqrtConfig,
    MultiStepConfig,
    PlateauConfig,
    StepScheduleConfig,
    WarmupScheduleConfig,
    WSDConfig,
)

ENDLESS = ("constant", "inverse_sqrt", "exponential", "plateau")
"""Schedules that do not depend on the total number of steps."""


@dataclass(frozen=True)
class RunLength:
    """The length of a run in optimizer steps; None where it is unknown.

    Example:
        >>> RunLength(14, 14 / 3, epoch_ends=(8, 12, 14)).after(1.5)
        10
    """

    total_steps: int | None = None
    epoch_steps: float | None = None
    """Mean number of steps of an epoch."""
    epoch_ends: tuple[int, ...] = ()
    """Number of steps at the end of each epoch; empty if all epochs have the same length."""

    def after(self, epochs: float) -> int | None:
        """Returns the number of steps of the first `epochs`, a number that may be fractional."""
        if self.epoch_steps is None:
            return None
        ends = (0, *self.epoch_ends)
        whole = min(int(epochs), len(ends) - 1)
        is_known = whole + 1 < len(ends)
        following = ends[whole + 1] - ends[whole] if is_known else self.epoch_steps
        return round(ends[whole] + (epochs - whole) * following)


DECAYS: dict[str, Callable[[float], float]] = {
    Decay.cosine.value: lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    Decay.linear.value: lambda progress: 1 - progress,
    Decay.sqrt.value: lambda progress: 1 - math.sqrt(progress),
}
"""Decays from 1 to 0 as a function of the progress from 0 to 1."""


def _decay(
    decay: Callable[[float], float], step: float, length: float, min_lr_ratio: float
) -> float:
    """Returns the factor at a step of a decay from 1 to `min_lr_ratio`."""
    progress = 1.0 if step >= length else max(0.0, step / length)
    return min_lr_ratio + (1 - min_lr_ratio) * decay(progress)


def constant(step: float, length: float) -> float:
    """Returns 1: the peak learning rate."""
    return 1.0


def linear(step: float, length: float, min_lr_ratio: float) -> float:
    """Returns the factor of a linear decay."""
    return _decay(DECAYS["linear"], step, length, min_lr_ratio)


def cosine(step: float, length: float, min_lr_ratio: float) -> float:
    """Returns the factor of a cosine decay."""
    return _decay(DECAYS["cosine"], step, length, min_lr_ratio)


def cosine_restarts(
    step: float, length: float, num_cycles: int, cycle_mult: float, min_lr_ratio: float
) -> float:
    """Returns the factor of `num_cycles` cosine decays."""
    start, cycle = 0.0, length / sum(cycle_mult**index for index in range(num_cycles))
    for _ in range(num_cycles - 1):
        # The tolerance ends a cycle at the right step despite rounding.
        if step < start + cycle - 1e-9 * length:
            break
        start, cycle = start + cycle, cycle * cycle_mult
    return _decay(DECAYS["cosine"], step - start, cycle, min_lr_ratio)


def polynomial(step: float, length: float, power: float, min_lr_ratio: float) -> float:
    """Returns the factor of a polynomial decay."""
    return _decay(lambda progress: (1 - progress) ** power, step, length, min_lr_ratio)


def inverse_sqrt(step: float, length: float, timescale: int) -> float:
    """Returns the factor of an inverse square-root decay, which has no end."""
    return math.sqrt(timescale / (timescale + step))


def exponential(
    step: float, length: float, gamma: float, decay_steps: float, min_lr_ratio: float
) -> float:
    """Returns the factor of an exponential decay down to `min_lr_ratio`, which has no end."""
    return max(min_lr_ratio, math.pow(gamma, step / decay_steps))


def multistep(step: float, length: float, milestones: list[float], gamma: float) -> float:
    """Returns the factor after a drop at each milestone."""
    return math.pow(gamma, sum(step >= each for each in milestones))


def one_cycle(
    step: float,
    length: float,
    pct_start: float,
    div_factor: float,
    final_div_factor: float,
    anneal: str,
) -> float:
    """Returns the factor of `torch.optim.lr_scheduler.OneCycleLR`."""
    first, top = 1 / div_factor, pct_start * length - 1
    if top > 0 and step <= top:
        low, progress = first, 1 - step / top
    else:
        low = first / final_div_factor
        progress = min(1.0, (step - top) / max(length - 1 - top, 1e-9))
    return _decay(DECAYS[anneal], progress, 1, low)


def wsd(step: float, length: float, decay_steps: int, decay: str, min_lr_ratio: float) -> float:
    """Returns 1, and the factor of a decay over the last `decay_steps`."""
    return _decay(DECAYS[decay], step - (length - decay_steps), decay_steps, min_lr_ratio)


def plateau(step: float, length: float, min_lr_ratio: float) -> float:
    """Returns 1; `Schedule` reduces the peak learning rate."""
    return 1.0


SHAPES: dict[str, Callable[..., float]] = {
    shape.__name__: shape
    for shape in (
        constant,
        linear,
        cosine,
        cosine_restarts,
        polynomial,
        inverse_sqrt,
        exponential,
        multistep,
        one_cycle,
        wsd,
        plateau,
    )
}
"""Functions of the steps since the warm-up and their total number, by the schedule's name."""


@dataclass(frozen=True)
class Curve:
    """The factor on the peak learning rate as a function of the optimizer step.

    Example:
        >>> curve = Curve("linear", 1, total_steps=5, arguments={"min_lr_ratio": 0.0})
        >>> [curve(step) for step in range(5)]
        [0.5, 1.0, 0.75, 0.5, 0.25]
    """

    name: str
    warmup_steps: int
    total_steps: int | None
    arguments: dict[str, Any]

    def __call__(self, step: int) -> float:
        """Returns the factor of the step after `step` steps."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        end = math.inf if self.total_steps is None else self.total_steps
        return SHAPES[self.name](
            step - self.warmup_steps, end - self.warmup_steps, **self.arguments
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The settings with all ratios resolved."""
        return {
            "name": self.name,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
            **self.arguments,
        }


def curve(config: StepScheduleConfig, path: ConfigPath, length: RunLength, peak: float) -> Curve:
    """Builds the curve of a schedule; resolves ratios and epochs to steps.

    Args:
        config: The schedule.
        path: Its path.
        length: The length of the run. The config's `total_steps` takes precedence.
        peak: The optimizer's learning rate, above 0.

    Returns:
        The curve. A warm-up or decay longer than the run is shortened to it, with a warning.

    Raises:
        ConfigError: If it needs the length of the run or of an epoch, which is unknown, or if
            `min_lr` is above the peak.

    Example:
        >>> from lightning_adam.config.schedule import CosineConfig
        >>> config = CosineConfig(warmup_epochs=0.5, min_lr=1e-5)
        >>> curve(config, ConfigPath("scheduler"), RunLength(100, 10), peak=1e-3).settings
        {'name': 'cosine', 'warmup_steps': 5, 'total_steps': 100, 'min_lr_ratio': 0.01}
    """
    end = length.total_steps if config.total_steps is None else config.total_steps
    warmup = config if isinstance(config, WarmupScheduleConfig) else None
    if end is None and (config.name not in ENDLESS or (warmup and warmup.warmup_ratio)):
        raise endless_run_error(path / "name", config.name, path / "total_steps")
    warmup_steps = 0 if warmup is None else _warmup_steps(warmup, path, end, length)
    general: type[StepScheduleConfig] = StepScheduleConfig
    if warmup is not None:
        # The settings that compare the metric of a plateau do not depend on the step.
        is_plateau = isinstance(config, PlateauConfig)
        general = PlateauConfig if is_plateau else WarmupScheduleConfig
    names = {each.name for each in fields(config)} - {each.name for each in fields(general)}
    arguments = {name: getattr(config, name) for name in sorted(names)}
    if isinstance(config, DecayScheduleConfig):
        arguments.pop("min_lr", None)
        arguments["min_lr_ratio"] = _min_lr_ratio(config, path, peak)
    if isinstance(config, InverseSqrtConfig):
        arguments["timescale"] = config.timescale or warmup_steps or 10_000
    elif isinstance(config, ExponentialConfig) and config.decay_steps is None:
        if length.epoch_steps is None:
            raise _unknown_epoch_error(path / "name", config.name, path / "decay_steps")
        arguments["decay_steps"] = length.epoch_steps
    elif isinstance(config, MultiStepConfig):
        steps = [each if each >= 1 else round(each * (end or 0)) for each in config.milestones]
        arguments["milestones"] = [each - warmup_steps for each in steps]
    elif isinstance(config, WSDConfig):
        assert end is not None
        del arguments["decay_ratio"]
        arguments["decay_steps"] = _decay_steps(config, path, end - warmup_steps, end)
    arguments = {
        name: str(value) if isinstance(value, str) else value for name, value in arguments.items()
    }
    return Curve(config.name, warmup_steps, end, arguments)


def endless_run_error(path: ConfigPath, value: str, steps: ConfigPath) -> ConfigError:
    """Returns the error of a schedule that needs the number of steps, in a run without an end."""
    return path.error(
        "needs the number of optimizer steps, and the run has no end",
        f"Set {steps.override(Placeholder('N'))}, or give the Trainer max_steps",
        value=value,
    )


def _warmup_steps(
    config: WarmupScheduleConfig, path: ConfigPath, end: int | None, length: RunLength
) -> int:
    steps, field = config.warmup_steps or 0, "warmup_steps"
    if config.warmup_ratio is not None and end is not None:
        steps, field = round(config.warmup_ratio * end), "warmup_ratio"
    if config.warmup_epochs:
        field, in_epochs = "warmup_epochs", length.after(config.warmup_epochs)
        if in_epochs is None:
            raise _unknown_epoch_error(path / field, config.warmup_epochs, path / "warmup_steps")
        steps = in_epochs
    return _limit_steps(path / field, getattr(config, field), steps, end)


def _decay_steps(config: WSDConfig, path: ConfigPath, remaining: int, end: int) -> int:
    if config.decay_steps is not None:
        return max(
            1, _limit_steps(path / "decay_steps", config.decay_steps, config.decay_steps, remaining)
        )
    return max(1, min(round((config.decay_ratio or 0.1) * end), remaining))


def _limit_steps(path: ConfigPath, value: Any, steps: int, available: int | None) -> int:
    """Returns the number of steps, at most those of the run."""
    if available is None or steps <= available:
        return steps
    rank_zero_warn(
        f"{path.assignment(value)} is longer than the run: {steps} steps, of which {available} are"
        f" left. Using {available} steps."
    )
    return available


def _unknown_epoch_error(path: ConfigPath, value: Any, steps: ConfigPath) -> ConfigError:
    return path.error(
        "needs the number of steps of an epoch, which is unknown",
        f"Set {steps.override(Placeholder('N'))}",
        value=value,
    )


def _min_lr_ratio(config: DecayScheduleConfig, path: ConfigPath, peak: float) -> float:
    if config.min_lr is None:
        return config.min_lr_ratio
    if config.min_lr > peak:
        problem = f"is above the peak learning rate, {peak:g}"
        raise (path / "min_lr").invalid(config.min_lr, problem, peak / 100)
    return config.min_lr / peak
