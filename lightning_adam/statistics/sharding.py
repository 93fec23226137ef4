"""Which part of an optimizer's parameters this rank holds and counts, and what all ranks hold.

The ranks have the same parameters in the same groups, of which each may hold a part: DTensors
(FSDP2, tensor parallelism), slices of a flat parameter (FSDP1), or the whole of some of them
(ZeroRedundancyOptimizer).
"""

import sys
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adam._compat.torch import collective_device, flat_replicas, is_flat
from lightning_adam.config.errors import ConfigError

ZERO = "torch.distributed.optim.zero_redundancy_optimizer"
WRAPPING = {"lightning", "pytorch_lightning", "lightning_fabric", "accelerate"}
"""The packages that wrap an optimizer and keep it as `optimizer`."""


def unwrap_wrapper(optimizer: Any) -> Any:
    """Returns the torch optimizer in a LightningOptimizer, or in Fabric's or Accelerate's wrapper.

    Example:
        >>> adam = torch.optim.Adam([torch.zeros(2, requires_grad=True)])
        >>> unwrap_wrapper(adam) is adam
        True
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        packages = {kind.__module__.partition(".")[0] for kind in type(optimizer).__mro__}
        if not packages & WRAPPING:
            break
        optimizer = inner
    return optimizer


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """Returns the optimizer that holds this rank's state and takes its step.

    Example:
        >>> adam = torch.optim.Adam([torch.zeros(2, requires_grad=True)])
        >>> unwrap_optimizer(adam) is adam
        True
    """
    is_zero = isinstance(optimizer, _loaded(ZERO, "ZeroRedundancyOptimizer"))
    return optimizer.optim if is_zero else optimizer  # type: ignore[attr-defined]


def is_sharded(optimizer: Optimizer) -> bool:
    """Whether no rank alone can tell what a step did; all ranks say the same.

    Example:
        >>> is_sharded(torch.optim.Adam([torch.zeros(2, requires_grad=True)]))
        False
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    return unwrap_optimizer(optimizer) is not optimizer or any(
        is_flat(parameter) or not all(placement.is_replicate() for placement in _placed(parameter))
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


def distributed_tensor() -> tuple[Any, ...]:
    """The class of DTensors, for `isinstance`; empty if there are none.

    Example:
        >>> isinstance(torch.zeros(2), distributed_tensor())
        False
    """
    return _loaded("torch.distributed.tensor", "DTensor")


def local(tensor: Any, like: Any) -> Any:
    """This rank's part of what belongs to a DTensor; all ranks of its mesh call this alike.

    Args:
        tensor: A gradient or a state.
        like: The DTensor: what is placed otherwise is brought to where it is.

    Example:
        >>> local(torch.zeros(2), like=torch.ones(2))
        tensor([0., 0.])
    """
    if not isinstance(tensor, distributed_tensor()):
        return tensor
    if tensor.placements != like.placements:
        tensor = tensor.redistribute(placements=like.placements)
    return tensor.to_local()


class Counted:
    """Which parameters count on this rank: of several replicas of a part, the first one.

    Args:
        optimizer: The optimizer.
        module: What it trains, as it is wrapped; FSDP1 needs it, for others it may be None.

    Example:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> Counted(torch.optim.Adam([weight]), None).counts(weight)
        True
    """

    def __init__(self, optimizer: Optimizer, module: nn.Module | None) -> None:
        self._optimizer = optimizer
        self._state = (
            unwrap_optimizer(optimizer).state
            if unwrap_optimizer(optimizer) is not optimizer
            else None
        )
        self._ranks = [0]
        if self._state is not None:
            self._ranks = dist.get_process_group_ranks(optimizer.process_group)  # type: ignore[attr-defined]
        self._module = module

    def counts(self, parameter: Tensor) -> bool:
        """Whether this rank's part of a parameter counts; called right after a step.

        Raises:
            ConfigError: If FSDP1 holds it, and not in the module.
        """
        if not self._is_sharded:
            return True
        if self._state is not None:
            # Rank 0 stands for the first of several groups of ranks that shard alike.
            return parameter in self._state and 0 in self._ranks
        if isinstance(parameter, distributed_tensor()):
            return _is_first(parameter)
        if is_flat(parameter):
            return self._is_first_flat(parameter)
        return dist.get_rank() == 0

    def _is_first_flat(self, parameter: Tensor) -> bool:
        if id(parameter) not in self._flat:
            given = "None" if self._module is None else type(self._module).__name__
            raise ConfigError(
                f"AdamStatistics: module={given} is not the module that FSDP1 wrapped, with"
                " use_orig_params=True",
                "Use AdamStatistics(module=wrapped)",
            )
        return self._flat[id(parameter)]

    @cached_property
    def _is_sharded(self) -> bool:
        # Asked where a parameter is looked at for the first time, not at every measurement.
        return is_sharded(self._optimizer)

    @cached_property
    def _flat(self) -> dict[int, bool]:
        return flat_replicas(self._module)


def _is_first(parameter: Any) -> bool:
    """Whether a DTensor's local part is the first of its replicas."""
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    # A mesh of some ranks has replicas beside it; the first holds rank 0.
    return (
        coordinate is not None
        and bool((mesh.mesh == 0).any())
        and all(
            position == 0
            for position, placement in zip(coordinate, parameter.placements, strict=True)
            if placement.is_replicate()
        )
    )


class LocalStats(NamedTuple):
    """The columns of each parameter, of one rank or of all."""

    sums: Tensor
    """`[parameters, columns]`"""
    maxima: Tensor
    """`[parameters, columns]`"""
    exponents: Tensor
    """`[groups, quantities, bins]`"""
    status: Tensor
    """See `rank_status`; the largest number of any rank counts."""


def all_reduce_stats(stats: LocalStats, device: torch.device) -> LocalStats:
    """Combines the columns of all ranks in two collectives; every rank calls this.

    Args:
        stats: This rank's, of the same shapes on all ranks.
        device: The device of the parameters.
    """
    device = collective_device(device)
    sums, maxima, exponents, status = (each.to(device, non_blocking=True) for each in stats)
    # The largest value of NaN and a number is not NaN in every backend; the sum is.
    is_nan = maxima.isnan()
    numbers = maxima.masked_fill(is_nan, -torch.inf)
    added = _joined([sums, exponents, is_nan])
    largest = _joined([numbers, status])
    dist.all_reduce(added, dist.ReduceOp.SUM)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    sums, exponents, is_nan = _parted(added, [sums, exponents, is_nan])
    numbers, status = _parted(largest, [numbers, status])
    maxima = numbers.masked_fill(is_nan > 0, torch.nan)
    return LocalStats(sums, maxima, exponents.to(torch.int64), status)


def this_rank() -> int:
    """This process's rank; 0 if it is the only one.

    Example:
        >>> this_rank()
        0
    """
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def largest_over_ranks(numbers: list[float], device: torch.device) -> list[float]:
    """The largest of all ranks' numbers; every rank calls this, with as many.

    Args:
        numbers: This rank's.
        device: That of the parameters.
    """
    largest = torch.tensor(numbers, dtype=torch.float64, device=collective_device(device))
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return [float(each) for each in largest]


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    """In float64, which counts up to 2⁵³."""
    return torch.cat([each.flatten().to(torch.float64) for each in tensors])


def _parted(joined: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = torch.split(joined, [each.numel() for each in like])
    return [part.view(each.shape) for part, each in zip(parts, like, strict=True)]


def _placed(parameter: Any) -> Iterable[Any]:
    return parameter.placements if isinstance(parameter, distributed_tensor()) else ()


def _loaded(module: str, name: str) -> tuple[Any, ...]:
    """A class, where anything has loaded it: elsewhere nothing is of it."""
    found = getattr(sys.modules.get(module), name, None)
    return () if found is None else (found,)
