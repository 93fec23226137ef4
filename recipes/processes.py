"""What a config can ask about the processes of a job, however they were started."""

import math
import os
from collections.abc import Callable
from datetime import datetime
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf
from torch import distributed


def started() -> str:
    """A name for the job that all its processes give, on all nodes, before they know each other."""
    now = f"{datetime.now():%Y-%m-%d/%H-%M-%S}"
    if "SLURM_STEP_ID" in os.environ:
        return f"slurm/{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    if distributed.is_torchelastic_launched():
        # torchrun's own store, where the first one to come sets the time.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(address, port, is_master=False)  # type: ignore[attr-defined]
        return str(store.compare_set("recipes/started", "", now), "utf-8")
    # Lightning hands the folder on to the processes that it starts.
    return now


def register_resolvers() -> None:
    """Makes `${started:}`, `${of_first_process:...}` and `${product:...}` known to configs."""
    resolvers: dict[str, Callable[..., Any]] = {
        "started": started,
        "of_first_process": lambda value: None if getattr(rank_zero_only, "rank", 0) else value,
        "product": lambda *factors: math.prod(factors),
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True, use_cache=name == "started")
