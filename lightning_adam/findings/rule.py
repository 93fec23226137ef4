"""`rule`: declares a rule that judges measurements.

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
    """Number of optimizer steps before a rule is judged."""

    NONE = "none"
    FIRST_MOMENT = "max(30, 3/(1-β1)) steps"
    DIRECTION = "max(150, 15/(1-β1)) steps"
    SECOND_MOMENT = "1/(1-β2) steps"

    def steps(self, beta1: float, beta2: float) -> float:
        """Returns the number of steps.

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
    """The condition of a fault, and the finding to report."""

    code: str
    severity: Severity
    meaning: str
    """What is wrong, and why it matters."""
    sentence: str
    """The message, a format string with names of statistics."""
    when: str
    """The condition in words, with `thresholds` in braces."""
    limits: Mapping[str, str]
    """By statistic of the condition: the name of its threshold."""
    source: str
    scopes: tuple[Scope, ...]
    """The scopes in which it is always judged, widest first."""
    is_local: bool
    """Whether it is also judged in the scopes that the monitor logs."""
    patience: int
    """Number of consecutive measurements after which a finding is raised."""
    warmup: Warmup
    waits_for_peak: bool
    """Whether it is judged only after the learning-rate warm-up."""
    suppressed_by: tuple[str, ...]
    """Codes of root causes: an open one in the same or a wider scope suppresses this finding."""
    evidence: tuple[str, ...]
    """Statistics to report in addition to those of the condition."""
    suggest: Callable[[RuleContext], list[Suggestion]]
    condition: Callable[..., bool | Severity]
    statistics: tuple[str, ...]
    """The statistics among the arguments of the condition, in order."""
    takes: tuple[str, ...]
    """The other arguments of the condition, of `FACTS`."""
    thresholds: Mapping[str, float]

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of `adam_monitor.findings.<code>` with their default values."""
        return {**self.thresholds, "patience": self.patience, "severity": self.severity.value}


FACTS = ("history", "gradient", "run", "model", "spikes", "tensors")
"""Arguments of a condition besides statistics: the `History` and the `GradientTrend` of the scope,
the `RunFacts`, the statistics of the model, the `Spikes` of the measurement, and `TensorValues`."""
RULES: dict[str, Rule] = {}
"""The rules by code, in display order."""
Condition = TypeVar("Condition", bound=Callable[..., Any])


def summary_of(function: Callable[..., Any]) -> str:
    """Returns the docstring of a function in one line."""
    return " ".join((function.__doc__ or "").split())


def check_name(code: str, function: Callable[..., Any], others: Mapping[str, Any]) -> None:
    """Raises if another module has defined a rule or notice of the same name.

    Raises:
        ConfigError: If the name is in use.
    """
    other = others.get(code)
    if other is not None and other.condition.__module__ != function.__module__:
        raise ConfigError(
            f"@rule {code}: {other.condition.__module__} already defines a rule of this name",
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
    """Registers a function as a rule: its name is the code, its docstring the meaning.

    The positional arguments are statistics of the catalogue or names of `FACTS`. The function is
    not called if a statistic is undefined. The keyword arguments are thresholds, which
    `adam_monitor.findings.<code>.<threshold>` sets. The function returns whether the fault is
    present, or `Severity.info` to store a finding without printing it.

    Args:
        severity: `info` (stored, not printed), `warning` or `error`; at most `warning` in a scope
            below the model.
        sentence: The message, such as `"eps removes {eps_energy_loss:.0%} of the update"`.
        when: The condition in words after "Raised when", with names of thresholds in braces.
        suggest: Returns suggestions.
        source: The paper that the rule is based on, or `calibrated`.
        limits: By statistic of the condition: the name of its threshold, in the same units. Charts
            draw it as a line (default: none).
        scopes: Scopes in which the rule is judged, widest first (default: the model).
        is_local: Also judge the rule in the scopes that the monitor logs (default: False).
        patience: Number of consecutive measurements after which it is raised (default: 3).
        warmup: Steps before the rule is judged (default: max(30, 3/(1-β1))).
        waits_for_peak: Judge the rule only after the learning-rate warm-up (default: True).
        suppressed_by: Codes of its root causes (default: none).
        evidence: Statistics to report in addition to those of the condition (default: none).

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
        ...     '''Gradients are larger than usual for this model.'''
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
