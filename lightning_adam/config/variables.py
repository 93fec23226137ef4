"""Environment variables that the package reads. Imports nothing: Lightning loads it everywhere."""

MONITOR_VARIABLE = "LIGHTNING_ADAM_MONITOR"
"""Attaches an AdamMonitor to each Trainer: `1`, or settings such as `every_n_steps=10`."""
TRIAL_VARIABLE = "LIGHTNING_ADAM_TRIAL"
"""Identifies a trial of `hydra/sweeper=adam_tune`; set by the sweeper."""
STORAGE_VARIABLE = "LIGHTNING_ADAM_STORAGE"
"""Where the trials of `hydra/sweeper=adam_tune` write; not in their configs, as it may have a
password."""
