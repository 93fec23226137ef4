"""Private names of other libraries: one file per library, with the version they were seen in."""
