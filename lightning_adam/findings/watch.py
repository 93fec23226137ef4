"""Watch: which findings hold, from one measurement to the next."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lightning_adam.config.monitor import Scope, Severity
from lightning_adam.findings import RULES
from lightning_adam.findings.finding import Finding
from lightning_adam.findings.rule import Case, Memory, Past, Rule, Training
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.statistics.measurement import Measurement, largest_first

AFTERMATH = 50
"""Steps for which a finding that has ceased explains others: the moments remember it."""
MOST_KEPT = 200
"""The findings that have ceased of which is known: the last."""
CLOSING = 2
"""How many measurements more it takes to close a finding than to raise it."""
WORST = 3
"""The tensors that a finding names."""
ALWAYS = ("lr", "beta1", "beta2", "eps", "weight_decay", "step")
"""What is told of every scope that is judged: where groups differ in it, the largest value."""


class Place(NamedTuple):
    """Where a rule is judged."""

    code: str
    scope: str


@dataclass
class _Count:
    """How often in a row a condition has held, and has not."""

    held: int = 0
    ceased: int = 0


class Changes(NamedTuple):
    """What a measurement has changed."""

    raised: list[Finding]
    closed: list[Finding]


class Watch:
    """Judges one measurement after the other: raises findings that last, closes them when cured.

    Args:
        settings: Of some rules `severity`, `persistence` and thresholds, by code (default: none,
            all rules are as they are declared).
        optimizer: What tells the optimizer from others, for what is said (default: nothing).

    Example:
        >>> import torch
        >>> from lightning_adam import AdamStatistics
        >>> weight = torch.nn.Parameter(torch.ones(100))
        >>> adam = torch.optim.Adam([weight])
        >>> watch = Watch()
        >>> statistics = AdamStatistics(judged=watch.statistics)
        >>> for step in range(1, 51):
        ...     weight.grad = 1e-9 * torch.randn(100)
        ...     adam.step()
        ...     statistics.update(adam)
        ...     changes = watch.judge(statistics.measurement, step)
        >>> [finding.code for finding in watch.open]
        ['eps_dominates']
    """

    def __init__(
        self, settings: Mapping[str, Mapping[str, Any]] | None = None, optimizer: str = ""
    ) -> None:
        chosen = [_with(rule, (settings or {}).get(code, {})) for code, rule in RULES.items()]
        self.rules = {each.code: each for each in chosen if each.severity is not Severity.off}
        self._optimizer = optimizer
        self._counts: dict[Place, _Count] = {}
        self._foreseen: list[Finding] = []
        self._open: dict[Place, Finding] = {}
        self._closed: list[Finding] = []
        self._memories: dict[str, dict[str, Memory]] = {}

    @property
    def open(self) -> list[Finding]:
        """The findings that hold, in the order in which they were raised."""
        return [*self._foreseen, *self._open.values()]

    @property
    def all(self) -> list[Finding]:
        """Those that hold and those that have ceased, in the order in which they were raised."""
        return sorted([*self.open, *self._closed], key=lambda each: each.step)

    @property
    def statistics(self) -> list[str]:
        """What the rules need of a measurement."""
        wanted = {*ALWAYS}
        for rule in self.rules.values():
            wanted.update((*rule.statistics, *rule.evidence))
        return [name for name in STATISTICS if name in wanted]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "open": [each.as_row() for each in self._open.values()],
            "closed": [each.as_row() for each in self._closed],
            "counts": [[*place, each.held, each.ceased] for place, each in self._counts.items()],
            "memories": {
                scope: {name: list(memory) for name, memory in memories.items()}
                for scope, memories in self._memories.items()
            },
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what a checkpoint has kept."""
        found = [Finding.of_row(row) for row in state.get("open", [])]
        self._open = {
            Place(each.code, each.scope): each for each in found if each.code in self.rules
        }
        self._closed = [Finding.of_row(row) for row in state.get("closed", [])]
        self._counts = {
            Place(code, scope): _Count(held, ceased)
            for code, scope, held, ceased in state.get("counts", [])
        }
        self._memories = {
            scope: {name: Memory(*values) for name, values in memories.items()}
            for scope, memories in state.get("memories", {}).items()
        }

    def judge(
        self,
        measurement: Measurement,
        step: int,
        training: Training | None = None,
        low_denominator: Callable[[str], float | None] = lambda scope: None,
    ) -> Changes:
        """Judges a measurement.

        Args:
            measurement: One that has the statistics of `self.statistics`.
            step: The optimizer step that it is of.
            training: What else is known (default: nothing).
            low_denominator: What 1 % of the √v̂ of a scope are below; asked when a remedy needs it
                (default: it is not known).

        Returns:
            The findings that are new, and those that have ceased.
        """
        training = training or Training()
        judged = _Judged(measurement, self.rules.values())
        holding = self._holding(judged, training, self.rules.values())
        raised, closed = [], []
        for place, holds in self._effective(holding, step):
            count = self._counts.setdefault(place, _Count())
            count.held = count.held + 1 if holds else 0
            count.ceased = 0 if holds else count.ceased + 1
            rule = self.rules[place.code]
            if place in self._open and count.ceased >= rule.persistence + CLOSING:
                finding = replace(self._open.pop(place), closed=step)
                self._closed = [*self._closed, finding][-MOST_KEPT:]
                closed.append(finding)
            elif place not in self._open and count.held >= rule.persistence:
                case = Case(
                    judged.proof(rule, place.scope),
                    training,
                    lambda scope=place.scope: low_denominator(scope),  # type: ignore[misc]
                )
                finding = self._finding(rule, place.scope, step, case, judged)
                self._open[place] = finding
                raised.append(finding)
        self._remember(judged)
        return Changes(raised, closed)

    def resume(self, measurement: Measurement, step: int, training: Training) -> list[Finding]:
        """Judges the first step after a checkpoint was loaded by what such a step alone shows.

        It is measured whether or not it is due: nothing else is learned from it, so that a training
        that was cut goes on as if it had not been.
        """
        rules = [
            self.rules[code] for code in ("state_mismatch", "not_finite") if code in self.rules
        ]
        judged = _Judged(measurement, rules)
        holding = self._holding(judged, replace(training, is_resumed=True), rules)
        raised = []
        for place, holds in self._effective(holding, step):
            if holds and place not in self._open:
                rule = self.rules[place.code]
                case = Case(judged.proof(rule, place.scope), training)
                self._open[place] = self._finding(rule, place.scope, step, case, judged)
                raised.append(self._open[place])
        return raised

    def foresee(self, findings: Iterable[Finding]) -> list[Finding]:
        """Records what was found before the first step, and returns it.

        It holds as long as the training does.
        """
        self._foreseen = [replace(each, optimizer=self._optimizer) for each in findings]
        return self._foreseen

    def _holding(
        self, judged: "_Judged", training: Training, rules: Iterable[Rule]
    ) -> dict[Place, bool]:
        """Where the conditions that can be judged hold, before anything explains them away."""
        holding = {}
        for rule in rules:
            for scope in judged.scopes_of(rule):
                values = judged.values[scope]
                if all(name in values for name in rule.statistics) and _is_warm(rule, values):
                    asked = {
                        "training": training,
                        "past": Past(self._memories.get(scope, {})),
                        "tensors": judged.of_tensors,
                    }
                    holding[Place(rule.code, scope)] = _holds(rule, values, asked)
        return holding

    def _effective(self, holding: Mapping[Place, bool], step: int) -> Iterator[tuple[Place, bool]]:
        """The same, without what another finding or a wider scope tells already."""
        causes = {place.code for place, holds in holding.items() if holds}
        causes |= {each.code for each in self.open if each.severity is not Severity.info}
        causes |= {each.code for each in self._closed if step - (each.closed or 0) < AFTERMATH}
        for place, holds in holding.items():
            is_explained = any(code in causes for code in self.rules[place.code].explained_by)
            is_wide = place.scope == Scope.model.value
            whole = Place(place.code, Scope.model.value)
            if not is_wide and (holding.get(whole) or whole in self._open):
                # The finding of the model has taken the place of its layers'.
                self._open.pop(place, None)
                self._counts.pop(place, None)
            else:
                yield place, holds and not is_explained

    def _finding(self, rule: Rule, scope: str, step: int, case: Case, judged: "_Judged") -> Finding:
        values = case.values
        past = Past(self._memories.get(scope, {}))
        told = {f"{name}_before": past.last(name) for name in rule.statistics}
        told["steps_left"] = case.training.total_steps - values.get("step", math.nan)
        told |= dict.fromkeys(rule.evidence, math.nan) | dict(values)
        shown = (*rule.statistics, *rule.evidence)
        return Finding(
            code=rule.code,
            severity=rule.severity,
            scope=scope,
            step=step,
            sentence=rule.sentence.format_map(told),
            evidence={name: values[name] for name in shown if name in values},
            worst=judged.worst(rule, scope),
            cures=tuple(rule.remedy(case)),
            source=rule.source,
            optimizer=self._optimizer,
        )

    def _remember(self, judged: "_Judged") -> None:
        remembering = [each for each in self.rules.values() if "past" in each.asks_for]
        for rule in remembering:
            for scope in judged.scopes_of(rule):
                values = judged.values[scope]
                # The size of the first steps says nothing of those that follow.
                beta1 = values.get("beta1", 0.9)
                is_early = values.get("step", math.inf) < 3 / (1 - beta1)
                memories = self._memories.setdefault(scope, {})
                for name in rule.statistics:
                    if name in values and not (name == "normalized_update_rms" and is_early):
                        value = values[name]
                        known = memories.get(name, Memory(value, value, value))
                        memories[name] = known.with_next(value)


class _Judged:
    """A measurement, as far as some rules need it."""

    def __init__(self, measurement: Measurement, rules: Iterable[Rule]) -> None:
        self._measurement = measurement
        wanted: dict[Scope, set[str]] = {}
        for rule in rules:
            for scope in rule.scopes if rule.statistics else ():
                wanted.setdefault(scope, set()).update(rule.statistics)
        self._scopes = {
            scope: measurement.of(scope, [STATISTICS[name] for name in STATISTICS if name in names])
            for scope, names in wanted.items()
        }
        self.values: dict[str, dict[str, float]] = {}
        for scope, rows in self._scopes.items():
            settings = measurement.largest(scope, ALWAYS)
            for name, values in rows.items():
                self.values[_scope_name(scope, name)] = settings[name] | values

    def scopes_of(self, rule: Rule) -> list[str]:
        """Where the measurement lets a rule be judged."""
        return [
            _scope_name(scope, name)
            for scope in (rule.scopes if rule.statistics else ())
            for name in self._scopes.get(scope, {})
        ]

    def proof(self, rule: Rule, scope: str) -> dict[str, float]:
        """All that tells of a rule in a scope."""
        kind, _, name = scope.partition("/")
        evidence = [STATISTICS[each] for each in rule.evidence]
        more = self._measurement.of(Scope(kind), evidence).get(name or kind, {})
        return self.values[scope] | more

    def of_tensors(self, statistic: str) -> list[float]:
        """The values of a statistic, one for each tensor that has one."""
        return [*self._measurement.of_tensors(STATISTICS[statistic]).values()]

    def worst(self, rule: Rule, scope: str) -> dict[str, float]:
        """The tensors of the scope that are the worst by the rule's first statistic."""
        (name, *_) = rule.statistics
        inside = self._measurement.tensors_of(scope)
        of_tensors = self._measurement.of_tensors(STATISTICS[name])
        values = {each: value for each, value in of_tensors.items() if each in inside}
        worst = largest_first(values)[:WORST]
        if name == "nonfinite_count":
            # The first is where it comes from, or nearest to it.
            worst = [each for each in values if values[each]][:WORST]
        return {each: values[each] for each in worst}


def _scope_name(scope: Scope, name: str) -> str:
    return scope.value if scope is Scope.model else f"{scope.value}/{name}"


def _is_warm(rule: Rule, values: Mapping[str, float]) -> bool:
    beta1, beta2 = values.get("beta1", 0.9), values.get("beta2", 0.999)
    return values.get("step", math.inf) > rule.warmup.steps(beta1, beta2)


def _holds(rule: Rule, values: Mapping[str, float], asked: Mapping[str, Any]) -> bool:
    given = {name: values[name] for name in rule.statistics}
    given |= {name: asked[name] for name in rule.asks_for}
    try:
        return bool(rule.condition(**given, **rule.thresholds))
    except ZeroDivisionError:
        return False


def _with(rule: Rule, settings: Mapping[str, Any]) -> Rule:
    thresholds = {name: settings.get(name, value) for name, value in rule.thresholds.items()}
    return replace(
        rule,
        severity=Severity(settings.get("severity", rule.severity)),
        persistence=settings.get("persistence", rule.persistence),
        thresholds=thresholds,
    )
