"""SharpnessMonitor: how near Adam trains to the edge of its stability."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_adam._compat.lightning import AnyCallback, as_training_gives_it, logging_step
from lightning_adam.config.errors import ConfigError, ConfigPath, Source
from lightning_adam.monitor.failsafe import warn_only
from lightning_adam.monitor.loggers import log_values, warn_without_logger
from lightning_adam.monitor.sharpness.curvature import (
    Stability,
    largest_eigenvalue,
    preconditioned_hessian,
    stability_of,
)
from lightning_adam.monitor.sharpness.held_loss import (
    Held,
    Loss,
    NoLoss,
    copied_batch,
    evaluated,
    own_random_numbers,
)
from lightning_adam.optim.console import log_info
from lightning_adam.optim.steps import StepCounter, next_due
from lightning_adam.statistics.catalogue import key_part
from lightning_adam.statistics.names import optimizer_names
from lightning_adam.statistics.sharding import is_sharded, this_rank
from lightning_adam.statistics.views import steps_as_adam

PATH = ConfigPath("SharpnessMonitor", source=Source.PYTHON)
PRECONDITIONED = "adam_sharpness/preconditioned"
STABILITY_LINE = "adam_sharpness/stability_line"
EDGE = 1.0
"""Above it the training is not stable, in the units of the sharpness logged."""


@dataclass
class _Watched:
    """One optimizer, and how far it has come."""

    optimizer: Optimizer
    key: str
    counter: StepCounter
    due: int
    is_due: bool = False
    """Whether a step of the batch is to be measured."""
    lrs: list[float] = field(default_factory=list)
    """Of the groups, as that step has used them: a schedule goes on before the batch ends."""
    direction: Tensor | None = None
    """The one in which the loss was curved most, the last time."""


class SharpnessMonitor(AnyCallback):
    """Logs the sharpness that Adam sees, in units in which 1 is the edge of its stability.

    That is λ₁(P⁻¹H)·η(1-β1)/(2+2β1), of the Hessian H of the loss on one batch, and of Adam's
    preconditioner P = (1-β1ᵗ)(√v̂+ε); η, β1 and ε are those of each parameter's group. With full
    batches it rises to 1 and stays there; with small ones it levels off below (Cohen et al. 2022,
    arXiv 2207.14484). In the first steps it is far above, for 1-β1ᵗ is small. Under coupled decay
    H is that of the loss with its L2 penalty; decoupled decay is left out.

    The keys are `adam_sharpness/preconditioned`, with several optimizers
    `adam_sharpness/optimizer/<name>/preconditioned`, and `adam_sharpness/stability_line`, which is
    always 1. They go to every logger of the trainer and to `trainer.callback_metrics`; on several
    processes those of rank 0, on its batch.

    The loss is computed by a copy of the module in training mode, with the same dropout masks each
    time, in the precision of the parameters or float32 if that is higher, without autocast.
    Training does not change; a fault inside is reported once and switches the callback off. Only
    what `training_step` or hooks of the module change outside of it, they change once more. A
    `torch.autograd.Function` in the loss needs a backward that can itself be differentiated.

    Each measurement costs a copy of the module, and at most `iterations` times about twice the time
    of a backward pass and one vector of all parameters.

    Args:
        every_n_steps: Measure after the first optimizer step and every n-th (default: 50).
        batch: What the loss is computed on, as a loader gives it (default: None, a copy of the
            training batch of the first step that it measures).
        loss: The loss of the module, which is a copy, and the batch (default: None, that of
            `training_step`). Manual optimization needs it.
        iterations: The most Hessian-vector products of a measurement, at least 1 (default: 20).
        tolerance: The residual, as a share of the eigenvalue, at which fewer are enough (default:
            0.001). A larger one may take the second direction for the first. On several processes
            none are fewer.

    Raises:
        ConfigError: If an argument cannot work or, when `fit` starts, if no optimizer steps as Adam
            or AdamW do, parameters or state are sharded, or manual optimization has no `loss`.

    Example:
        >>> monitor = SharpnessMonitor(every_n_steps=100)
        >>> trainer = Trainer(callbacks=[monitor], logger=False)
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        batch: Any = None,
        loss: Loss | None = None,
        iterations: int = 20,
        tolerance: float = 0.001,
    ) -> None:
        for name, value, instead in (
            ("every_n_steps", every_n_steps, 50),
            ("iterations", iterations, 20),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise (PATH / name).invalid(value, "must be an integer, at least 1", instead)
        is_number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
        if not is_number or not 0 <= tolerance < 1:
            raise (PATH / "tolerance").invalid(tolerance, "must be a number in [0, 1)", 0.001)
        if loss is not None and not callable(loss):
            problem = "must be a function of the module and a batch"
            suggestion = "Use for example loss=lambda module, batch: ..."
            raise (PATH / "loss").error(problem, suggestion, value=loss)
        self.every_n_steps = every_n_steps
        self.batch = batch
        self.loss = loss
        self.iterations = iterations
        self.tolerance = tolerance
        self._held = Held(None, 0)
        self._is_settled = False
        """Whether the batch held stays: one that was skipped, before any step, would not do."""
        self._watched: list[_Watched] = []
        self._counters: list[StepCounter] = []
        self._is_off = False
        """Whether this process has failed: it goes on to hear what rank 0 has found."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses what cannot be measured, before the first step."""
        optimizers = [each for each in trainer.optimizers if _is_adam(each)]
        others = [type(each).__name__ for each in trainer.optimizers if not _is_adam(each)]
        if not optimizers:
            raise ConfigError(
                "SharpnessMonitor needs torch.optim.Adam or AdamW. The model trains with"
                f" {', '.join(others) or 'no optimizer'}",
                "Use one of them (AdamMixin builds them), or remove the callback",
            )
        if any(map(is_sharded, optimizers)):
            raise ConfigError(
                "SharpnessMonitor needs all parameters on each rank, and they are sharded",
                "Use DDPStrategy, or remove the callback",
            )
        if not pl_module.automatic_optimization and self.loss is None:
            raise ConfigError(
                "SharpnessMonitor needs a loss function with manual optimization, where"
                " training_step steps the optimizers",
                "Use SharpnessMonitor(loss=lambda module, batch: ...)",
            )
        for optimizer in optimizers:
            if len({group["maximize"] for group in optimizer.param_groups}) > 1:
                raise ConfigError(
                    f"SharpnessMonitor: some groups of {type(optimizer).__name__} minimize and"
                    " others maximize",
                    "Give them separate optimizers, or remove the callback",
                )
        if others:
            log_info(f"SharpnessMonitor does not measure {', '.join(others)}.")
        warn_without_logger("SharpnessMonitor", trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hooks into the optimizers; a checkpoint's state has been restored by now."""
        self._is_off = False
        with self._never_harm():
            names = optimizer_names(trainer.optimizers, pl_module)
            for optimizer, name in zip(trainer.optimizers, names, strict=True):
                if _is_adam(optimizer):
                    self._watch(optimizer, name)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the batch that the loss is computed on."""
        if not self._is_settled and not self._is_off:
            with self._never_harm():
                self._held = self._batch_to_hold(trainer, pl_module, batch, batch_idx)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measures what is due, under the step of the batch's loss."""
        values: dict[str, float] = {}
        for watched in [each for each in self._watched if each.is_due]:
            watched.is_due = False
            found: dict[str, float] | None = None
            with self._never_harm():
                if not self._is_off:
                    found = self._measured(trainer, pl_module, watched)
            # All go on or none does: what is logged may stop the training.
            found = trainer.strategy.broadcast(found)
            if found is None:
                self._switch_off()
                return
            values |= found
        if values:
            with self._never_harm():
                log_values(trainer, {**values, STABILITY_LINE: EDGE}, logging_step(trainer))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets go of the optimizers and of the batch."""
        self._finish()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Lets go of the optimizers and of the batch."""
        self._finish()

    def _watch(self, optimizer: Optimizer, name: str) -> None:
        counter = StepCounter(optimizer)
        key = f"{PRECONDITIONED}/optimizer/{key_part(name)}" if name else PRECONDITIONED
        watched = _Watched(optimizer, key, counter, next_due(counter.taken, self.every_n_steps))
        counter.attach(lambda: self._after_step(watched), guard=self._guard)
        self._watched.append(watched)
        self._counters.append(counter)

    def _guard(self, hook: Callable[[], None]) -> None:
        """Calls what belongs to a step; `_never_harm` would cost more than all else in between."""
        if self._watched:
            try:
                hook()
            except Exception as error:
                self._report(error)

    def _after_step(self, watched: _Watched) -> None:
        if watched.counter.taken >= watched.due:
            watched.is_due = True
            watched.lrs = [float(group["lr"]) for group in watched.optimizer.param_groups]
            watched.due = next_due(watched.counter.taken, self.every_n_steps)

    def _batch_to_hold(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> Held:
        if self.batch is not None:
            self._is_settled = True
            with own_random_numbers():
                return Held(copied_batch(as_training_gives_it(trainer, module, self.batch)), 0)
        if batch is None:
            raise ConfigError(
                "SharpnessMonitor needs a batch, and training_step takes an iterator",
                "Use SharpnessMonitor(batch=..., loss=lambda module, batch: ...)",
            )
        return Held(copied_batch(batch), batch_idx)

    def _measured(
        self, trainer: Trainer, module: LightningModule, watched: _Watched
    ) -> dict[str, float]:
        """Nothing if the device has skipped all steps so far."""
        self._is_settled = True
        watched.counter.settle()
        watched.due = next_due(watched.counter.taken, self.every_n_steps)
        stability = stability_of(watched.optimizer, watched.lrs)
        try:
            return self._evaluated(trainer, module, watched, stability)
        except NoLoss:
            log_info(
                "SharpnessMonitor has nothing to measure at this step: training_step returned no"
                " loss for the batch that is held."
            )
            return {}

    def _evaluated(
        self,
        trainer: Trainer,
        module: LightningModule,
        watched: _Watched,
        stability: Sequence[Stability],
    ) -> dict[str, float]:
        with evaluated(trainer, module, self._held, self.loss) as evaluation:
            stability = [each for each in stability if evaluation.has(each.parameter)]
            if not stability:
                return {}
            parameters = [evaluation.copy_of(each.parameter) for each in stability]
            product = preconditioned_hessian(evaluation.loss, parameters, stability)
            # Where products wait for other processes, as many are formed on each.
            tolerance = self.tolerance if trainer.world_size == 1 else 0.0
            start = _start(watched.direction, stability)
            found = largest_eigenvalue(product, start, self.iterations, tolerance)
        watched.direction = found.vector
        return {watched.key: found.value}

    def _finish(self) -> None:
        self._switch_off()
        for counter in self._counters:
            counter.remove()
        self._counters = []

    @contextmanager
    def _never_harm(self) -> Iterator[None]:
        """A fault in monitoring is reported once, ends the monitoring, and never the training."""
        try:
            yield
        except Exception as error:
            self._report(error)

    def _report(self, error: Exception) -> None:
        # Where the others wait for what rank 0 finds, it is rank 0 that has something to tell.
        if not self._is_off and this_rank() == 0:
            cause = str(error) if isinstance(error, ConfigError) else traceback.format_exc()
            warn_only(
                "SharpnessMonitor has failed and is off from here on; training is not affected.\n"
                f"{cause}"
            )
        self._is_off = True

    def _switch_off(self) -> None:
        self._is_off = True
        # The hooks stay till the end: torch may be going through them at this moment.
        self._watched = []
        self._held, self._is_settled = Held(None, 0), False


def _start(direction: Tensor | None, stability: Sequence[Stability]) -> Tensor:
    """Where the search begins: near where the last one ended, or anywhere."""
    like = torch.cat([each.scale.flatten() for each in stability])
    generator = torch.Generator(like.device).manual_seed(0)
    anywhere = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    if direction is None or direction.shape != like.shape:
        return anywhere
    # Another direction may have become the steepest.
    return torch.add(direction, anywhere / anywhere.norm())


def _is_adam(optimizer: Any) -> bool:
    return isinstance(optimizer, Optimizer) and steps_as_adam(optimizer)
