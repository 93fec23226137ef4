"""Findings: rules that judge the statistics of a run, their evidence and their suggestions."""

# Importing them registers the rules and the notices.
from lightning_adam.findings import preflight as preflight
from lightning_adam.findings import rules as rules
from lightning_adam.findings.finding import Suggestion
from lightning_adam.findings.rule import RULES, rule

__all__ = ["RULES", "Suggestion", "rule"]
