"""What one call takes: its time, the memory that it adds, and the kernels that it starts."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import torch

Work = Callable[[], object]


def seconds(work: Work, device: str) -> float:
    """What one call takes, until the device is done."""
    if device == "cuda":
        begin, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def extra_mb(work: Work, device: str) -> float | None:
    """How far one call makes the peak of memory rise, in 10^6 bytes."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        # Else what earlier calls have freed would be taken from there, and cost nothing.
        ctypes.CDLL(None).malloc_trim(0)
        # 5 sets the peak back to what is in use (Linux, proc_pid_clear_refs).
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_bytes()
        work()
        return (peak_bytes() - before) / 1e6
    except (OSError, AttributeError):
        return None


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def launches(work: Work) -> int:
    """How many kernels one call starts."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    return sum(each.count for each in profile.key_averages() if "LaunchKernel" in each.key)
