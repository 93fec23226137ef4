"""Reads runs from files of W&B, CSVLogger and TensorBoard."""

from lightning_adam.reports.runs.reader import find_files, read_runs
from lightning_adam.reports.runs.run import Event, Run, Series

__all__ = ["Event", "Run", "Series", "find_files", "read_runs"]
