"""`HistoryStore`: summaries of earlier measurements by scope."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_adam.findings.context import History, RunningSummary, Spikes
from lightning_adam.findings.rule import Rule
from lightning_adam.findings.scope_values import MODEL, REMEMBERED, ScopeValues
from lightning_adam.findings.spikes import SpikeWindow, TensorSpikes


class HistoryStore:
    """Summaries of statistics by scope, and the spike detectors.

    Args:
        rules: The rules that read the history.

    Example:
        >>> HistoryStore([]).of("model").last("lr")
        nan
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        readers = [rule for rule in rules if "history" in rule.takes]
        local = [rule for rule in readers if rule.is_local]
        self._of_model = {*REMEMBERED, *(name for rule in readers for name in rule.statistics)}
        self._of_others = {"grad_norm", *(name for rule in local for name in rule.statistics)}
        self._summaries: dict[str, dict[str, RunningSummary]] = {}
        self._losses, self._grad_norms = SpikeWindow(), SpikeWindow()
        self._tensor_norms, self._rms_ratios = TensorSpikes(), TensorSpikes()

    def of(self, scope: str) -> History:
        """Returns the history of a scope."""
        return History(self._summaries.get(scope, {}))

    def spikes(self, values: ScopeValues, loss: float) -> Spikes:
        """Adds a measurement, and returns its deviations from earlier ones.

        Args:
            values: The measurement.
            loss: The loss of its batch; NaN if unknown.
        """
        self._tensor_norms.add(values.of_tensors("grad_norm"))
        self._rms_ratios.add(values.of_tensors("rms_ratio"))
        return Spikes(
            loss=self._losses.add(loss),
            loss_streak=self._losses.streak,
            grad_norm=self._grad_norms.add(values.model.get("grad_norm", math.nan)),
            tensor_scores=self._tensor_norms.scores,
            tensor_times_largest=self._tensor_norms.times_largest,
            rms_ratio_times_largest=self._rms_ratios.times_largest,
        )

    def add(self, values: ScopeValues) -> None:
        """Adds the statistics of a measurement."""
        for scope, own in values.values.items():
            summaries = self._summaries.setdefault(scope, {})
            # The size of the first steps does not predict the size of later ones.
            is_early = own.get("step", math.inf) < 3 / (1 - own.get("beta1", 0.9))
            names = self._of_model if scope == MODEL else self._of_others
            for name, value in own.items():
                if name in names and not (is_early and name == "normalized_update_rms"):
                    before = summaries.get(name)
                    summaries[name] = before.updated(value) if before else RunningSummary.of(value)

    def state(self) -> dict[str, Any]:
        """Returns the state to store in a checkpoint."""
        return {
            "summaries": {
                scope: {name: list(summary) for name, summary in summaries.items()}
                for scope, summaries in self._summaries.items()
            },
            "spikes": [each.state() for each in self._detectors],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores the state from a checkpoint."""
        self._summaries = {
            scope: {name: RunningSummary(*values) for name, values in summaries.items()}
            for scope, summaries in state["summaries"].items()
        }
        for detector, saved in zip(self._detectors, state["spikes"], strict=True):
            detector.restore(saved)

    @property
    def _detectors(self) -> tuple[SpikeWindow | TensorSpikes, ...]:
        return self._losses, self._grad_norms, self._tensor_norms, self._rms_ratios
