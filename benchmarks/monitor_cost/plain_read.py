"""A plain read of all that a measurement has to look at: none goes below it."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.monitor_cost.timing import Work


def plain_read(optimizer: torch.optim.Optimizer) -> Work:
    """Reads p, g, m and v of every tensor once, and nothing else: what no measurement goes below.

    On the CPU a loop in numba adds them up in float32, in vectors, the memory shared out evenly
    over torch's number of threads. One call reads all tensors, at addresses found beforehand:
    torch's own reductions are as fast on large tensors, but with thousands of small ones most of
    their time goes into the calls. On CUDA torch's norms of a list of tensors come closest.
    """
    tensors = [tensor for four in read_tensors(optimizer) for tensor in four]
    if tensors[0].is_cuda:
        return lambda: torch._foreach_norm(tensors)
    add_up = compiled_read()
    piece = 1 << 16
    pieces = np.array(
        [
            (tensor.data_ptr() + 4 * begin, min(piece, tensor.numel() - begin))
            for tensor in tensors
            for begin in range(0, tensor.numel(), piece)
        ],
        dtype=np.int64,
    )
    threads = torch.get_num_threads()
    behind = np.cumsum(pieces[:, 1])
    shares = np.split(pieces, np.searchsorted(behind, behind[-1] * np.arange(1, threads) / threads))
    others = ThreadPoolExecutor(max(1, threads - 1))

    def read() -> float:
        waited = [others.submit(add_up, share) for share in shares[1:]]
        return float(add_up(shares[0]) + sum(each.result() for each in waited))

    return read


def compiled_read() -> Callable[[np.ndarray[Any, Any]], float]:
    """The sum of pieces of memory, given by address and number of float32."""
    numba: Any = import_module("numba")
    void_pointer = import_module("numba.core.cgutils").voidptr_t

    def pointer(_: Any, address: Any) -> Any:
        def generate(_: Any, builder: Any, __: Any, values: Any) -> Any:
            return builder.inttoptr(values[0], void_pointer)

        return numba.types.voidptr(address), generate

    as_pointer: Any = import_module("numba.extending").intrinsic(pointer)

    def add_up(pieces: Any) -> Any:
        total = np.float32(0)
        for index in range(len(pieces)):
            address, elements = pieces[index]
            for value in numba.carray(as_pointer(address), elements, np.float32):
                total += value
        return total

    # Without leave to reorder the additions they would wait for each other.
    return numba.njit(add_up, nogil=True, fastmath={"reassoc"})  # type: ignore[no-any-return]


def read_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, ...]]:
    """p, g, m and v of each parameter."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            yield parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"]
