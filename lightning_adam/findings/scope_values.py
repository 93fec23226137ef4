"""`ScopeValues`: the statistics of one measurement by scope."""

from collections.abc import Collection, Mapping, Sequence

from lightning_adam.config.monitor import Scope
from lightning_adam.findings.rule import Rule
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.statistics.measurement import Measurement, largest_first

SETTINGS = ("lr", "beta1", "beta2", "eps", "weight_decay", "step")
"""Settings given to every rule: the largest value if the groups of a scope differ."""
REMEMBERED = ("lr", "step", "grad_norm")
"""Statistics in the history of every scope."""
MODEL = Scope.model.value
WORST = 3
"""Number of tensors that a finding names."""


class ScopeValues:
    """The statistics of one measurement that some rules need.

    Args:
        measurement: The measurement.
        rules: The rules.
        scopes: Additional kinds of scope in which local rules are judged (default: none).
    """

    def __init__(
        self, measurement: Measurement, rules: Collection[Rule], scopes: Sequence[Scope] = ()
    ) -> None:
        self._measurement = measurement
        self._tensors: dict[str, dict[str, float]] = {}
        self._kinds = {rule.code: kinds_of(rule, scopes) for rule in rules}
        wanted: dict[Scope, set[str]] = {}
        for rule in rules:
            for kind in self._kinds[rule.code]:
                wanted.setdefault(kind, {*REMEMBERED}).update(rule.statistics)
        self._members: dict[Scope, list[str]] = {}
        self._wider: dict[str, list[str]] = {}
        self.values: dict[str, dict[str, float]] = {}
        """Statistics by the name of the scope, such as `layer/net.0`."""
        for kind in (each for each in Scope if each in wanted):
            names = wanted[kind]
            chosen = [STATISTICS[name] for name in STATISTICS if name in names]
            rows = measurement.of(kind, chosen)
            settings = measurement.largest(kind, SETTINGS)
            self._members[kind] = [_scope_name(kind, name) for name in rows]
            for name, values in rows.items():
                self.values[_scope_name(kind, name)] = settings[name] | values

    def scopes_of(self, rule: Rule) -> list[str]:
        """Returns the scopes in which a rule can be judged, widest first."""
        needed = {*rule.statistics}
        return [
            scope
            for kind in self._kinds[rule.code]
            for scope in self._members.get(kind, [])
            if self.values[scope].keys() >= needed
        ]

    @property
    def model(self) -> Mapping[str, float]:
        """The statistics of the model."""
        return self.values.get(MODEL, {})

    def with_evidence(self, rule: Rule, scope: str) -> dict[str, float]:
        """Returns the values of a scope, including the evidence of a rule."""
        kind, _, name = scope.partition("/")
        evidence = [STATISTICS[each] for each in rule.evidence]
        more = self._measurement.of(Scope(kind), evidence).get(name or kind, {})
        return self.values[scope] | more

    def of_tensors(self, statistic: str) -> dict[str, float]:
        """Returns the values of a statistic by tensor. Undefined ones are absent."""
        if statistic not in self._tensors:
            self._tensors[statistic] = self._measurement.of_tensors(STATISTICS[statistic])
        return self._tensors[statistic]

    def worst(self, rule: Rule, scope: str) -> dict[str, float]:
        """Returns the tensors of a scope with the largest values of a rule's first statistic."""
        name = rule.statistics[0].removesuffix("_max")
        if STATISTICS[name].family == "schedule":
            return {}
        inside = self._measurement.tensors_of(scope)
        values = {each: value for each, value in self.of_tensors(name).items() if each in inside}
        worst = largest_first(values)[:WORST]
        if name == "nonfinite_count":
            # The first tensor is the likely origin.
            worst = [each for each in values if values[each]][:WORST]
        return {each: values[each] for each in worst}

    def wider_than(self, scope: str) -> list[str]:
        """Returns the scopes that contain a scope, widest first, ending with itself."""
        if scope not in self._wider:
            self._wider[scope] = [MODEL, *self._containing(scope), scope][scope == MODEL :]
        return self._wider[scope]

    def _containing(self, scope: str) -> list[str]:
        kinds = list(self._members)
        others = [
            each
            for kind in kinds[1 : kinds.index(Scope(scope.partition("/")[0]))]
            for each in self._members[kind]
        ]
        inside = self._measurement.tensors_of(scope) if others else set()
        return [each for each in others if inside <= self._measurement.tensors_of(each)]

    def groups_in(self, scope: str) -> list[str]:
        """Returns the names of the parameter groups with tensors in a scope."""
        inside = self._measurement.tensors_of(scope)
        names = self._measurement.scopes.names
        return list(dict.fromkeys(each.group for each in names if each.tensor in inside))


def kinds_of(rule: Rule, scopes: Sequence[Scope]) -> tuple[Scope, ...]:
    """Returns the kinds of scope in which a rule is judged, widest first."""
    more = scopes if rule.is_local else ()
    return tuple(kind for kind in Scope if kind in rule.scopes or kind in more)


def _scope_name(kind: Scope, name: str) -> str:
    return kind.value if kind is Scope.model else f"{kind.value}/{name}"
