"""`RuleEngine`: judges measurements by the rules, and keeps the findings."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lightning_adam.config.monitor import Scope, Severity
from lightning_adam.findings.context import RuleContext, RunFacts, Spikes
from lightning_adam.findings.finding import Finding
from lightning_adam.findings.finding_log import FindingKey, FindingLog
from lightning_adam.findings.history_store import HistoryStore
from lightning_adam.findings.rule import RULES, Rule
from lightning_adam.findings.scope_values import MODEL, REMEMBERED, SETTINGS, ScopeValues
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.statistics.measurement import Measurement

EXTRA_PATIENCE = 2
"""A finding is resolved after `patience` plus this number of measurements without its condition."""


@dataclass
class _Streaks:
    """Numbers of consecutive measurements in which a condition holds, and does not hold."""

    active: int = 0
    active_above_info: int = 0
    inactive: int = 0
    """Without the condition at a severity that keeps an open finding open."""

    def count(self, severity: Severity, found: Finding | None) -> None:
        """Counts a measurement.

        Args:
            severity: The severity of the condition; `off` if it does not hold.
            found: The open finding; None if there is none.
        """
        is_above_info = _is_above_info(severity)
        holds = severity is not Severity.off
        self.active = self.active + 1 if holds else 0
        self.active_above_info = self.active_above_info + 1 if is_above_info else 0
        is_kept = is_above_info if found is not None and found.is_above_info else holds
        self.inactive = 0 if is_kept else self.inactive + 1


class Changes(NamedTuple):
    """The findings that a measurement raises or closes."""

    raised: list[Finding]
    closed: list[Finding]


class RuleEngine:
    """Judges measurements: raises findings, and closes them when they are resolved.

    Args:
        settings: `severity`, `patience` and thresholds of rules, by code (default: none).
        optimizer: The optimizer's name, if there are several (default: empty).
        scopes: Additional kinds of scope in which local rules are judged (default: none).

    Example:
        >>> import torch
        >>> from lightning_adam import AdamStatistics
        >>> weight = torch.nn.Parameter(torch.ones(100))
        >>> adam = torch.optim.Adam([weight])
        >>> engine = RuleEngine()
        >>> statistics = AdamStatistics(rule_statistics=engine.statistics)
        >>> for step in range(1, 51):
        ...     weight.grad = 1e-9 * torch.randn(100)
        ...     adam.step()
        ...     statistics.update(adam)
        ...     changes = engine.judge(statistics.measurement, step)
        >>> [finding.code for finding in engine.open]
        ['eps_dominates']
    """

    def __init__(
        self,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        optimizer: str = "",
        scopes: Sequence[Scope] = (),
    ) -> None:
        chosen = [
            _apply_settings(rule, (settings or {}).get(code, {})) for code, rule in RULES.items()
        ]
        self.rules = {each.code: each for each in chosen if each.severity is not Severity.off}
        self._optimizer = optimizer
        self._scopes = tuple(scopes)
        self._streaks: dict[FindingKey, _Streaks] = {}
        self._log = FindingLog()
        self._history = HistoryStore(self.rules.values())
        self._defined: set[str] = set()
        """Codes of the rules with defined statistics."""
        self._judged: Counter[str] = Counter()
        """By code: the number of measurements by which a rule was judged."""

    @property
    def open(self) -> list[Finding]:
        """The open findings, in the order in which they were raised."""
        return [*self._log.open.values()]

    @property
    def findings(self) -> list[Finding]:
        """Open and closed findings, in the order in which they were raised."""
        return self._log.findings

    @property
    def statistics(self) -> list[str]:
        """The statistics that the rules need."""
        wanted = {*SETTINGS, *REMEMBERED, "rms_ratio"}
        for rule in self.rules.values():
            wanted.update((*rule.statistics, *rule.evidence))
        return [name for name in STATISTICS if name in wanted]

    def unjudged(self) -> list[Rule]:
        """Returns the rules above info for which there were too few measurements."""
        return [
            rule
            for code, rule in self.rules.items()
            if code in self._defined
            and rule.severity is not Severity.info
            and self._judged[code] < rule.patience
        ]

    def judge(
        self,
        measurement: Measurement,
        step: int,
        run: RunFacts | None = None,
        loss: float = math.nan,
        low_denominator: Callable[[str], float | None] = lambda scope: None,
    ) -> Changes:
        """Judges a measurement.

        Args:
            measurement: A measurement with the statistics of `self.statistics`.
            step: Its optimizer step.
            run: Facts of the run (default: unknown).
            loss: The loss of its batch (default: unknown).
            low_denominator: Returns the 1st percentile of √v̂ in a scope; called when a suggestion
                needs it (default: unknown).

        Returns:
            The findings that are new or more severe, and those that are resolved or superseded.
        """
        run = run or RunFacts()
        values = ScopeValues(measurement, self.rules.values(), self._scopes)
        spikes = self._history.spikes(values, loss)
        verdicts = self._verdicts(values, run, spikes, self.rules.values())
        self._judged.update({key.code for key in verdicts})
        raised, closed = [], []
        for key, severity in self._unsuppressed(verdicts, values, step):
            if severity is Severity.off and key not in self._streaks:
                continue
            found, patience = self._log.open.get(key), self.rules[key.code].patience
            others = self._log.open_above_info() if _is_above_info(severity) else self._log.open
            if found is None and self._wider_finding(key, others, values) is not None:
                self._streaks.pop(key, None)
                continue
            streaks = self._streaks.setdefault(key, _Streaks())
            streaks.count(severity, found)
            if found is not None and streaks.inactive >= patience + EXTRA_PATIENCE:
                closed.append(self._log.close(key, step))
            elif streaks.active_above_info >= patience and not (found and found.is_above_info):
                raised.append(self._raise(key, severity, step, values, run, low_denominator))
            elif streaks.active >= patience and found is None:
                raised.append(self._raise(key, Severity.info, step, values, run, low_denominator))
            if not streaks.active and key not in self._log.open:
                del self._streaks[key]
        closed += self._supersede(values, step)
        self._history.add(values)
        return Changes(raised, closed)

    def judge_resumed(self, measurement: Measurement, step: int, run: RunFacts) -> list[Finding]:
        """Checks the first step after a checkpoint was loaded for lost optimizer state.

        This step is measured even if it is not due. It does not enter the history, so that a
        resumed run has the same findings as an uninterrupted one.
        """
        rules = [
            self.rules[code] for code in ("state_mismatch", "not_finite") if code in self.rules
        ]
        values = ScopeValues(measurement, rules)
        verdicts = self._verdicts(values, replace(run, is_resumed=True), Spikes(), rules)
        return [
            self._raise(key, severity, step, values, run, lambda scope: None)
            for key, severity in self._unsuppressed(verdicts, values, step)
            if severity is not Severity.off and key not in self._log.open
        ]

    def state(self) -> dict[str, Any]:
        """Returns the state to store in a checkpoint."""
        streaks = [
            [*key, each.active, each.active_above_info, each.inactive]
            for key, each in self._streaks.items()
        ]
        judged = {code: self._judged[code] for code in self.rules if code in self._defined}
        return {**self._log.state(), **self._history.state(), "streaks": streaks, "judged": judged}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores the state from a checkpoint, without findings of rules that are off."""
        if not state:
            return
        is_on = [row for row in state["open"] if row["code"] in self.rules]
        self._log.restore({**state, "open": is_on})
        self._history.restore(state)
        self._defined, self._judged = {*state["judged"]}, Counter(state["judged"])
        self._streaks = {
            FindingKey(code, scope): _Streaks(*numbers)
            for code, scope, *numbers in state["streaks"]
        }

    def _verdicts(
        self, values: ScopeValues, run: RunFacts, spikes: Spikes, rules: Iterable[Rule]
    ) -> dict[FindingKey, Severity]:
        """Returns the severity of each condition that can be judged; `off` if it does not hold."""
        is_rising = self._is_warming_up(values.model, run)
        facts: dict[str, dict[str, Any]] = {}
        verdicts = {}
        for rule in rules:
            scopes = values.scopes_of(rule)
            if scopes:
                self._defined.add(rule.code)
            for scope in scopes if not (rule.waits_for_peak and is_rising) else ():
                own = values.values[scope]
                if not _is_warm(rule, own):
                    continue
                if scope not in facts:
                    history = self._history.of(scope)
                    facts[scope] = {
                        **own,
                        "history": history,
                        "gradient": history.gradient,
                        "run": run,
                        "model": values.model,
                        "spikes": spikes,
                        "tensors": values.of_tensors,
                    }
                verdicts[FindingKey(rule.code, scope)] = _verdict(rule, scope, facts[scope])
        return verdicts

    def _is_warming_up(self, model: Mapping[str, float], run: RunFacts) -> bool:
        """Whether the learning rate is still warming up."""
        last = self._history.of(MODEL).last("lr")
        return model.get("step", math.inf) <= run.warmup_steps or model.get("lr", math.nan) > last

    def _unsuppressed(
        self, verdicts: Mapping[FindingKey, Severity], values: ScopeValues, step: int
    ) -> Iterator[tuple[FindingKey, Severity]]:
        """Yields the verdicts without those that an open root cause suppresses."""
        causes = {key for key, severity in verdicts.items() if _is_above_info(severity)}
        causes |= self._log.causes(step)
        for key, severity in verdicts.items():
            if severity is not Severity.off and self._root_cause(key, causes, values) is not None:
                self._streaks.pop(key, None)
            else:
                yield key, severity

    def _root_cause(
        self, key: FindingKey, causes: Iterable[FindingKey], values: ScopeValues
    ) -> FindingKey | None:
        """Returns the first root cause of a finding in the same or a wider scope, if any."""
        codes = self.rules[key.code].suppressed_by
        own = [each for each in causes if each.code in codes]
        wider = values.wider_than(key.scope) if own else []
        return next((each for each in own if each.scope in wider), None)

    def _raise(
        self,
        key: FindingKey,
        severity: Severity,
        step: int,
        values: ScopeValues,
        run: RunFacts,
        low_denominator: Callable[[str], float | None],
    ) -> Finding:
        rule, history = self.rules[key.code], self._history.of(key.scope)
        measured = values.with_evidence(rule, key.scope)

        def lowest() -> float | None:
            """Returns the minimum over all scopes in which the finding is open."""
            scopes = {key.scope, *(each.scope for each in self._log.open if each.code == key.code)}
            found = [low_denominator(scope) for scope in scopes]
            return min((each for each in found if each is not None), default=None)

        context = RuleContext(
            measured, run, history, values.groups_in(key.scope), low_denominator=lowest
        )
        fields = {f"{name}_before": history.last(name) for name in rule.statistics}
        fields["steps_left"] = run.total_steps - measured.get("step", math.nan)
        fields |= {**dict.fromkeys(rule.evidence, math.nan), **measured, **rule.thresholds}
        names = (*rule.statistics, *rule.evidence)
        self._log.open[key] = Finding(
            code=rule.code,
            severity=severity,
            scope=key.scope,
            step=step,
            sentence=rule.sentence.format_map(fields),
            evidence={name: measured[name] for name in names if name in measured},
            worst=values.worst(rule, key.scope),
            suggestions=tuple(rule.suggest(context)),
            source=rule.source,
            optimizer=self._optimizer,
        )
        return self._log.open[key]

    def _supersede(self, values: ScopeValues, step: int) -> list[Finding]:
        """Closes findings that have an open root cause, or are also open in a wider scope."""
        above_info = self._log.open_above_info()
        closed = []
        for key, finding in list(self._log.open.items()):
            others = above_info if finding.is_above_info else self._log.open
            cause = self._wider_finding(key, others, values) or self._root_cause(
                key, above_info, values
            )
            if cause is not None:
                closed.append(self._log.close(key, step, f"{cause.code} in {cause.scope}"))
                self._streaks.pop(key, None)
        return closed

    def _wider_finding(
        self, key: FindingKey, others: Collection[FindingKey], values: ScopeValues
    ) -> FindingKey | None:
        """Returns the open finding of the same rule in the widest enclosing scope, if any."""
        if key.scope == MODEL or not any(each.code == key.code for each in others):
            return None
        wider = (FindingKey(key.code, scope) for scope in values.wider_than(key.scope)[:-1])
        return next((each for each in wider if each in others), None)


def _is_above_info(severity: Severity) -> bool:
    return severity is Severity.error or severity is Severity.warning


def _is_warm(rule: Rule, values: Mapping[str, float]) -> bool:
    beta1, beta2 = values.get("beta1", 0.9), values.get("beta2", 0.999)
    return values.get("step", math.inf) > rule.warmup.steps(beta1, beta2)


def _verdict(rule: Rule, scope: str, facts: Mapping[str, Any]) -> Severity:
    """Returns the severity of a condition in a scope; `off` if it does not hold."""
    arguments = {name: facts[name] for name in (*rule.statistics, *rule.takes)}
    try:
        holds = rule.condition(**arguments, **rule.thresholds)
    except ZeroDivisionError:
        return Severity.off
    if not isinstance(holds, Severity):
        holds = rule.severity if holds else Severity.off
    # Below the model, a finding is at most a warning.
    return Severity.warning if holds is Severity.error and scope != MODEL else holds


def _apply_settings(rule: Rule, settings: Mapping[str, Any]) -> Rule:
    thresholds = {name: settings.get(name, value) for name, value in rule.thresholds.items()}
    return replace(
        rule,
        severity=Severity(settings.get("severity", rule.severity)),
        patience=settings.get("patience", rule.patience),
        thresholds=thresholds,
    )
