"""The loss of a module on a batch that is kept, computed where it leaves no trace."""

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_adam._compat.lightning import attach, compiler_context, either, leave_uncompiled
from lightning_adam.config.errors import ConfigError

Loss = Callable[[LightningModule, Any], Tensor]

SEED = 0
"""Of the dropout masks, the same at every evaluation."""


class Held(NamedTuple):
    """A batch that is kept, and its number in its epoch."""

    batch: Any
    batch_idx: int


class NoLoss(Exception):  # noqa: N818
    """`training_step` has skipped the batch."""


class Evaluated:
    """A loss, and what it was computed with."""

    def __init__(self, loss: Tensor, parameters: Mapping[int, Tensor]) -> None:
        self.loss = loss
        self._parameters = parameters

    def has(self, parameter: Tensor) -> bool:
        """Whether a parameter is one of the module's."""
        return id(parameter) in self._parameters

    def copy_of(self, parameter: Tensor) -> Tensor:
        """What stood in the place of a parameter."""
        return self._parameters[id(parameter)]


@contextmanager
def evaluated(
    trainer: Trainer, module: LightningModule, held: Held, loss: Loss | None
) -> Iterator[Evaluated]:
    """The loss of a module as it stands, to be differentiated within the context.

    It is computed by a copy of the module, in the same mode: buffers, metrics, attributes and
    gradients of the module itself stay as they are, what the copy logs is dropped, and random
    numbers go on as if none had been drawn. The precision is that of the parameters, at least
    float32, without autocast.

    Args:
        trainer: The module's.
        module: The module in training.
        held: A batch, on its device.
        loss: The loss of a module and a batch (default: None, that of `training_step`).

    Raises:
        NoLoss: If `training_step` returns None, as it may to skip a batch.
        ConfigError: If it returns anything else without a loss, or the module cannot be copied.
    """
    with ExitStack() as contexts:
        contexts.enter_context(own_random_numbers())
        contexts.enter_context(torch.inference_mode(False))
        contexts.enter_context(torch.enable_grad())
        contexts.enter_context(torch.autocast(module.device.type, enabled=False))
        # The fused attentions, cuDNN's recurrent layers and what inductor compiles have no second
        # derivative.
        contexts.enter_context(sdpa_kernel(SDPBackend.MATH))
        contexts.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(each, nn.RNNBase) for each in module.modules()):
            contexts.enter_context(torch.backends.cudnn.flags(enabled=False))
        if isinstance(trainer.precision_plugin, either("plugins.precision.DoublePrecision")):
            contexts.enter_context(trainer.precision_plugin.train_step_context())
        copied, parameters = _copied(trainer, module)
        batch = copied_batch(held.batch)
        if any(each.dtype in HALVES for each in parameters.values()):
            copied.float()
            batch = apply_to_collection(batch, Tensor, _single)
        step = _training_loss(held.batch_idx) if loss is None else loss
        yield Evaluated(step(copied, batch), parameters)


HALVES = (torch.float16, torch.bfloat16)


def copied_batch(batch: Any) -> Any:
    """A batch that nothing else changes.

    Example:
        >>> batch = [torch.zeros(2)]
        >>> copied = copied_batch(batch)
        >>> _ = batch[0].add_(1)
        >>> copied
        [tensor([0., 0.])]
    """
    memo: dict[int, Any] = {}
    _mapped(batch, lambda each: memo.setdefault(id(each), each.detach().clone()))
    return copy.deepcopy(batch, memo)


def _copied(trainer: Trainer, module: LightningModule) -> tuple[LightningModule, dict[int, Tensor]]:
    """A module with parameters, buffers, metrics and attributes of its own, that logs nothing."""
    parameters: dict[int, Tensor] = {
        id(each): nn.Parameter(each.detach().clone(), each.requires_grad)
        for each in module.parameters()
    }
    memo: dict[int, Any] = dict(parameters)
    for part in module.modules():
        # What was kept of an earlier loss, with its graph, cannot be copied.
        for value in vars(part).values():
            _mapped(value, lambda each: memo.setdefault(id(each), each.detach().clone()))
    # What a module refers to without owning it.
    others = (trainer, trainer.strategy, trainer.datamodule, *trainer.optimizers, *trainer.loggers)  # type: ignore[attr-defined]
    contexts = (compiler_context(part) for part in module.modules())
    memo |= {id(each): each for each in (*others, *contexts) if each is not None}
    try:
        copied = copy.deepcopy(module, memo)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ConfigError(
            f"SharpnessMonitor cannot copy the module: {type(error).__name__}: {error}",
            "Keep what cannot be copied outside of the module, or remove the callback",
        ) from error
    for part in copied.modules():
        if isinstance(part, either("LightningModule")):
            attach(part, _Unlogged(trainer))
            leave_uncompiled(part)
            # A method of the instance goes before those of its classes.
            part.log = part.log_dict = part.print = _drop
    return copied, parameters


class _Unlogged:
    """A trainer as a module sees it: with loggers that log nothing, and nothing to be set."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.logger = DummyLogger()
        self.loggers = [self.logger]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


def _drop(*_: Any, **__: Any) -> None:
    """In the place of `log`."""


def _training_loss(batch_idx: int) -> Loss:
    """The loss of `training_step`, of a batch with that number."""

    def loss_of(module: LightningModule, batch: Any) -> Tensor:
        step = module.training_step
        has_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
        result = step(batch, batch_idx) if has_index else step(batch)
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if loss is None:
            raise NoLoss
        if not isinstance(loss, Tensor):
            raise ConfigError(
                "SharpnessMonitor needs a loss from training_step, which returns"
                f" {type(loss).__name__}",
                "Use SharpnessMonitor(loss=lambda module, batch: ...)",
            )
        return loss

    return loss_of


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Within it random numbers begin anew; after it they go on as before, also after an error.

    Example:
        >>> drawn = []
        >>> for _ in range(2):
        ...     with own_random_numbers():
        ...         drawn.append(torch.rand(1))
        >>> drawn[0] == drawn[1]
        tensor([True])
    """
    # Lightning's `isolate_rng` does not restore them after an error.
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            random.seed(SEED)
            np.random.seed(SEED)
            torch.manual_seed(SEED)
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALVES else tensor


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The tensors within the collections of a value, changed."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return change(value)
    if type(value) in (list, tuple, set):
        return type(value)(_mapped(each, change) for each in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(each, change) for each in value))
    if type(value) is dict:
        return {key: _mapped(each, change) for key, each in value.items()}
    return value
