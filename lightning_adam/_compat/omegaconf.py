"""Private names of omegaconf, seen in 2.3.1."""

from typing import Any

from omegaconf import DictConfig


def full_key(node: Any) -> str:
    """Returns the place of a node in its config (`model.optimizer`); empty if it has none."""
    return node._get_full_key(None) if isinstance(node, DictConfig) else ""
