"""The last steps of a training, kept for when it blows up."""
