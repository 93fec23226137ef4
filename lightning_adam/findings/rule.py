"""`rule`: declares what a finding judges, when, and what it suggests.

Imports neither torch nor lightning.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from lightning_adam.config.errors import ConfigError
from lightning_adam.config.monitor import Scope, Severity
from lightning_adam.findings.context import RuleContext
from lightning_adam.findings.finding import Suggestion
from lightning_adam.statistics.catalogue import STATISTICS


class Warmup(Enum):
    """Optimizer steps before which a rule is not judged."""

    NONE = "none"
    FIRST_MOMENT = "3/(1-β1) steps, at least 30"
    DIRECTION = "15/(1-β1) steps, at least 150"
    SECOND_MOMENT = "1/(1-β2) steps"

    def steps(self, beta1: float, beta2: float) -> float:
        """Returns their number.

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


@dataclass(frozen=True)
class Rule:
    """One fault: its condition, and what is reported."""

    code: str
    severity: Severity
    meaning: str
    """What is wrong and why it hurts."""
    sentence: str
    """What is reported, with statistics in braces, as `str.format` takes them."""
    when: str
    """The condition in words, with `thresholds` in braces."""
    limits: Mapping[str, str]
    """By statistic of the condition, the name of the threshold that is its limit."""
    source: str
    scopes: tuple[Scope, ...]
    """Where it is always judged, the widest first."""
    is_local: bool
    """Whether it is also judged for each group, layer and tensor that the monitor describes."""
    patience: int
    """Measurements in a row that raise a finding."""
    warmup: Warmup
    waits_for_peak: bool
    """Whether it is not judged while the learning rate warms up."""
    suppressed_by: tuple[str, ...]
    """Codes of root causes: while one holds in its scope or a wider one, it is not raised."""
    evidence: tuple[str, ...]
    """Statistics to report beside those of the condition."""
    suggest: Callable[[RuleContext], list[Suggestion]]
    condition: Callable[..., bool | Severity]
    statistics: tuple[str, ...]
    """The statistics that the condition takes, in the order of its arguments."""
    takes: tuple[str, ...]
    """What else it takes, of `FACTS`."""
    thresholds: Mapping[str, float]

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of `adam_monitor.findings.<code>`, at their defaults."""
        return {**self.thresholds, "patience": self.patience, "severity": self.severity.value}


FACTS = ("history", "gradient", "run", "model", "spikes", "tensors")
"""What a condition may take beside statistics: the `History` of the scope, its `GradientTrend`, the
`RunFacts`, the same statistics of the model, the `Spikes` of the measurement, and a function that
returns a statistic's values by tensor."""
RULES: dict[str, Rule] = {}
"""The rules, by code, in the order in which they are shown."""
Condition = TypeVar("Condition", bound=Callable[..., Any])


def summary_of(function: Callable[..., Any]) -> str:
    """Returns the docstring of a function in one line."""
    return " ".join((function.__doc__ or "").split())


def check_name(code: str, function: Callable[..., Any], others: Mapping[str, Any]) -> None:
    """Raises if another module has taken a name.

    Raises:
        ConfigError: If it has.
    """
    other = others.get(code)
    if other is not None and other.condition.__module__ != function.__module__:
        raise ConfigError(
            f"@rule {code}: {other.condition.__module__} defines a rule of this name",
            f"Rename the function, for example to my_{code}",
        )


def rule(
    *,
    severity: Severity,
    sentence: str,
    when: str,
    suggest: Callable[[RuleContext], list[Suggestion]],
    source: str,
    limits: Mapping[str, str] | None = None,
    scopes: Sequence[Scope] = (Scope.model,),
    is_local: bool = False,
    patience: int = 3,
    warmup: Warmup = Warmup.FIRST_MOMENT,
    waits_for_peak: bool = True,
    suppressed_by: Sequence[str] = (),
    evidence: Sequence[str] = (),
) -> Callable[[Condition], Condition]:
    """Makes a function a rule: its name is the code, its docstring the meaning.

    Its positional arguments are statistics of the catalogue, or one of `FACTS`; it is not called
    where one of the statistics is undefined. Its keyword arguments are thresholds, which
    `adam_monitor.findings.<code>.<threshold>` sets. It returns whether the fault is present, or
    `Severity.info` for what is stored and not printed.

    Args:
        severity: `info` (stored, not printed), `warning` or `error`; at most `warning` in a scope
            below the model.
        sentence: What is reported, as in `"eps removes {eps_energy_loss:.0%} of the update"`.
        when: The condition in words, with thresholds in braces, to follow "Raised when".
        suggest: Returns suggestions from the numbers.
        source: The paper it comes from, or `calibrated`.
        limits: By statistic of the condition, the name of the threshold that is its limit, in the
            same units. Charts draw it as a line (default: none).
        scopes: Where it is judged, the widest first (default: the model).
        is_local: Judge it in all scopes of the monitor too (default: False).
        patience: Measurements in a row that raise it (default: 3).
        warmup: Steps before which it is not judged (default: 3/(1-β1), at least 30).
        waits_for_peak: Do not judge it while the learning rate warms up (default: True).
        suppressed_by: Codes of findings that are its cause (default: none).
        evidence: Statistics to report beside those of the condition (default: none).

    Raises:
        ConfigError: If another module has a rule of this name, or an argument is not a statistic.

    Example:
        >>> @rule(
        ...     severity=Severity.warning,
        ...     sentence="The gradient norm is {grad_norm:.3g}.",
        ...     when="grad_norm is above {threshold:g}",
        ...     suggest=lambda context: [Suggestion(("trainer.gradient_clip_val=1.0",))],
        ...     source="calibrated",
        ... )
        ... def large_gradient(grad_norm, *, threshold=10.0):
        ...     '''Gradients are larger than this model's ever were.'''
        ...     return grad_norm > threshold
        >>> RULES.pop("large_gradient").settings
        {'threshold': 10.0, 'patience': 3, 'severity': 'warning'}
    """

    def register(condition: Condition) -> Condition:
        code = condition.__name__
        check_name(code, condition, RULES)
        parameters = inspect.signature(condition).parameters.values()
        positional = [each.name for each in parameters if each.kind is not each.KEYWORD_ONLY]
        statistics = [name for name in positional if name not in FACTS]
        for name in (*statistics, *evidence):
            if name not in STATISTICS:
                raise ConfigError(
                    f"@rule {code}: {name} is neither a statistic nor one of {', '.join(FACTS)}",
                    "Run lightning-adam explain statistics for the names",
                )
        RULES[code] = Rule(
            code=code,
            severity=severity,
            meaning=summary_of(condition),
            sentence=sentence,
            when=when,
            limits=limits or {},
            source=source,
            scopes=tuple(scopes),
            is_local=is_local,
            patience=patience,
            warmup=warmup,
            waits_for_peak=waits_for_peak,
            suppressed_by=tuple(suppressed_by),
            evidence=tuple(evidence),
            suggest=suggest,
            condition=condition,
            statistics=tuple(statistics),
            takes=tuple(name for name in positional if name in FACTS),
            thresholds={
                each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY
            },
        )
        return condition

    return register
