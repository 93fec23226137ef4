"""Reports on runs and checkpoints: HTML page, W&B workspace, and `lightning-adam inspect`."""
