"""Statistics → findings: what is wrong with a training, what proves it, and what to type."""
