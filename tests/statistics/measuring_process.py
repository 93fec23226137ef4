"""Prints the memory and threads that a measurement uses, as JSON.

`test_process.py` reads it.
"""

import ctypes
import json
import os
import re
import resource
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset

from lightning_adam import AdamStatistics
from tests.statistics.cases import KERNELS, stepped

SCOPES = ["model", "group", "layer", "tensor"]


def optimizer_of(rows: int, is_contiguous: bool = True) -> AdamW:
    """An optimizer after a step; each of its five tensors has `rows` times 4 kilobytes."""
    weight = nn.Parameter(torch.randn(rows, 1000))
    if not is_contiguous:
        weight = nn.Parameter(weight.detach().t())
    weight.grad = torch.randn(weight.shape)
    adam = AdamW([weight], weight_decay=0.1, amsgrad=True, fused=True)
    adam.step()
    return adam


def measure(optimizer: AdamW, kernel: str) -> None:
    metric = AdamStatistics("all", SCOPES, kernel=kernel)
    metric.update(optimizer, histograms=True)
    metric.compute()


def copy_of_parameter(optimizer: AdamW) -> Tensor:
    parameter: Tensor = optimizer.param_groups[0]["params"][0]
    return parameter.detach().clone()


def peak_megabytes(work: Callable[[AdamW], object], small: AdamW, large: AdamW) -> float:
    """By how much work on a large optimizer raises the peak of the memory, in a fork's own count.

    The work is done on a small one first, for the fork maps no file that it has not read.
    """

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    # Memory that was freed but not returned would hide new allocations.
    ctypes.CDLL(None).malloc_trim(0)
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            work(small)
            before = peak()
            work(large)
            os.write(writing, str(peak() - before).encode())
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.waitpid(process, 0)
    return float(os.read(reading, 100))


def temporaries() -> dict[str, float]:
    """Returns the peak of each kernel, and that of a copy to verify the method."""
    small = optimizer_of(70)
    peaks: dict[str, float] = {}
    for is_contiguous in (True, False):
        large = optimizer_of(9_000, is_contiguous)
        layout = "contiguous" if is_contiguous else "transposed"
        for kernel in KERNELS:
            work = partial(measure, kernel=kernel)
            work(small)
            peaks[f"{kernel}, {layout}"] = peak_megabytes(work, small, large)
    peaks["copy"] = peak_megabytes(copy_of_parameter, small, large)
    return peaks


def values(elements: int = 2_000_000) -> Tensor:
    """Measures more elements than one thread takes with the compiled kernel."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(elements))
    statistics = AdamStatistics("all", kernel="numba")
    statistics.update(stepped([weight], steps=1, decoupled=True), histograms=True)
    return torch.tensor(list(statistics.compute().values()))


class Measurements(Dataset[Tensor]):
    """Measures in the worker that loads an item."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        # torch hangs in a fork with more than one thread.
        torch.get_num_threads = lambda: 3
        return values()


def openmp_runtimes() -> set[str]:
    return set(re.findall(r"/\S*lib[gi]?omp\S*", Path("/proc/self/maps").read_text()))


def threads() -> dict[str, Any]:
    """Returns the OpenMP runtimes after a measurement, and measurements in forked workers."""
    torch.set_num_threads(3)
    torch.randn(100_000).sum()
    before = openmp_runtimes()
    here = values()
    loaded = openmp_runtimes() - before
    workers = DataLoader(
        Measurements(), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    same = [torch.allclose(there, here, equal_nan=True) for there in workers]
    return {"loaded": sorted(loaded), "workers": same}


def assembly() -> list[str]:
    """Returns the machine code of the loops for two dtypes and both kinds of decay."""
    from lightning_adam.statistics.kernels.numba_loops import add_items, count_items

    for dtype in (torch.float32, torch.bfloat16):
        for decoupled in (True, False):
            weight = nn.Parameter(torch.randn(2000).to(dtype))
            adam = stepped([weight], decoupled=decoupled, weight_decay=0.1, fused=True)
            AdamStatistics("all", kernel="numba").update(adam, histograms=True)
    return [code for loop in (add_items, count_items) for code in loop.inspect_asm().values()]


CHECKS: dict[str, Callable[[], Any]] = {
    "temporaries": temporaries,
    "threads": threads,
    "assembly": assembly,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps({name: CHECKS[name]() for name in sys.argv[1:]}))
