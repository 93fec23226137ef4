"""The rules: one declaration a fault.

To add one, write a function under `@rule`, here or in your own code: its name is the code, its
docstring the meaning, its arguments what it judges by. Thresholds without a source were calibrated
on the runs of `benchmarks/findings`; `docs/findings_log.md` has the experiments.
"""

# Importing them registers the rules, in the order in which they are shown.
from lightning_adam.findings.rules import arithmetic as arithmetic
from lightning_adam.findings.rules import decay as decay
from lightning_adam.findings.rules import jumps as jumps
from lightning_adam.findings.rules import state as state
from lightning_adam.findings.rules import steps as steps
