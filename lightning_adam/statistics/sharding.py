"""Sharded parameters: unwraps optimizers, selects shards, and reduces statistics over ranks.

All ranks have the same parameters in the same groups. Each rank may hold a part of them: DTensors
(FSDP2, tensor parallelism), slices of a flat parameter (FSDP1), or some of the parameters
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

from lightning_adam._compat.torch import collective_device, flat_replicas, is_fsdp1_parameter
from lightning_adam.config.errors import ConfigError

ZERO = "torch.distributed.optim.zero_redundancy_optimizer"
WRAPPING = {"lightning", "pytorch_lightning", "lightning_fabric", "accelerate"}
"""Packages with optimizer wrappers that have the attribute `optimizer`."""


def unwrap_wrapper(optimizer: Any) -> Any:
    """Returns the torch optimizer in a wrapper of Lightning, Fabric or Accelerate.

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
    """Returns the optimizer that holds the state of this rank.

    Example:
        >>> adam = torch.optim.Adam([torch.zeros(2, requires_grad=True)])
        >>> unwrap_optimizer(adam) is adam
        True
    """
    is_zero = isinstance(optimizer, _imported_class(ZERO, "ZeroRedundancyOptimizer"))
    return optimizer.optim if is_zero else optimizer  # type: ignore[attr-defined]


def is_sharded(optimizer: Optimizer) -> bool:
    """Returns whether the parameters or the state are sharded. All ranks return the same value.

    Example:
        >>> is_sharded(torch.optim.Adam([torch.zeros(2, requires_grad=True)]))
        False
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    return unwrap_optimizer(optimizer) is not optimizer or any(
        is_fsdp1_parameter(parameter)
        or not all(placement.is_replicate() for placement in _placements(parameter))
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


def dtensor_types() -> tuple[Any, ...]:
    """Returns the class of DTensors for `isinstance`; empty if it is not imported.

    Example:
        >>> isinstance(torch.zeros(2), dtensor_types())
        False
    """
    return _imported_class("torch.distributed.tensor", "DTensor")


def to_local_shard(tensor: Any, like: Any) -> Any:
    """Returns this rank's shard of a tensor. All ranks of its mesh must call it.

    Args:
        tensor: A gradient or a state.
        like: The parameter; the tensor is redistributed to its placements.

    Example:
        >>> to_local_shard(torch.zeros(2), like=torch.ones(2))
        tensor([0., 0.])
    """
    if not isinstance(tensor, dtensor_types()):
        return tensor
    if tensor.placements != like.placements:
        tensor = tensor.redistribute(placements=like.placements)
    return tensor.to_local()


class ReplicaSelector:
    """Selects the first of several replicas of each shard, so that it is counted once.

    Args:
        optimizer: The optimizer.
        module: The wrapped module; only required by FSDP1.

    Example:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> ReplicaSelector(torch.optim.Adam([weight]), None).is_counted(weight)
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

    def is_counted(self, parameter: Tensor) -> bool:
        """Returns whether this rank's part of a parameter is counted. Call it right after a step.

        Raises:
            ConfigError: If it is a parameter of FSDP1 that is not in the module.
        """
        if not self._is_sharded:
            return True
        if self._state is not None:
            # With several process groups, the one of rank 0 is counted.
            return parameter in self._state and 0 in self._ranks
        if isinstance(parameter, dtensor_types()):
            return _is_first(parameter)
        if is_fsdp1_parameter(parameter):
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
        # Only computed when the layout has changed, not at every measurement.
        return is_sharded(self._optimizer)

    @cached_property
    def _flat(self) -> dict[int, bool]:
        return flat_replicas(self._module)


def _is_first(parameter: Any) -> bool:
    """Returns whether the local part of a DTensor is its first replica."""
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    # A mesh of some of the ranks may have replicas in other meshes; that with rank 0 is counted.
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
    """The columns of each parameter, on one rank or reduced over all ranks."""

    sums: Tensor
    """`[parameters, columns]`"""
    maxima: Tensor
    """`[parameters, columns]`"""
    exponents: Tensor
    """`[groups, quantities, bins]`"""
    status: Tensor
    """See `rank_status`."""


def all_reduce_stats(stats: LocalStats, device: torch.device) -> LocalStats:
    """Reduces the columns over ranks in two collectives. All ranks must call it.

    Args:
        stats: The columns of this rank, with the same shapes on all ranks.
        device: The device of the parameters.
    """
    device = collective_device(device)
    sums, maxima, exponents, status = (each.to(device, non_blocking=True) for each in stats)
    # The maximum of NaN and a number is a number in some backends, so NaN are counted in a sum.
    is_nan = maxima.isnan()
    numbers = maxima.masked_fill(is_nan, -torch.inf)
    summed = _concatenate([sums, exponents, is_nan])
    largest = _concatenate([numbers, status])
    dist.all_reduce(summed, dist.ReduceOp.SUM)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    sums, exponents, is_nan = _split_like(summed, [sums, exponents, is_nan])
    numbers, status = _split_like(largest, [numbers, status])
    maxima = numbers.masked_fill(is_nan > 0, torch.nan)
    return LocalStats(sums, maxima, exponents.to(torch.int64), status)


def this_rank() -> int:
    """Returns the rank of this process; 0 if there is only one process.

    Example:
        >>> this_rank()
        0
    """
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def largest_over_ranks(numbers: list[float], device: torch.device) -> list[float]:
    """Returns the maximum of each number over ranks. All ranks must call it with as many numbers.

    Args:
        numbers: The numbers of this rank.
        device: The device of the parameters.
    """
    largest = torch.tensor(numbers, dtype=torch.float64, device=collective_device(device))
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return [float(each) for each in largest]


def _concatenate(tensors: Iterable[Tensor]) -> Tensor:
    """Concatenates tensors in float64, which represents counts up to 2⁵³."""
    return torch.cat([each.flatten().to(torch.float64) for each in tensors])


def _split_like(joined: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = torch.split(joined, [each.numel() for each in like])
    return [part.view(each.shape) for part, each in zip(parts, like, strict=True)]


def _placements(parameter: Any) -> Iterable[Any]:
    return parameter.placements if isinstance(parameter, dtensor_types()) else ()


def _imported_class(module: str, name: str) -> tuple[Any, ...]:
    """Returns a class if its module is imported. Otherwise it has no instances."""
    found = getattr(sys.modules.get(module), name, None)
    return () if found is None else (found,)
