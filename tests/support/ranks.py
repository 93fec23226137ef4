"""Several processes of one training, as torchrun would start them, which may not wait forever."""

import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.support import forkserver

FOLDER = "RANKS_FOLDER"


def launch(module: str, world: int, folder: Path, *arguments: str, limit: float = 300) -> list[Any]:
    """What each rank has kept of `python -m module ...`; a rank that hangs fails the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests",
        "OMP_NUM_THREADS": "1",
        FOLDER: str(folder),
    }
    processes = []
    for rank in range(world):
        environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        said = folder / f"rank_{rank}.txt"
        processes.append(forkserver.start(module, arguments, folder, environment, said))
    deadline = time.monotonic() + limit
    for each in processes:
        each.join(max(deadline - time.monotonic(), 0))
    codes = [each.exitcode for each in processes]
    for each in processes:
        each.kill()
        each.join()
    assert None not in codes, f"some rank hangs\n{_said(folder, world)}"
    assert not any(codes), _said(folder, world)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(world)]


def _said(folder: Path, world: int) -> str:
    texts = [(folder / f"rank_{rank}.txt").read_text()[-6000:] for rank in range(world)]
    return "\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(texts))


def keep(results: Mapping[str, Any]) -> None:
    """What `launch` returns of this rank."""
    folder = Path(os.environ[FOLDER])
    torch.save(dict(results), folder / f"rank_{os.environ['RANK']}.pt")


def folder() -> Path:
    """Where all ranks can write."""
    return Path(os.environ[FOLDER])


class Collectives:
    """Counts the reductions of this process."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "Collectives":
        self._original: Callable[..., Any] = torch.distributed.all_reduce

        def counted(*arguments: Any, **keywords: Any) -> Any:
            self.count += 1
            return self._original(*arguments, **keywords)

        torch.distributed.all_reduce = counted
        return self

    def __exit__(self, *_: object) -> None:
        torch.distributed.all_reduce = self._original
