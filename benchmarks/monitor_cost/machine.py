"""What the numbers were taken with."""

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def machine(device: str) -> str:
    """The device, the processor and the versions, in a line."""
    packages = ["torch", "numba", "triton", "lightning", "wandb", "numpy"]
    versions = [f"{name} {found}" for name in packages if (found := installed(name))]
    parts = [
        *([torch.cuda.get_device_name()] if device == "cuda" else []),
        f"{processor()}, cores: {os.cpu_count()}, threads of torch: {torch.get_num_threads()}",
        *versions,
        f"Python {platform.python_version()}",
    ]
    return "; ".join(parts)


def processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
