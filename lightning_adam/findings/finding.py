"""Finding: what is wrong in one scope.

Imports neither torch nor lightning.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_adam.config.monitor import Severity
from lightning_adam.findings.rule import Cure


@dataclass(frozen=True)
class Finding:
    """What is wrong in one scope, with what proves it and what to type."""

    code: str
    severity: Severity
    scope: str
    """`model`, `group/<name>` or `layer/<path>`."""
    step: int
    """The optimizer step at which it was raised."""
    sentence: str
    evidence: Mapping[str, float]
    worst: Mapping[str, float]
    """The tensors with the largest values of the statistic that the rule is about."""
    cures: tuple[Cure, ...]
    source: str
    optimizer: str = ""
    """Its name, if there are several."""
    closed: int | None = None
    """The step at which it had ceased; None while it holds."""

    @property
    def remedy(self) -> tuple[str, ...]:
        """The overrides of the first cure that can be typed."""
        return next((each.overrides for each in self.cures if each.overrides), ())

    def as_row(self) -> dict[str, Any]:
        """The finding in plain values, as tables and files keep it."""
        return {
            "code": self.code,
            "severity": self.severity.value,
            "scope": self.scope,
            "optimizer": self.optimizer,
            "step": self.step,
            "closed": self.closed,
            "sentence": self.sentence,
            "evidence": dict(self.evidence),
            "worst": dict(self.worst),
            "cures": [[list(each.overrides), each.hint] for each in self.cures],
            "source": self.source,
        }

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Finding":
        """What `as_row` has made a row of."""
        cures = tuple(Cure(tuple(overrides), hint) for overrides, hint in row["cures"])
        return cls(**{**row, "severity": Severity(row["severity"]), "cures": cures})
