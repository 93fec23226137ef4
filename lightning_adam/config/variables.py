"""Environment variables that the package reads. Imports nothing, because every Trainer loads it."""

MONITOR_VARIABLE = "LIGHTNING_ADAM_MONITOR"
"""Attaches an AdamMonitor to each Trainer: `1`, or settings such as `every_n_steps=10`."""
TRIAL_VARIABLE = "LIGHTNING_ADAM_TRIAL"
"""Identifies a trial of `hydra/sweeper=adam_tune`; set by the sweeper."""
STORAGE_VARIABLE = "LIGHTNING_ADAM_STORAGE"
"""Storage of the trials of `hydra/sweeper=adam_tune`. It may contain a password, so it is not part
of the configs, which are saved."""
