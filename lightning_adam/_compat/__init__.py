"""Private names of other libraries: one file per library, with its tested version."""
