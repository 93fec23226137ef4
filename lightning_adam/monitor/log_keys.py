"""Keys and file names of what is logged beside the statistics, for writers and readers.

Imports neither torch nor lightning, so that a run can be read without either.
"""

X_AXIS = "trainer/global_step"
"""The key of Lightning's own steps."""
DENOMINATOR = "adam_histogram/denominator"
"""The model's histogram that tells what share of the elements an eps would dominate."""
EPS_CURVE = "adam_underflow/eps_curve"
"""W&B's chart of that; its table is called `adam_underflow/eps_curve_table`."""
TENSOR = "_tensor"
"""Appended to the key of a largest value over tensors: the name of the tensor."""
LAYERS = "adam_layers"
"""W&B's table of layers."""
FINDINGS = "adam_findings"
"""W&B's table of findings, and the file `adam_findings.json` in a run's folder."""
FLIGHT_RECORDER = "adam_flight_recorder"
"""The folder of a flight recorder's files, in a run's folder."""
