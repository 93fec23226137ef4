"""Tune Adam in stages on the metric that an app returns: `hydra/sweeper=adam_tune`."""
