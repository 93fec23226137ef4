"""Makes the hyperparameters in a checkpoint loadable with `weights_only=True`."""

from typing import Any

from lightning_adam._compat.lightning import either
from lightning_adam.config.parsing import to_plain


def make_plain(checkpoint: dict[str, Any]) -> None:
    """Converts the configs in a checkpoint's hyperparameters to plain containers, in place.

    `torch.load` then accepts them with `weights_only=True`, Lightning's default.

    Args:
        checkpoint: Lightning's checkpoint.

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
            checkpoint[key] = to_plain(checkpoint[key])
            checkpoint.pop(kind.CHECKPOINT_HYPER_PARAMS_TYPE, None)
