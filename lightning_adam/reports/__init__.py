"""Reports on runs and checkpoints: the HTML page, the W&B workspace, `lightning-adam inspect`."""
