"""Private names of torch, seen in 2.13.0."""

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
"""The attributes of torch.compile, FSDP1, and activation checkpointing and offloading."""
WRAPPERS = (DistributedDataParallel, DataParallel, AveragedModel, QuantWrapper)
"""The classes that hold what they wrap in an attribute `module`, which may also be a user's."""


def let_unscale(optimizer: Optimizer, itself: bool) -> None:
    """Whether a GradScaler leaves unscaling and skipping to the (fused) step of the optimizer.

    Otherwise it does with it as with any other: unscales, lets clip, looks for inf, and steps.
    """
    optimizer._step_supports_amp_scaling = itself  # type: ignore[attr-defined]


def unscales_itself(optimizer: Optimizer) -> bool:
    """Returns whether a GradScaler leaves unscaling to the (fused) step of the optimizer."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def loss_scale(scaler: Any) -> Tensor | None:
    """Returns the scale of a GradScaler, on its device, without waiting for it.

    Args:
        scaler: The GradScaler, or None.

    Returns:
        A copy, as the scaler changes its own in place; None without a scaler, and before its first
        use.
    """
    scale = getattr(scaler, "_scale", None)
    return None if scale is None else scale.detach().clone()


def collective_device(device: torch.device) -> torch.device:
    """The device itself, if the ranks can reduce what is on it; else one where they can."""
    types = [each.type for each in dist.distributed_c10d._get_default_group()._device_types]
    if device.type in types:
        return device
    if types[0] == "cpu":
        return torch.device("cpu")
    return torch.device(types[0], torch.accelerator.current_device_index())


def is_flat(parameter: Tensor) -> bool:
    """Whether FSDP1 has made a parameter a part of a flat one."""
    return getattr(parameter, "_fsdp_flattened", False)


def is_flattened(parameter: Tensor) -> bool:
    """Whether it is one of FSDP1's flat parameters itself, as without `use_orig_params`."""
    return is_flat(parameter) and hasattr(parameter, "_fqns")


def flat_replicas(module: nn.Module | None) -> dict[int, bool]:
    """By the ids of FSDP1's original parameters, whether this rank's part is the first replica."""
    replicas: dict[int, bool] = {}
    for each, handle in _handles(module):
        # The ranks that hold the same part, under HYBRID_SHARD.
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
    """By the ids of FSDP1's original parameters, their shapes before they were sharded."""
    shapes: dict[int, torch.Size] = {}
    for _, handle in _handles(module):
        flat = handle.flat_param
        # None without use_orig_params.
        shapes |= zip(map(id, flat._params or ()), flat._shapes, strict=False)
    return shapes


def _handles(module: nn.Module | None) -> Iterator[tuple[nn.Module, Any]]:
    """FSDP1's wrappers, and what holds the flat parameter of each."""
    for each in () if module is None else module.modules():
        handle: Any = getattr(each, "_handle", None)
        if handle is not None and hasattr(handle, "flat_param"):
            yield each, handle


def shared_store() -> Any:
    """What all processes of a training write to without waiting for each other.

    None if there is one process, or if MPI has started them.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.distributed_c10d._get_default_store()


def is_torchscript(path: Path) -> bool:
    """Returns whether `torch.load` would hand a zip file on to `torch.jit.load`, which runs it."""
    return "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records()


def storage_view(
    storage: Any, dtype: torch.dtype, offset: int, size: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """Returns a tensor over a part of a storage, which is never enlarged.

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
