"""Persistent processes of a distributed run, which all tests share.

A test sends a function of its module; the ranks import the module, call the function, and send back
what it returns.
"""

import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only

from tests.support import forkserver

LIMIT = 240.0
"""Seconds after which a call fails; then the ranks are restarted."""


class Ranks:
    """A group of processes with the variables that torchrun would set.

    Args:
        world: The number of ranks.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._output = Path(tempfile.mkdtemp(prefix="ranks-"))

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Calls a function on all ranks, in the folder that this process is in.

        Args:
            function: A function of a module's top level.
            *arguments: Its arguments.

        Returns:
            The result of each rank.

        Raises:
            AssertionError: If a rank fails, ends or takes too long.
        """
        if not self._processes:
            self._start()
        request = (function.__module__, function.__qualname__, arguments, os.getcwd())
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps(request))
        results: dict[Connection, Any] = {}
        deadline = time.monotonic() + LIMIT
        while waiting := [pipe for pipe in self._pipes if pipe not in results]:
            ready: list[Any] = wait(waiting, max(deadline - time.monotonic(), 0))
            if not ready:
                self._fail(waiting[0], "hangs")
            for pipe in ready:
                try:
                    is_error, results[pipe] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    is_error, results[pipe] = True, "has ended"
                if is_error:
                    # The other ranks may wait for it.
                    self._fail(pipe, results[pipe])
        return [results[pipe] for pipe in self._pipes]

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = forkserver.context()
        for rank in range(self.world):
            variables = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(self.world),
                "LOCAL_WORLD_SIZE": str(self.world),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "GROUP_RANK": "0",
                "TORCHELASTIC_RUN_ID": "tests",
                "OMP_NUM_THREADS": "1",
            }
            ours, theirs = context.Pipe()
            given = (theirs, {**os.environ, **variables}, str(self._output / f"{rank}.txt"))
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _fail(self, pipe: Any, reason: str) -> NoReturn:
        texts = [path.read_text()[-6000:] for path in sorted(self._output.glob("*.txt"))]
        printed = [f"--- rank {rank} printed\n{text}" for rank, text in enumerate(texts)]
        failure = "\n".join([f"rank {self._pipes.index(pipe)}: {reason}", *printed])
        self.close()
        raise AssertionError(failure)


def _serve(pipe: Connection, variables: dict[str, str], output: str) -> None:
    """Answers calls until the other end of the pipe is closed."""
    os.environ.clear()
    os.environ.update(variables)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # Lightning reads it from the environment when it is imported.
    rank_zero_only.rank = int(variables["RANK"])  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
    while True:
        try:
            module, name, arguments, folder = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        os.chdir(folder)
        torch.manual_seed(0)
        answer: tuple[bool, Any]
        try:
            __import__(module)
            answer = False, getattr(sys.modules[module], name)(*arguments)
        except BaseException:
            answer = True, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))


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
