"""The hyperparameters in a checkpoint, as torch loads them without running code."""

from typing import Any

from lightning_adam._compat.lightning import either
from lightning_adam.config.parsing import plain


def make_plain(checkpoint: dict[str, Any]) -> None:
    """Turns configs among the hyperparameters of a checkpoint into plain containers.

    torch's `load` accepts them with `weights_only`, which is Lightning's default.

    Args:
        checkpoint: Lightning's checkpoint, which is changed.

    Example:
        >>> from omegaconf import OmegaConf
        >>> checkpoint = {"hyper_parameters": {"optimizer": OmegaConf.create({"lr": 0.1})}}
        >>> make_plain(checkpoint)
        >>> checkpoint
        {'hyper_parameters': {'optimizer': {'lr': 0.1}}}
    """
    for kind in (*either("LightningModule"), *either("LightningDataModule")):
        key = kind.CHECKPOINT_HYPER_PARAMS_KEY
        if key in checkpoint:
            checkpoint[key] = plain(checkpoint[key])
            checkpoint.pop(kind.CHECKPOINT_HYPER_PARAMS_TYPE, None)
