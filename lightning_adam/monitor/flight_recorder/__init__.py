"""The flight recorder: keeps the last steps of a run in memory, and writes them on a failure."""
