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


def host_ms(work: Work) -> float:
    """The milliseconds until the host has started what one call does on the device."""
    taken = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        taken.append(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return min(taken)


def on_device(work: Work) -> tuple[int, float]:
    """How many kernels one call starts, and the milliseconds that they take."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    found = profile.key_averages()
    launches = sum(each.count for each in found if "LaunchKernel" in each.key)
    return launches, sum(each.self_device_time_total for each in found) / 1e3
