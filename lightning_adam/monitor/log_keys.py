"""What is logged beside the statistics: the names by which writers and readers know it.

Imports neither torch nor lightning, so that a run can be read without either.
"""

X_AXIS = "trainer/global_step"
"""What Lightning logs its steps under."""
DENOMINATOR = "adam_histogram/denominator"
"""The histogram whose quantiles say what eps would dominate."""
EPS_CURVE = "adam_underflow/eps_curve"
"""W&B's chart of that; its table is called `adam_underflow/eps_curve_table`."""
LAYERS = "adam_layers"
"""W&B's table of layers."""
FINDINGS = "adam_findings"
"""W&B's table of findings, and the file `adam_findings.json` in a run's folder."""
FLIGHT_RECORDER = "adam_flight_recorder"
"""The folder in a run's folder that holds what a flight recorder has written."""
