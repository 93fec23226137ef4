"""Private names of torch, seen in 2.13.0."""

from typing import Any

from torch import distributed
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def let_unscale(optimizer: Optimizer, itself: bool) -> None:
    """Whether a GradScaler leaves unscaling and skipping to the (fused) step of the optimizer.

    Otherwise it does with it as with any other: unscales, lets clip, looks for inf, and steps.
    """
    optimizer._step_supports_amp_scaling = itself  # type: ignore[attr-defined]


def record_lrs(scheduler: LRScheduler) -> None:
    """Has `get_last_lr` return what the optimizer trains with now."""
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def shared_store() -> Any:
    """What all processes of a training write to without waiting for each other.

    None if there is one process, or if MPI has started them.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return distributed.distributed_c10d._get_default_store()
