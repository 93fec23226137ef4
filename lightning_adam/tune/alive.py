"""Whether the process of a training lives: known at once here, by its beats on other machines."""

import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Protocol

SECONDS_BETWEEN_BEATS = 15.0
BEATS_MISSED = 6
"""After how many a process on another machine is taken for dead."""


def process_name() -> str:
    """This process, told apart from all others: host, number and a mark of its own.

    Example:
        >>> process_name() == process_name()
        False
    """
    return f"{socket.gethostname()}/{_identity(os.getpid())}/{uuid.uuid4().hex[:8]}"


class Beats(Protocol):
    """Where beats are written down: an `Archive`."""

    def beat(self, process: str, count: int) -> None:
        """Says that a process lives."""

    def beats(self) -> dict[str, int]:
        """What the processes have said last."""


class Heart:
    """Beats for a process, in a thread, as long as it lives.

    Args:
        archive: Where the beats are written.
        process: The name it is known by.

    Example:
        >>> import types
        >>> told = []
        >>> archive = types.SimpleNamespace(beat=lambda process, count: told.append(count))
        >>> with Heart(archive, "host/1/a"):
        ...     pass
        >>> told[0]
        0
    """

    def __init__(self, archive: Beats, process: str) -> None:
        self._archive = archive
        self._process = process
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True)

    def __enter__(self) -> "Heart":
        """Begins to beat."""
        self._archive.beat(self._process, 0)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops."""
        self._is_over.set()
        self._thread.join()

    def _go_on(self) -> None:
        count = 0
        while not self._is_over.wait(SECONDS_BETWEEN_BEATS):
            count += 1
            try:
                self._archive.beat(self._process, count)
            except Exception:
                # A database that is away for a moment is no reason to die.
                continue


class Observer:
    """Tells the living from the dead.

    Args:
        archive: Where the beats are read.

    Example:
        >>> import types
        >>> observer = Observer(types.SimpleNamespace(beats=dict))
        >>> observer.is_alive(process_name())
        True
    """

    def __init__(self, archive: Beats) -> None:
        self._archive = archive
        self._seen: dict[str, tuple[int, float]] = {}

    def is_alive(self, process: str) -> bool:
        """Whether a process lives; one of another machine does until it misses its beats."""
        host, number, _ = process.split("/")
        if host == socket.gethostname():
            return _runs(number)
        now, count = time.monotonic(), self._archive.beats().get(process, -1)
        seen = self._seen.get(process)
        if seen is None or seen[0] != count:
            self._seen[process] = seen = (count, now)
        return now - seen[1] < BEATS_MISSED * SECONDS_BETWEEN_BEATS


def _runs(identity: str) -> bool:
    number = int(identity.partition(".")[0])
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return identity == _identity(number)


def _identity(number: int) -> str:
    """The process's number and when it began; numbers are given again, after a restart above all.

    One that was killed, and that its parent has not asked about yet, is none.
    """
    try:
        state, *others = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return f"{number}.0"
    return "" if state == "Z" else f"{number}.{others[18]}"
