"""What a rule judges by beside statistics: facts of the run, and earlier measurements.

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
    """A parameter group, as it is about to be trained."""

    name: str
    settings: Mapping[str, Any]
    """`lr` at its peak, `betas`, `eps`, `weight_decay` and so on."""
    paths: Mapping[str, ConfigPath] = field(default_factory=dict)
    """The place of a setting in the configs, by its name, where it is not the optimizer's."""
    eps_by_dtype: Mapping[str, float] = field(default_factory=dict)
    """The value of eps in each dtype of the parameters, which is that of the state."""
    resolution_by_dtype: Mapping[str, float] = field(default_factory=dict)
    """The distance from 1 to the next number in each dtype."""


@dataclass(frozen=True)
class RunFacts:
    """Facts of a run that are known before its first step."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """The optimizer's settings, without its groups'."""
    groups: Sequence[GroupFacts] = ()
    optimizer_path: ConfigPath = field(default_factory=lambda: ConfigPath("optimizer"))
    """The place of the optimizer's config."""
    scheduler_path: ConfigPath = field(default_factory=lambda: ConfigPath("scheduler"))
    """The place of the schedule's config."""
    monitor_path: ConfigPath = field(default_factory=lambda: ConfigPath("adam_monitor"))
    """The place of the monitor's config."""
    schedule: Mapping[str, Any] | None = None
    """The resolved settings of a schedule of this package; None without one."""
    dtypes: frozenset[str] = frozenset({"float32"})
    """Dtypes of the parameters, in torch's words."""
    peak_lr: float = math.nan
    """The largest learning rate of the schedule."""
    total_steps: float = math.inf
    """Optimizer steps that the trainer will take."""
    steps_per_epoch: float = math.nan
    batches_per_epoch: float = math.nan
    accumulate_grad_batches: int = 1
    samples_per_step: float = math.nan
    """Samples in one optimizer step, over all ranks."""
    every_n_steps: int = 1
    """Steps from one measurement to the next."""
    is_clipped: bool = False
    """Whether the trainer or the module clips gradients."""
    is_manual_optimization: bool = False
    """Whether the module calls `backward` and `step` itself."""
    left_out: Sequence[str] = ()
    """Parameters that require a gradient and are in no group."""
    initial_norm: float = 0.0
    """Norm that the matrices would have at a standard initialisation, of 1/fan_in variance."""
    is_resumed: bool = False
    """Whether the step is the first after a checkpoint was loaded."""

    @property
    def trainer_path(self) -> ConfigPath:
        """The place of the trainer's settings."""
        is_cli = self.optimizer_path.source is Source.LIGHTNING_CLI
        return ConfigPath("trainer", source=Source.LIGHTNING_CLI if is_cli else Source.HYDRA)

    @property
    def warmup_steps(self) -> float:
        """Steps of the learning-rate warm-up, as far as the schedule says."""
        return float((self.schedule or {}).get("warmup_steps") or 0)


class RunningSummary(NamedTuple):
    """Earlier values of a statistic of a scope."""

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
    """How a scope's gradient norm has changed; 1 where it is not known."""

    decline: float = 1.0
    """The norm as a fraction of the largest that it has been, both smoothed."""
    growth: float = 1.0
    """The smoothed norm as a multiple of the first."""


class History:
    """Earlier measurements of a scope, NaN where there are none.

    Example:
        >>> History({"lr": RunningSummary.of(0.1).updated(0.3)}).largest("lr")
        0.3
    """

    def __init__(self, summaries: Mapping[str, RunningSummary]) -> None:
        self._summaries = summaries

    def first(self, statistic: str) -> float:
        """Returns the first value."""
        return self._of(statistic).first

    def last(self, statistic: str) -> float:
        """Returns the value at the measurement before this one."""
        return self._of(statistic).last

    def largest(self, statistic: str) -> float:
        """Returns the largest value."""
        return self._of(statistic).largest

    def smoothed(self, statistic: str) -> float:
        """Returns the moving average."""
        return self._of(statistic).smoothed

    @property
    def gradient(self) -> "GradientTrend":
        """How the gradient norm has changed.

        Example:
            >>> summary = RunningSummary.of(1.0)
            >>> for _ in range(100):
            ...     summary = summary.updated(0.0)
            >>> History({"grad_norm": summary}).gradient.decline < 0.001
            True
        """
        norm = self._of("grad_norm")
        if not norm.largest_smoothed > 0:
            return GradientTrend()
        growth = norm.smoothed / norm.first if norm.first else math.inf
        return GradientTrend(norm.smoothed / norm.largest_smoothed, growth)

    def _of(self, statistic: str) -> RunningSummary:
        return self._summaries.get(statistic, UNKNOWN)


class Spikes(NamedTuple):
    """How far a step is from those before it; NaN or empty after too few."""

    loss: float = math.nan
    """Standard deviations of the loss above its mean."""
    loss_streak: int = 0
    """Measurements in a row whose loss is a spike."""
    grad_norm: float = math.nan
    """Standard deviations of the gradient norm above its mean."""
    tensor_scores: Mapping[str, float] = {}
    """By tensor, standard deviations of its gradient norm above its moving average."""
    tensor_times_largest: Mapping[str, float] = {}
    """By tensor, its gradient norm as a multiple of the largest before."""
    rms_ratio_times_largest: Mapping[str, float] = {}
    """By tensor, its `rms_ratio` as a multiple of the largest before."""


@dataclass(frozen=True)
class RuleContext:
    """What a suggestion is computed from: a scope in which a finding is raised, and the run."""

    values: Mapping[str, float]
    """The statistics of the scope."""
    run: RunFacts
    history: History = field(default_factory=lambda: History({}))
    groups: Sequence[str] = ()
    """The names of the parameter groups in the scope; empty for all."""
    low_denominator: Callable[[], float | None] = lambda: None
    """Returns the value that 1 % of the scope's √v̂ are below, and of those where the finding is
    open already; None if it is not known."""

    @property
    def betas(self) -> tuple[float, float]:
        """The largest betas in the scope."""
        betas = [self._of(group, "betas", (0.9, 0.999)) for group in self._groups()]
        beta1, beta2 = zip(*betas, strict=True)
        return max(map(float, beta1)), max(map(float, beta2))

    def setting(self, name: str) -> float:
        """Returns the largest value of a setting in the scope."""
        return max(float(self._of(group, name, math.nan)) for group in self._groups())

    def overrides(self, **settings: object) -> tuple[str, ...]:
        """Returns overrides of the optimizer, of each group's own field where it has one.

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

    def _of(self, group: GroupFacts | None, name: str, default: Any) -> Any:
        settings = self.run.defaults if group is None else group.settings
        return settings.get(name, self.run.defaults.get(name, default))
