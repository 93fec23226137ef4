"""Statistics → findings: what is wrong with a training, what proves it, and what to type.

Imports neither torch nor lightning, but for what judges a training (`watch`, `judging`).
"""

# These two enter the rules.
from lightning_adam.findings import preflight as preflight
from lightning_adam.findings import rules as rules
from lightning_adam.findings.rule import RULES, Cure, rule

__all__ = ["RULES", "Cure", "rule"]
