"""Private names of omegaconf, as of 2.3.1."""

from typing import Any

from omegaconf import DictConfig


def full_key(node: Any) -> str:
    """Returns the path of a node in its config (`model.optimizer.0`); empty if it has none."""
    if not isinstance(node, DictConfig):
        return ""
    return node._get_full_key(None).replace("[", ".").replace("]", "").lstrip(".")


def root_of(node: Any) -> DictConfig | None:
    """Returns the root config of a node; None for another value."""
    root = node._get_root() if isinstance(node, DictConfig) else None
    return root if isinstance(root, DictConfig) else None
