"""Private names of other libraries: one file a library, with the version they were seen in."""
