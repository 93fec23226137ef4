"""`FindingLog`: the open and closed findings of an optimizer."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from lightning_adam.findings.finding import Finding

COOLDOWN_STEPS = 50
"""Steps for which a closed finding still suppresses others, because the moments still contain its
gradients."""
MAX_CLOSED = 100
"""Number of closed findings to keep, counted separately for info and for warnings and errors."""


class FindingKey(NamedTuple):
    """A rule and the scope in which it is judged."""

    code: str
    scope: str


class FindingLog:
    """Open and closed findings.

    Example:
        >>> log = FindingLog()
        >>> log.open, log.findings
        ({}, [])
    """

    def __init__(self) -> None:
        self.open: dict[FindingKey, Finding] = {}
        """Open findings, in the order in which they were raised."""
        self._closed: list[Finding] = []

    @property
    def findings(self) -> list[Finding]:
        """Open and closed findings, in the order in which they were raised."""
        return sorted([*self._closed, *self.open.values()], key=lambda each: each.step)

    def open_above_info(self) -> list[FindingKey]:
        """Returns the keys of the open warnings and errors."""
        return [key for key, each in self.open.items() if each.is_above_info]

    def causes(self, step: int) -> set[FindingKey]:
        """Returns the keys of the findings that may suppress others at a step."""
        recent = {
            FindingKey(each.code, each.scope)
            for each in self._closed
            if each.is_above_info and step - (each.closed or 0) < COOLDOWN_STEPS
        }
        return recent.union(self.open_above_info())

    def close(self, key: FindingKey, step: int, superseded_by: str | None = None) -> Finding:
        """Closes a finding, and returns it.

        Args:
            key: The open finding.
            step: The optimizer step.
            superseded_by: The finding that replaces it (default: None, it is resolved).
        """
        finding = replace(self.open.pop(key), closed=step, superseded_by=superseded_by)
        same_kind = [each for each in self._closed if each.is_above_info is finding.is_above_info]
        if len(same_kind) >= MAX_CLOSED:
            self._closed.remove(same_kind[0])
        self._closed.append(finding)
        return finding

    def state(self) -> dict[str, Any]:
        """Returns the state to store in a checkpoint."""
        return {
            "open": [each.as_row() for each in self.open.values()],
            "closed": [each.as_row() for each in self._closed],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores the state from a checkpoint."""
        found = [Finding.of_row(row) for row in state["open"]]
        self.open = {FindingKey(each.code, each.scope): each for each in found}
        self._closed = [Finding.of_row(row) for row in state["closed"]]
