"""What a rule is, and what it is given to judge by.

Imports neither torch nor lightning.
"""

import inspect
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, TypeVar

from lightning_adam.config.errors import ConfigError, ConfigPath
from lightning_adam.config.monitor import Scope, Severity
from lightning_adam.statistics.catalogue import STATISTICS


class Warmup(Enum):
    """Optimizer steps before which a rule is not judged."""

    NONE = "none"
    FIRST_MOMENT = "3/(1-β1) steps, at least 30"
    DIRECTION = "15/(1-β1) steps, at least 150"
    SECOND_MOMENT = "1/(1-β2) steps"

    def steps(self, beta1: float, beta2: float) -> float:
        """How many they are.

        Example:
            >>> round(Warmup.FIRST_MOMENT.steps(0.9, 0.999))
            30
        """
        if self is Warmup.NONE:
            return 0.0
        if self is Warmup.SECOND_MOMENT:
            return 1 / (1 - beta2)
        least = 30.0 if self is Warmup.FIRST_MOMENT else 150.0
        return max(0.1 * least / (1 - beta1), least)


class Memory(NamedTuple):
    """What is kept of a statistic of a scope."""

    first: float
    last: float
    largest: float

    def with_next(self, value: float) -> "Memory":
        """The same with one more measurement."""
        return Memory(self.first, value, max(self.largest, value))


class Past:
    """What earlier measurements have said of a scope, NaN where they have said nothing.

    Example:
        >>> Past({"lr": Memory(first=0.1, last=0.2, largest=0.3)}).largest("lr")
        0.3
    """

    def __init__(self, memories: Mapping[str, Memory]) -> None:
        self._memories = memories

    def first(self, statistic: str) -> float:
        """Its first value."""
        return self._of(statistic).first

    def last(self, statistic: str) -> float:
        """Its value at the measurement before this one."""
        return self._of(statistic).last

    def largest(self, statistic: str) -> float:
        """Its largest value."""
        return self._of(statistic).largest

    def _of(self, statistic: str) -> Memory:
        return self._memories.get(statistic, Memory(math.nan, math.nan, math.nan))


@dataclass(frozen=True)
class Training:
    """What is known of a training beside its measurements."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """The optimizer's own settings, `lr`, `betas` and so on, without its groups'."""
    optimizer_path: ConfigPath = field(default_factory=lambda: ConfigPath("optimizer"))
    """The place of the optimizer's config."""
    scheduler_path: ConfigPath = field(default_factory=lambda: ConfigPath("scheduler"))
    """The place of the schedule's config."""
    dtypes: frozenset[str] = frozenset({"float32"})
    """Those of the parameters, in torch's words."""
    peak_lr: float = math.nan
    """The largest learning rate that the schedule comes to."""
    total_steps: float = math.inf
    """The optimizer steps that the trainer will take."""
    steps_per_epoch: float = math.nan
    every_n_steps: int = 1
    """The steps from one measurement to the next."""
    loss_share: float = math.nan
    """The loss, as a share of the first that was seen."""
    is_resumed: bool = False
    """Whether the step was the first after a checkpoint was loaded: `Watch.resume` asks."""

    @property
    def has_converged(self) -> bool:
        """Whether the loss is a fiftieth of what it was: then gradients are small in health."""
        return abs(self.loss_share) < 0.02


class Cure(NamedTuple):
    """One way to mend it."""

    overrides: tuple[str, ...]
    """What to type behind the training's command, each `key=value`."""
    hint: str = ""
    """What has to be done where nothing can be typed, or what comes with it."""


@dataclass(frozen=True)
class Case:
    """What a remedy is computed from: the scope in which a finding is raised."""

    values: Mapping[str, float]
    """The statistics of the scope."""
    training: Training
    low_denominator: Callable[[], float | None] = lambda: None
    """What 1 % of the scope's √v̂ are below, counted when it is asked for."""

    @property
    def betas(self) -> tuple[float, float]:
        """The optimizer's own."""
        beta1, beta2 = self.training.defaults.get("betas", (0.9, 0.999))
        return float(beta1), float(beta2)

    def setting(self, name: str) -> float:
        """One of the optimizer's own settings."""
        return float(self.training.defaults.get(name, math.nan))


@dataclass(frozen=True)
class Rule:
    """One pathology, and all there is to know of it."""

    code: str
    severity: Severity
    meaning: str
    """What is wrong and why it hurts, in words."""
    sentence: str
    """What is said of it, with statistics in braces, as `str.format` takes them."""
    source: str
    scopes: tuple[Scope, ...]
    """Where it is judged, the widest first: what is found in one is not told of the next."""
    persistence: int
    """The measurements in a row that raise it, and that close it."""
    warmup: Warmup
    explained_by: tuple[str, ...]
    """Codes of findings that are its cause: while one of them holds, it is not raised."""
    evidence: tuple[str, ...]
    """Statistics that prove it beside those of the condition."""
    remedy: Callable[[Case], list[Cure]]
    condition: Callable[..., Any]
    statistics: tuple[str, ...]
    """The statistics that the condition is judged by, in the order of its arguments."""
    asks_for: tuple[str, ...]
    """What else it is judged by, of `ASKABLE`."""
    thresholds: Mapping[str, float]

    @property
    def settings(self) -> dict[str, Any]:
        """What can be set of it, under `adam_monitor.findings.<code>`."""
        return {
            **self.thresholds,
            "persistence": self.persistence,
            "severity": self.severity.value,
        }

    @property
    def is_foreseen(self) -> bool:
        """Whether it is judged before the first step, by the plan alone."""
        return "plan" in self.asks_for

    @property
    def definition(self) -> str:
        """The condition as it is written."""
        body = inspect.getsource(self.condition).rpartition('"""\n')[2]
        return textwrap.dedent(body).rstrip()


ASKABLE = ("past", "training", "tensors", "plan")
"""What a condition may ask for beside statistics: a `Past`, a `Training`, a function that gives the
values of a statistic, one for each tensor, or, before the first step, a `preflight.Plan`."""
RULES: dict[str, Rule] = {}
"""The rules, by code, in the order in which they are shown."""
Condition = TypeVar("Condition", bound=Callable[..., Any])


def rule(
    *,
    severity: Severity,
    sentence: str,
    remedy: Callable[[Case], list[Cure]],
    source: str,
    scopes: Sequence[Scope] = (Scope.model,),
    persistence: int = 3,
    warmup: Warmup = Warmup.FIRST_MOMENT,
    explained_by: Sequence[str] = (),
    evidence: Sequence[str] = (),
) -> Callable[[Condition], Condition]:
    """Makes a function a rule: its name is the code, its docstring the meaning.

    What the function takes by position are statistics of the catalogue, or one of `ASKABLE`; it is
    not asked where one of the statistics is undefined. What it takes by keyword are thresholds,
    which `adam_monitor.findings.<code>.<threshold>` sets.

    Args:
        severity: `info` (recorded, not printed), `warning` or `error`.
        sentence: What is said of it, as in `"eps takes {eps_energy_loss:.0%} of the update"`.
        remedy: What to type, from the numbers.
        source: The paper it comes from, or `calibrated`.
        scopes: Where it is judged, the widest first (default: the model).
        persistence: Measurements in a row that raise it (default: 3).
        warmup: Steps before which it is not judged (default: 3/(1-β1)).
        explained_by: Codes of findings that are its cause (default: none).
        evidence: Statistics to tell beside those of the condition (default: none).

    Raises:
        ConfigError: If there is another rule of this name, or an argument is no statistic.

    Example:
        >>> @rule(
        ...     severity=Severity.warning,
        ...     sentence="The gradient's norm is {grad_norm:.3g}.",
        ...     remedy=lambda case: [Cure(("trainer.gradient_clip_val=1.0",))],
        ...     source="calibrated",
        ... )
        ... def large_gradient(grad_norm, *, threshold=10.0):
        ...     '''Gradients are larger than this model's ever were.'''
        ...     return grad_norm > threshold
        >>> RULES.pop("large_gradient").settings
        {'threshold': 10.0, 'persistence': 3, 'severity': 'warning'}
    """

    def enter(condition: Condition) -> Condition:
        code = condition.__name__
        others = RULES.get(code)
        if others is not None and others.condition.__module__ != condition.__module__:
            raise ConfigError(
                f"@rule {code}: {others.condition.__module__} defines a rule of this name",
                f"Rename the function, for example to my_{code}",
            )
        parameters = inspect.signature(condition).parameters.values()
        by_position = [each.name for each in parameters if each.kind is not each.KEYWORD_ONLY]
        asks_for = [name for name in by_position if name in ASKABLE]
        statistics = [name for name in by_position if name not in asks_for]
        for name in (*statistics, *evidence):
            if name not in STATISTICS:
                raise ConfigError(
                    f"@rule {code}: {name} is neither a statistic nor one of {', '.join(ASKABLE)}",
                    "Run lightning-adam explain statistics for the names",
                )
        RULES[code] = Rule(
            code=code,
            severity=severity,
            meaning=" ".join((condition.__doc__ or "").split()),
            sentence=sentence,
            source=source,
            scopes=tuple(scopes),
            persistence=persistence,
            warmup=warmup,
            explained_by=tuple(explained_by),
            evidence=tuple(evidence),
            remedy=remedy,
            condition=condition,
            statistics=tuple(statistics),
            asks_for=tuple(asks_for),
            thresholds={
                each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY
            },
        )
        return condition

    return enter
