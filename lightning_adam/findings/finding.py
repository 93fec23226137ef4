"""`Finding`: a fault in one scope, its evidence, and suggestions.

Imports neither torch nor lightning.
"""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_adam.config.monitor import Severity


@dataclass(frozen=True)
class Suggestion:
    """One way to fix a fault.

    Example:
        >>> str(Suggestion(("optimizer.eps=1e-13",)))
        'optimizer.eps=1e-13'
        >>> str(Suggestion(("optimizer.lr=1e-5,1e-4",), is_lead=True, is_sweep=True))
        '--multirun optimizer.lr=1e-5,1e-4'
    """

    overrides: tuple[str, ...] = ()
    """Overrides to append to the command, each `key=value` without shell quotes."""
    hint: str = ""
    """What to do instead of the overrides, or a comment on them."""
    is_lead: bool = False
    """Whether it may or may not help: compare validation metrics before you keep it."""
    is_sweep: bool = False
    """Whether the overrides list values to compare with Hydra's `--multirun`."""

    @property
    def command(self) -> str:
        """The overrides in shell syntax; empty if there are none."""
        words = ["--multirun"] if self.is_sweep else []
        # Hydra needs the commas of a sweep outside quotes.
        words += self.overrides if self.is_sweep else map(shlex.quote, self.overrides)
        return " ".join(words)

    def __str__(self) -> str:
        if self.command and self.hint:
            return f"{self.command}  ({self.hint})"
        return self.command or self.hint


@dataclass(frozen=True)
class Finding:
    """A fault in one scope with its evidence and suggestions, or a preflight notice."""

    code: str
    severity: Severity
    scope: str
    """`model`, `group/<name>`, `layer/<path>` or `tensor/<name>`."""
    step: int
    """The optimizer step at which it was raised; 0 for a preflight notice."""
    sentence: str
    evidence: Mapping[str, float]
    worst: Mapping[str, float]
    """The tensors with the largest values of the rule's first statistic."""
    suggestions: tuple[Suggestion, ...]
    """Best first."""
    source: str
    optimizer: str = ""
    """The optimizer's name, if there are several."""
    closed: int | None = None
    """The step at which it was resolved or superseded; None while open."""
    superseded_by: str | None = None
    """The finding that replaced it, such as `eps_dominates in model`: the same finding in a wider
    scope, or its root cause; None if it was not replaced."""

    @property
    def is_notice(self) -> bool:
        """Whether it is a preflight notice, known before the first step."""
        return self.step == 0

    @property
    def is_open(self) -> bool:
        """Whether its condition still holds."""
        return self.closed is None

    @property
    def is_above_info(self) -> bool:
        """Whether its severity is warning or error."""
        return self.severity is not Severity.info

    @property
    def rank(self) -> int:
        """The severity as a number, larger for more severe findings."""
        return [*Severity].index(self.severity)

    @property
    def remedy(self) -> tuple[str, ...]:
        """The overrides of the first suggestion that is not a lead; empty if there is none."""
        firm = (each for each in self.suggestions if each.overrides and not each.is_lead)
        return next((each.overrides for each in firm), ())

    def as_row(self) -> dict[str, Any]:
        """Returns the finding as plain values, for tables and files."""
        return {
            "code": self.code,
            "severity": self.severity.value,
            "scope": self.scope,
            "optimizer": self.optimizer,
            "step": self.step,
            "closed": self.closed,
            "superseded_by": self.superseded_by,
            "sentence": self.sentence,
            "evidence": dict(self.evidence),
            "worst": dict(self.worst),
            "suggestions": [asdict(each) for each in self.suggestions],
            "source": self.source,
        }

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Finding":
        """Creates a finding from a row of `as_row`."""
        suggestions = tuple(
            Suggestion(**{**each, "overrides": tuple(each["overrides"])})
            for each in row["suggestions"]
        )
        severity = Severity(row["severity"])
        return cls(**{**row, "severity": severity, "suggestions": suggestions})
