"""Private names of torch, as of 2.13.0."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.ao.quantization import QuantWrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Attributes in which torch.compile, FSDP1 and activation checkpointing keep what they wrap."""
WRAPPERS = (DistributedDataParallel, DataParallel, AveragedModel, QuantWrapper)
"""Classes that keep what they wrap in `module`, an attribute that users' modules may have too."""


def configure_amp_unscaling(optimizer: Optimizer, by_optimizer: bool) -> None:
    """Sets whether a (fused) optimizer unscales gradients and skips steps in its own step.

    Otherwise the GradScaler unscales before the step, so that hooks see and clip true gradients.
    """
    optimizer._step_supports_amp_scaling = by_optimizer  # type: ignore[attr-defined]


def unscales_itself(optimizer: Optimizer) -> bool:
    """Returns whether a GradScaler leaves unscaling to the (fused) step of the optimizer."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def loss_scale(scaler: Any) -> Tensor | None:
    """Returns the scale of a GradScaler on its device, without synchronizing.

    Args:
        scaler: The GradScaler, or None.

    Returns:
        A copy, because the scaler changes its scale in place; None without a scaler, and before
        its first use.
    """
    scale = getattr(scaler, "_scale", None)
    return None if scale is None else scale.detach().clone()


def collective_device(device: torch.device) -> torch.device:
    """Returns a device on which the process group can reduce tensors, preferably `device`."""
    types = [each.type for each in dist.distributed_c10d._get_default_group()._device_types]
    if device.type in types:
        return device
    if types[0] == "cpu":
        return torch.device("cpu")
    return torch.device(types[0], torch.accelerator.current_device_index())


def is_fsdp1_parameter(parameter: Tensor) -> bool:
    """Returns whether FSDP1 manages a parameter: a flat one, or an original one of its parts."""
    return getattr(parameter, "_fsdp_flattened", False)


def is_flat_parameter(parameter: Tensor) -> bool:
    """Returns whether a parameter is a flat one of FSDP1 with `use_orig_params=False`."""
    return is_fsdp1_parameter(parameter) and hasattr(parameter, "_fqns")


def flat_replicas(module: nn.Module | None) -> dict[int, bool]:
    """Returns whether this rank has the first replica of original FSDP1 parameters, by id."""
    replicas: dict[int, bool] = {}
    for each, handle in _handles(module):
        # The ranks that hold the same shard, under HYBRID_SHARD.
        group = getattr(each, "_inter_node_pg", None)
        if not handle.uses_sharded_strategy:
            is_first = dist.get_rank() == 0
        elif group is not None:
            is_first = dist.get_rank(group) == 0
        else:
            is_first = 0 in dist.get_process_group_ranks(handle.process_group)
        # None without use_orig_params.
        replicas |= {id(parameter): is_first for parameter in handle.flat_param._params or ()}
    return replicas


def flat_shapes(module: nn.Module | None) -> dict[int, torch.Size]:
    """Returns the unsharded shapes of original FSDP1 parameters, by id."""
    shapes: dict[int, torch.Size] = {}
    for _, handle in _handles(module):
        flat = handle.flat_param
        # None without use_orig_params.
        shapes |= zip(map(id, flat._params or ()), flat._shapes, strict=False)
    return shapes


def _handles(module: nn.Module | None) -> Iterator[tuple[nn.Module, Any]]:
    """Yields FSDP1's wrappers and their handles, which have the flat parameters."""
    for each in () if module is None else module.modules():
        handle: Any = getattr(each, "_handle", None)
        if handle is not None and hasattr(handle, "flat_param"):
            yield each, handle


def shared_store() -> Any:
    """Returns the key-value store of the run's processes, which needs no synchronization.

    Returns:
        None for a single process, and for processes that MPI started.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.distributed_c10d._get_default_store()


def is_torchscript(path: Path) -> bool:
    """Returns whether `torch.load` passes a zip file to `torch.jit.load`, which runs its code."""
    return "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records()


def storage_view(
    storage: Any, dtype: torch.dtype, offset: int, size: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """Returns a tensor that views a part of a storage, and never enlarges the storage.

    Args:
        storage: A TypedStorage.
        dtype: The dtype of the tensor.
        offset: Index of its first element.
        size: Its shape.
        stride: Its strides.

    Raises:
        RuntimeError: If the storage ends before the tensor does.
    """
    whole = torch.empty(0, dtype=dtype, device="cpu").set_(storage._untyped_storage)
    return whole.as_strided(size, stride, offset)
