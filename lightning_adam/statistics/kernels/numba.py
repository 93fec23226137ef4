"""Placeholder."""

from lightning_adam.statistics.kernels.eager import count_exponents, measure

__all__ = ["count_exponents", "measure"]
