"""Private names of lightning, and what it does without saying so, seen in 2.6.6.

`lightning.pytorch` and `pytorch_lightning` are two copies of the same code, so that an object of
one is never an instance of a class of the other. Attributes are the same in both. Annotations name
the classes of `lightning.pytorch` and mean those of either package.
"""

import sys
from collections.abc import Mapping
from typing import Any

import lightning_utilities
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import Self

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def either(name: str) -> tuple[Any, ...]:
    """Returns a class of `lightning.pytorch`, and that of `pytorch_lightning` if it is imported.

    Args:
        name: Its path below the package.

    Example:
        >>> isinstance(Trainer(barebones=True), either("Trainer"))
        True
        >>> [each.__module__ for each in either("callbacks.ModelCheckpoint")][0]
        'lightning.pytorch.callbacks.model_checkpoint'
    """
    path, _, attribute = name.rpartition(".")
    places = [f"{package}.{path}".rstrip(".") for package in PACKAGES]
    # What is not imported has no instances.
    return tuple(getattr(sys.modules[each], attribute) for each in places if each in sys.modules)


class AnyCallback(Callback):
    """Base of a callback for the Trainers of both packages.

    A Trainer and a LightningCLI check that a callback is of a subclass of their own Callback. As
    `pytorch_lightning` may be imported at any time, its class joins the bases when a subclass is
    defined or an instance is made.

    Example:
        >>> class Own(AnyCallback):
        ...     pass
        >>> isinstance(Own(), either("Callback"))
        True
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _join_bases()

    def __new__(cls, *_: Any, **__: Any) -> Self:
        _join_bases()
        return super().__new__(cls)


def _join_bases() -> None:
    missing = [each for each in either("Callback") if not issubclass(AnyCallback, each)]
    AnyCallback.__bases__ += tuple(missing)


def is_overridden(name: str, module: nn.Module) -> bool:
    """Returns whether a LightningModule overrides a method; False for another module.

    Example:
        >>> is_overridden("configure_gradient_clipping", LightningModule())
        False
    """
    parents = [each for each in either("LightningModule") if isinstance(module, each)]
    return any(lightning_utilities.is_overridden(name, module, parent) for parent in parents)


def attached_trainer(module: LightningModule) -> Trainer | None:
    """The module's trainer; None (where `module.trainer` raises) if it has none."""
    return module._trainer


def is_created_by_cli() -> bool:
    """Returns whether LightningCLI is calling the constructor of a module."""
    instantiators = {f"{package}.cli.instantiate_module" for package in PACKAGES}
    return any(
        (given.get() or {}).get("_instantiator") in instantiators
        for given in either("core.mixins.hparams_mixin._given_hyperparameters")
    )


def holder_of_parameters(trainer: Trainer, module: LightningModule) -> nn.Module:
    """The module; under FSDP1 what wraps it, where the flat parameters are."""
    is_flat = isinstance(trainer.strategy, either("strategies.FSDPStrategy"))
    return (trainer.strategy.model if is_flat else None) or module


def logging_step(trainer: Trainer) -> int:
    """The x-axis of Lightning's own callbacks, so that curves line up with the loss."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def epochs_done(trainer: Trainer) -> int:
    """The number of epochs that have ended, also while a checkpoint of an epoch's end is loaded.

    Such a checkpoint is saved before the epoch counts as completed.
    """
    epochs, batches = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop
    return epochs.ready if batches.batch_progress.is_last_batch else epochs.completed


def loss_of_batch(trainer: Trainer, outputs: Any) -> Tensor | None:
    """A batch's loss, on its device, at least in float32; None if there is none.

    Args:
        trainer: The trainer.
        outputs: What `training_step` returned, as `on_train_batch_end` is given it.
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return None
    # Lightning has divided it by the batches of a step.
    is_automatic = trainer.lightning_module.automatic_optimization
    batches = trainer.accumulate_grad_batches if is_automatic else 1
    precise = torch.promote_types(loss.dtype, torch.float32)
    return loss.detach().reshape(()).to(precise) * batches


def is_smoke_test(trainer: Trainer) -> bool:
    """Whether `fast_dev_run` is on, an attribute that is set without being declared."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def log_every_n_steps(trainer: Trainer) -> int:
    """The trainer's logging interval, an attribute that is set without being declared."""
    return int(trainer.log_every_n_steps)  # type: ignore[attr-defined]


def loaded_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """The checkpoint whose optimizer and scheduler states are about to be loaded; empty if none."""
    return trainer._checkpoint_connector._loaded_checkpoint


def is_of_lr_find(scheduler: LRScheduler) -> bool:
    """Whether `lr_find` has put the scheduler in the place of the training's own."""
    names = ("_ExponentialLR", "_LinearLR")
    return any(isinstance(scheduler, either(f"tuner.lr_finder.{name}")) for name in names)


def restore_loaders(trainer: Trainer) -> None:
    """Gives loaders that can go on in the middle of an epoch their place in a checkpoint.

    Lightning forgets to if something has asked it for the training's length, which sets up the
    data, before it has loaded the loops' state (Lightning #20550).
    """
    loop = trainer.fit_loop
    if getattr(loop, "_combined_loader_states_to_load", None) and loop._data_fetcher is not None:
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)


def logged_metrics(trainer: Trainer) -> dict[str, Any]:
    """The metrics that the loop that runs now has logged for callbacks, without earlier ones."""
    return dict(trainer._logger_connector.metrics["callback"])


def unscale_before_clipping(trainer: Trainer) -> None:
    """Has `clip_gradients` clip unscaled gradients in manual optimization under a GradScaler.

    Lightning unscales in the optimizer's step, which comes after it.
    """
    precision: Any = trainer.precision_plugin
    scaler: Any = getattr(precision, "scaler", None)
    if scaler is None or "clip_gradients" in vars(precision):
        return
    clip, unscale = precision.clip_gradients, scaler.unscale_

    def unscale_once(optimizer: Any) -> None:
        if not scaler._per_optimizer_states[id(optimizer)]["stage"].value:
            unscale(optimizer)

    def clip_unscaled(optimizer: Any, *args: Any, **kwargs: Any) -> None:
        scaler.unscale_(getattr(optimizer, "optimizer", optimizer))
        clip(optimizer, *args, **kwargs)

    scaler.unscale_ = unscale_once
    precision.clip_gradients = clip_unscaled


def averaged_lr(callback: Any) -> float | None:
    """The one learning rate that StochasticWeightAveraging sets for all groups; None if several."""
    return callback._swa_lrs if isinstance(callback._swa_lrs, float) else None
