"""Schedule config and the length of the run → the factor on the peak as a function of the step."""

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
"""The schedules that do not depend on the total number of steps."""


@dataclass(frozen=True)
class RunLength:
    """The length of a run in optimizer steps; None where it is not known.

    Example:
        >>> RunLength(14, 14 / 3, epoch_ends=(8, 12, 14)).after(1.5)
        10
    """

    total_steps: int | None = None
    epoch_steps: float | None = None
    """Steps of an epoch, in the mean."""
    epoch_ends: tuple[int, ...] = ()
    """Steps at the end of each epoch; empty if epochs are alike."""

    def after(self, epochs: float) -> int | None:
        """Returns the steps of the first epochs."""
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
"""How a decay falls from 1 to 0 with its progress."""


def _decay(
    decay: Callable[[float], float], step: float, length: float, min_lr_ratio: float
) -> float:
    """The factor at a step of a decay from 1 to `min_lr_ratio`."""
    progress = 1.0 if step >= length else max(0.0, step / length)
    return min_lr_ratio + (1 - min_lr_ratio) * decay(progress)


def constant(step: float, length: float) -> float:
    """The peak learning rate."""
    return 1.0


def linear(step: float, length: float, min_lr_ratio: float) -> float:
    """Linear decay."""
    return _decay(DECAYS["linear"], step, length, min_lr_ratio)


def cosine(step: float, length: float, min_lr_ratio: float) -> float:
    """Cosine decay."""
    return _decay(DECAYS["cosine"], step, length, min_lr_ratio)


def cosine_restarts(
    step: float, length: float, num_cycles: int, cycle_mult: float, min_lr_ratio: float
) -> float:
    """Cosine decay, `num_cycles` times."""
    start, cycle = 0.0, length / sum(cycle_mult**index for index in range(num_cycles))
    for _ in range(num_cycles - 1):
        # A cycle that ends at a step but for rounding ends there.
        if step < start + cycle - 1e-9 * length:
            break
        start, cycle = start + cycle, cycle * cycle_mult
    return _decay(DECAYS["cosine"], step - start, cycle, min_lr_ratio)


def polynomial(step: float, length: float, power: float, min_lr_ratio: float) -> float:
    """Polynomial decay."""
    return _decay(lambda progress: (1 - progress) ** power, step, length, min_lr_ratio)


def inverse_sqrt(step: float, length: float, timescale: int) -> float:
    """Inverse square-root decay, which has no end."""
    return math.sqrt(timescale / (timescale + step))


def exponential(
    step: float, length: float, gamma: float, decay_steps: float, min_lr_ratio: float
) -> float:
    """Exponential decay down to `min_lr_ratio`, which has no end."""
    return max(min_lr_ratio, math.pow(gamma, step / decay_steps))


def multistep(step: float, length: float, milestones: list[float], gamma: float) -> float:
    """A factor at each milestone."""
    return math.pow(gamma, sum(step >= each for each in milestones))


def one_cycle(
    step: float,
    length: float,
    pct_start: float,
    div_factor: float,
    final_div_factor: float,
    anneal: str,
) -> float:
    """The rise and the fall of `torch.optim.lr_scheduler.OneCycleLR`."""
    first, top = 1 / div_factor, pct_start * length - 1
    if top > 0 and step <= top:
        low, progress = first, 1 - step / top
    else:
        low = first / final_div_factor
        progress = min(1.0, (step - top) / max(length - 1 - top, 1e-9))
    return _decay(DECAYS[anneal], progress, 1, low)


def wsd(step: float, length: float, decay_steps: int, decay: str, min_lr_ratio: float) -> float:
    """The peak learning rate, then a decay over the last `decay_steps`."""
    return _decay(DECAYS[decay], step - (length - decay_steps), decay_steps, min_lr_ratio)


def plateau(step: float, length: float, min_lr_ratio: float) -> float:
    """The peak learning rate, which `Schedule` reduces."""
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
"""The factor on the peak learning rate, from the steps since the warm-up and their number."""


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
        """Returns the factor of the step that follows `step` steps."""
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
    """Resolves a schedule's ratios and epochs.

    Args:
        config: The schedule.
        path: Its place.
        length: The length of the run. The config's own `total_steps` takes precedence.
        peak: The optimizer's learning rate, above 0.

    Returns:
        The curve. What is longer than the run is cut to it, with a warning.

    Raises:
        ConfigError: If it needs the length of the run or of an epoch, and that is not known, or if
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
        raise no_end(path / "name", config.name, path / "total_steps")
    warmup_steps = 0 if warmup is None else _warmup_steps(warmup, path, end, length)
    general: type[StepScheduleConfig] = StepScheduleConfig
    if warmup is not None:
        # What judges the metric of a plateau does not depend on the step.
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
            raise _no_epoch(path / "name", config.name, path / "decay_steps")
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


def no_end(path: ConfigPath, value: str, steps: ConfigPath) -> ConfigError:
    """Returns the error of a schedule that needs the number of steps, where there is none."""
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
            raise _no_epoch(path / field, config.warmup_epochs, path / "warmup_steps")
        steps = in_epochs
    return _cut(path / field, getattr(config, field), steps, end)


def _decay_steps(config: WSDConfig, path: ConfigPath, remaining: int, end: int) -> int:
    if config.decay_steps is not None:
        return max(1, _cut(path / "decay_steps", config.decay_steps, config.decay_steps, remaining))
    return max(1, min(round((config.decay_ratio or 0.1) * end), remaining))


def _cut(path: ConfigPath, value: Any, steps: int, available: int | None) -> int:
    """The steps that fit into the run."""
    if available is None or steps <= available:
        return steps
    rank_zero_warn(
        f"{path.assignment(value)} is longer than the run: {steps} steps, of which {available} are"
        " left. It is cut to them."
    )
    return available


def _no_epoch(path: ConfigPath, value: Any, steps: ConfigPath) -> ConfigError:
    return path.error(
        "needs the number of steps of an epoch, which is not known here",
        f"Set {steps.override(Placeholder('N'))}",
        value=value,
    )


def _min_lr_ratio(config: DecayScheduleConfig, path: ConfigPath, peak: float) -> float:
    if config.min_lr is None:
        return config.min_lr_ratio
    if config.min_lr > peak:
        problem = f"is above the peak, which is {peak:g}"
        raise (path / "min_lr").invalid(config.min_lr, problem, peak / 100)
    return config.min_lr / peak
