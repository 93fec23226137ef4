"""Tunes Adam in stages, judged by what the app returns: `hydra/sweeper=adam_tune`."""
