"""`GradientProcessing`: loss scaling and clipping between backward and step."""

import math

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_adam._compat.lightning import is_overridden
from lightning_adam._compat.torch import loss_scale, unscales_itself


class GradientProcessing:
    """Reports the loss scaling and clipping of a trainer.

    Args:
        trainer: The trainer.

    Example:
        >>> math.isnan(GradientProcessing(Trainer(barebones=True)).loss_scale())
        True
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def is_clipped(self, optimizer: Optimizer) -> bool:
        """Returns whether Lightning clips unscaled gradients after `on_before_optimizer_step`."""
        trainer, module = self._trainer, self._trainer.lightning_module
        if not module.automatic_optimization:
            return False
        clips = trainer.gradient_clip_val or is_overridden("configure_gradient_clipping", module)
        is_scaled = self._scaler is not None and unscales_itself(optimizer)
        return bool(clips) and not is_scaled

    def loss_scale(self) -> Tensor | float:
        """Returns the scale of the GradScaler on its device; NaN without a GradScaler."""
        scale = loss_scale(self._scaler)
        return math.nan if scale is None else scale

    @property
    def _scaler(self) -> object:
        return getattr(self._trainer.precision_plugin, "scaler", None)
