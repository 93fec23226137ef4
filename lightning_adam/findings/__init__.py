"""Findings: rules that judge the statistics of a run, their evidence and their suggestions."""

# These two register the rules.
from lightning_adam.findings import preflight as preflight
from lightning_adam.findings import rules as rules
from lightning_adam.findings.rule import RULES, Cure, rule

__all__ = ["RULES", "Cure", "rule"]
