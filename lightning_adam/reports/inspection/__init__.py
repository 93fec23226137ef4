"""Inspects the optimizer state in a checkpoint, without a run and without the model's code."""
