"""Keys and file names that are shared by the monitor and the reports.

Imports neither torch nor lightning, so that reports work without either.
"""

X_AXIS = "trainer/global_step"
"""The key of Lightning's global step."""
DENOMINATOR = "adam_histogram/denominator"
"""The model's histogram of √v̂, which shows the fraction of elements that an eps would dominate."""
EPS_CURVE = "adam_underflow/eps_curve"
"""W&B's chart of this fraction; its table is `adam_underflow/eps_curve_table`."""
TENSOR = "_tensor"
"""Suffix of the key with the name of the tensor that has the largest value."""
LAYERS = "adam_layers"
"""W&B's tables of layers."""
FINDINGS = "adam_findings"
"""W&B's table of findings, and the file `adam_findings.json` in the folder of a run."""
FLIGHT_RECORDER = "adam_flight_recorder"
"""The folder of the flight recorder's files, in the folder of a run."""
