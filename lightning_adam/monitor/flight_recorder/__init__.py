"""The last steps of a run, kept in memory and written on a failure."""
