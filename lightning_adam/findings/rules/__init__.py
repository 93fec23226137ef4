"""The rules, one function each.

To add a rule, decorate a function with `@rule`, here or in your own code. Its name is the code, its
docstring the meaning, and its arguments are statistics and thresholds. Thresholds without a source
are calibrated on the runs of `benchmarks/findings`; see `docs/findings_log.md`.
"""

# Importing them registers the rules, in the order in which they are shown.
from lightning_adam.findings.rules import arithmetic as arithmetic
from lightning_adam.findings.rules import decay as decay
from lightning_adam.findings.rules import jumps as jumps
from lightning_adam.findings.rules import state as state
from lightning_adam.findings.rules import steps as steps
