"""Private names and undocumented behavior of lightning, as of 2.6.6.

`lightning.pytorch` and `pytorch_lightning` are two copies of the same code. Their attributes are
the same, but an object of one is never an instance of a class of the other. Annotations name the
classes of `lightning.pytorch` and mean those of both packages.
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
    """Returns a class of `lightning.pytorch`, and its copy if `pytorch_lightning` is imported.

    Args:
        name: Path of the class below the package.

    Example:
        >>> isinstance(Trainer(barebones=True), either("Trainer"))
        True
        >>> [each.__module__ for each in either("callbacks.ModelCheckpoint")][0]
        'lightning.pytorch.callbacks.model_checkpoint'
    """
    path, _, attribute = name.rpartition(".")
    modules = [f"{package}.{path}".rstrip(".") for package in PACKAGES]
    # A class that is not imported has no instances.
    return tuple(getattr(sys.modules[each], attribute) for each in modules if each in sys.modules)


class AnyCallback(Callback):
    """Base of a callback for the Trainers of both packages.

    Trainer and LightningCLI require a subclass of their own Callback. `pytorch_lightning` may be
    imported at any time, so its class joins the bases when a subclass is defined or an instance is
    created.

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
    """Returns the module's trainer, or None, where `module.trainer` raises."""
    return module._trainer


def is_created_by_cli() -> bool:
    """Returns whether LightningCLI is calling the constructor of a module."""
    instantiators = {f"{package}.cli.instantiate_module" for package in PACKAGES}
    return any(
        (given.get() or {}).get("_instantiator") in instantiators
        for given in either("core.mixins.hparams_mixin._given_hyperparameters")
    )


def parameter_root(trainer: Trainer, module: LightningModule) -> nn.Module:
    """Returns the module, or under FSDP1 its wrapper, which has the flat parameters."""
    is_flat = isinstance(trainer.strategy, either("strategies.FSDPStrategy"))
    return (trainer.strategy.model if is_flat else None) or module


def logging_step(trainer: Trainer) -> int:
    """Returns the step that Lightning logs with, so that curves align with the loss."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def epochs_done(trainer: Trainer) -> int:
    """Returns the number of epochs that have ended, also while a checkpoint is loaded.

    A checkpoint of the end of an epoch is saved before the epoch counts as completed.
    """
    epochs, batches = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop
    return epochs.ready if batches.batch_progress.is_last_batch else epochs.completed


def loss_of_batch(trainer: Trainer, outputs: Any) -> Tensor | None:
    """Returns a batch's loss on its device, in float32 or wider; None if there is none.

    Args:
        trainer: The trainer.
        outputs: The outputs that `on_train_batch_end` receives.
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return None
    # Lightning has divided the loss by the number of batches in a step.
    is_automatic = trainer.lightning_module.automatic_optimization
    batches = trainer.accumulate_grad_batches if is_automatic else 1
    precise = torch.promote_types(loss.dtype, torch.float32)
    return loss.detach().reshape(()).to(precise) * batches


def is_smoke_test(trainer: Trainer) -> bool:
    """Returns whether `fast_dev_run` is on. Trainer sets the attribute without declaring it."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def log_every_n_steps(trainer: Trainer) -> int:
    """Returns the logging interval in steps. Trainer sets the attribute without declaring it."""
    return int(trainer.log_every_n_steps)  # type: ignore[attr-defined]


def loaded_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """Returns the checkpoint that is being loaded; empty if there is none."""
    return trainer._checkpoint_connector._loaded_checkpoint


def is_lr_find_scheduler(scheduler: LRScheduler) -> bool:
    """Returns whether a scheduler belongs to `lr_find`, which replaces the configured one."""
    names = ("_ExponentialLR", "_LinearLR")
    return any(isinstance(scheduler, either(f"tuner.lr_finder.{name}")) for name in names)


def restore_loaders(trainer: Trainer) -> None:
    """Restores the state of stateful data loaders from a checkpoint.

    Lightning does not restore it if the data is set up before the state of the loops is loaded
    (Lightning #20550). The length of the run requires the data.
    """
    loop = trainer.fit_loop
    if getattr(loop, "_combined_loader_states_to_load", None) and loop._data_fetcher is not None:
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)


def logged_metrics(trainer: Trainer) -> dict[str, Any]:
    """Returns the metrics that the running loop has logged, without those of earlier loops."""
    return dict(trainer._logger_connector.metrics["callback"])


def unscale_before_clipping(trainer: Trainer) -> None:
    """Makes `clip_gradients` unscale first, in manual optimization with a GradScaler.

    Otherwise Lightning unscales in the optimizer's step, which comes after the clipping.
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


def swa_lr(callback: Any) -> float | None:
    """Returns the learning rate of StochasticWeightAveraging; None if it has one per group."""
    return callback._swa_lrs if isinstance(callback._swa_lrs, float) else None
