"""Inspects the optimizer state in a checkpoint, without the code of the model."""
