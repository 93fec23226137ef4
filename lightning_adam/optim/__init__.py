"""Parameter groups, optimizers, schedules and resume."""
