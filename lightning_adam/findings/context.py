"""Inputs of rules besides statistics: facts of the run and earlier measurements.

Imports neither torch nor lightning.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning_adam.config.errors import ConfigPath, Source

SMOOTHING = 0.9
"""Weight of the earlier measurements in an average."""


@dataclass(frozen=True)
class GroupFacts:
    """A parameter group at the start of training."""

    name: str
    settings: Mapping[str, Any]
    """The peak `lr`, `betas`, `eps`, `weight_decay` and so on."""
    paths: Mapping[str, ConfigPath] = field(default_factory=dict)
    """By setting that the group itself sets: its config path."""
    eps_by_dtype: Mapping[str, float] = field(default_factory=dict)
    """By dtype of the parameters, which is also that of the state: eps, or 0 if it rounds to 0."""
    resolution_by_dtype: Mapping[str, float] = field(default_factory=dict)
    """By dtype: the distance from 1 to the next larger number."""


@dataclass(frozen=True)
class RunFacts:
    """Facts of a run that are known before its first step."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """The defaults of the optimizer's parameter groups."""
    groups: Sequence[GroupFacts] = ()
    optimizer_path: ConfigPath = field(default_factory=lambda: ConfigPath("optimizer"))
    """Config path of the optimizer."""
    scheduler_path: ConfigPath = field(default_factory=lambda: ConfigPath("scheduler"))
    """Config path of the schedule."""
    monitor_path: ConfigPath = field(default_factory=lambda: ConfigPath("adam_monitor"))
    """Config path of the monitor."""
    schedule: Mapping[str, Any] | None = None
    """The resolved settings of the schedule; None if it is not one of this package."""
    dtypes: frozenset[str] = frozenset({"float32"})
    """Dtypes of the parameters."""
    peak_lr: float = math.nan
    """The largest learning rate of the schedule."""
    total_steps: float = math.inf
    """Optimizer steps of the run; infinite if unknown."""
    steps_per_epoch: float = math.nan
    batches_per_epoch: float = math.nan
    accumulate_grad_batches: int = 1
    samples_per_step: float = math.nan
    """Samples in one optimizer step, over all ranks."""
    every_n_steps: int = 1
    """Optimizer steps from one measurement to the next."""
    is_clipped: bool = False
    """Whether the trainer or the module clips gradients."""
    is_manual_optimization: bool = False
    """Whether the module calls `backward` and `step` itself."""
    ungrouped_parameters: Sequence[str] = ()
    """Names of the parameters that require a gradient but are in no parameter group."""
    initial_norm: float = 0.0
    """Norm of the matrices under a standard initialization (variance 1/fan_in)."""
    is_resumed: bool = False
    """Whether the step is the first after a checkpoint was loaded."""

    @property
    def trainer_path(self) -> ConfigPath:
        """Config path of the trainer."""
        is_cli = self.optimizer_path.source is Source.LIGHTNING_CLI
        return ConfigPath("trainer", source=Source.LIGHTNING_CLI if is_cli else Source.HYDRA)

    @property
    def warmup_steps(self) -> float:
        """Steps of the learning-rate warm-up; 0 if unknown."""
        return float((self.schedule or {}).get("warmup_steps") or 0)


class RunningSummary(NamedTuple):
    """Running summary of a statistic in one scope."""

    first: float
    last: float
    largest: float
    smoothed: float
    """Moving average."""
    largest_smoothed: float

    @classmethod
    def of(cls, value: float) -> "RunningSummary":
        """Returns the summary of one value."""
        return cls(value, value, value, value, value)

    def updated(self, value: float) -> "RunningSummary":
        """Returns the summary with one more value.

        Example:
            >>> RunningSummary.of(1.0).updated(2.0).smoothed
            1.1
        """
        if not math.isfinite(value):
            return self._replace(last=value)
        if not math.isfinite(self.smoothed):
            return self.of(value)
        smoothed = SMOOTHING * self.smoothed + (1 - SMOOTHING) * value
        return RunningSummary(
            self.first,
            value,
            max(self.largest, value),
            smoothed,
            max(self.largest_smoothed, smoothed),
        )


UNKNOWN = RunningSummary.of(math.nan)


class GradientTrend(NamedTuple):
    """Change of the gradient norm in a scope; 1 if unknown."""

    decline: float = 1.0
    """The smoothed norm as a fraction of its maximum."""
    growth: float = 1.0
    """The smoothed norm as a multiple of the first norm."""


class History:
    """Earlier values of the statistics in a scope; NaN if there are none.

    Example:
        >>> History({"lr": RunningSummary.of(0.1).updated(0.3)}).largest("lr")
        0.3
    """

    def __init__(self, summaries: Mapping[str, RunningSummary]) -> None:
        self._summaries = summaries

    def first(self, statistic: str) -> float:
        """Returns the first value."""
        return self._summary(statistic).first

    def last(self, statistic: str) -> float:
        """Returns the value at the previous measurement."""
        return self._summary(statistic).last

    def largest(self, statistic: str) -> float:
        """Returns the largest value."""
        return self._summary(statistic).largest

    def smoothed(self, statistic: str) -> float:
        """Returns the moving average."""
        return self._summary(statistic).smoothed

    @property
    def gradient(self) -> GradientTrend:
        """The change of the gradient norm.

        Example:
            >>> summary = RunningSummary.of(1.0)
            >>> for _ in range(100):
            ...     summary = summary.updated(0.0)
            >>> History({"grad_norm": summary}).gradient.decline < 0.001
            True
        """
        norm = self._summary("grad_norm")
        if not norm.largest_smoothed > 0:
            return GradientTrend()
        growth = norm.smoothed / norm.first if norm.first else math.inf
        return GradientTrend(norm.smoothed / norm.largest_smoothed, growth)

    def _summary(self, statistic: str) -> RunningSummary:
        return self._summaries.get(statistic, UNKNOWN)


TensorValues = Callable[[str], Mapping[str, float]]
"""Returns the values of a statistic by tensor."""


class Spikes(NamedTuple):
    """Deviations of a step from earlier steps; NaN or empty after too few steps."""

    loss: float = math.nan
    """How many standard deviations the loss is above its mean."""
    loss_streak: int = 0
    """Number of consecutive measurements with a loss spike."""
    grad_norm: float = math.nan
    """How many standard deviations the gradient norm is above its mean."""
    tensor_scores: Mapping[str, float] = {}
    """By tensor: how many standard deviations its gradient norm is above its moving average."""
    tensor_times_largest: Mapping[str, float] = {}
    """By tensor: its gradient norm as a multiple of the earlier maximum."""
    rms_ratio_times_largest: Mapping[str, float] = {}
    """By tensor: its `rms_ratio` as a multiple of the earlier maximum."""


@dataclass(frozen=True)
class RuleContext:
    """Inputs of a suggestion: the scope in which a finding is raised, and the run."""

    values: Mapping[str, float]
    """The statistics of the scope."""
    run: RunFacts
    history: History = field(default_factory=lambda: History({}))
    groups: Sequence[str] = ()
    """The names of the parameter groups in the scope; empty for all."""
    low_denominator: Callable[[], float | None] = lambda: None
    """Returns the smallest 1st percentile of √v̂ in the scope and in those in which the finding is
    already open; None if unknown."""

    @property
    def betas(self) -> tuple[float, float]:
        """The largest betas in the scope."""
        betas = [self._setting_of(group, "betas", (0.9, 0.999)) for group in self._groups()]
        beta1, beta2 = zip(*betas, strict=True)
        return max(map(float, beta1)), max(map(float, beta2))

    def setting(self, name: str) -> float:
        """Returns the largest value of a setting in the scope."""
        return max(float(self._setting_of(group, name, math.nan)) for group in self._groups())

    def overrides(self, **settings: object) -> tuple[str, ...]:
        """Returns overrides of the optimizer, and of the groups that set the field themselves.

        Example:
            >>> RuleContext({}, RunFacts()).overrides(betas=[0.9, 0.95])
            ('optimizer.betas=[0.9,0.95]',)
        """
        found: dict[str, None] = {}
        for name, value in settings.items():
            for group in self._groups():
                paths = {} if group is None else group.paths
                path = paths.get(name, self.run.optimizer_path / name)
                found[path.unquoted_override(value)] = None
        return tuple(found)

    def _groups(self) -> list[GroupFacts | None]:
        inside = [each for each in self.run.groups if not self.groups or each.name in self.groups]
        return list(inside) or [None]

    def _setting_of(self, group: GroupFacts | None, name: str, default: Any) -> Any:
        settings = self.run.defaults if group is None else group.settings
        return settings.get(name, self.run.defaults.get(name, default))
