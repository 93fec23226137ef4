"""Builds findings for tests."""

from typing import Any

from lightning_adam.config.monitor import Severity
from lightning_adam.findings.finding import Finding


def finding(
    code: str = "eps_dominates",
    severity: str = "warning",
    scope: str = "model",
    step: int = 8,
    **changes: Any,
) -> Finding:
    fields = {"evidence": {}, "worst": {}, "suggestions": (), "source": "source"} | changes
    sentence = fields.pop("sentence", f"{code} in {scope} at step {step}.")
    return Finding(code, Severity(severity), scope, step, sentence, **fields)
