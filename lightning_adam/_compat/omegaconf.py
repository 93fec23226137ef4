"""Private names of omegaconf, seen in 2.3.1."""

from typing import Any

from omegaconf import DictConfig


def full_key(node: Any, default: str) -> str:
    """Where the node stands in the config it was taken from (`model.optimizer`).

    `default` for everything that is no part of a larger config.
    """
    key = node._get_full_key(None) if isinstance(node, DictConfig) else ""
    return key or default
