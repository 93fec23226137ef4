"""Failsafe: an internal error disables the monitor, on all ranks, and never stops training."""

import itertools
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum

from lightning_adam._compat.torch import shared_store
from lightning_adam.statistics.sharding import this_rank

_RUNS = itertools.count()
"""The same on all ranks, which fit the same runs."""


class State(Enum):
    """Whether the monitor works."""

    OFF = "off"
    """Not in a run."""
    ACTIVE = "active"
    """It measures and logs."""
    MUTED = "muted"
    """It has failed on some rank. It does nothing but take part in the collectives of the other
    ranks, which do not know yet."""


class Failsafe:
    """Runs the monitor's code; on an internal error it warns once and mutes the monitor.

    The states are off, active during a run, and muted from the first error to the end of the run.
    The rank that fails first warns with the traceback. The other ranks learn of it from a
    measurement in which all take part, or from the store that they share.

    Args:
        on_mute: Called when the monitor is muted.

    Example:
        >>> failsafe = Failsafe(lambda: None)
        >>> failsafe.start()
        >>> with warnings.catch_warnings(record=True):
        ...     with failsafe.guard():
        ...         raise ZeroDivisionError
        >>> failsafe.state.value
        'muted'
    """

    def __init__(self, on_mute: Callable[[], None]) -> None:
        self._on_mute = on_mute
        self.state = State.OFF
        self.has_failed = False
        """Whether an error has occurred on this rank."""
        self._key = ""

    @property
    def is_active(self) -> bool:
        """Whether the monitor measures and logs."""
        return self.state is State.ACTIVE

    def start(self) -> None:
        """Begins a run."""
        self.state, self.has_failed = State.ACTIVE, False
        self._key = f"lightning_adam/failed_rank/{next(_RUNS)}"

    def leave_ranks(self) -> None:
        """From here on asks nothing of the other ranks, which may be gone."""
        self._key = ""

    def stop(self) -> None:
        """Ends the run."""
        self.state = State.OFF

    def call(self, hook: Callable[[], None]) -> None:
        """Calls a function; `guard` takes longer than all else between two measurements."""
        try:
            hook()
        except Exception:
            self._fail()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Runs a block."""
        try:
            yield
        except Exception:
            self._fail()

    def mute(self, failed_rank: int) -> None:
        """Mutes the monitor because of an error on another rank."""
        if self.is_active and this_rank() == 0:
            warn_only(
                f"AdamMonitor failed on rank {failed_rank}, which prints the error. It is disabled"
                " for the rest of the run; training continues."
            )
        self._mute()

    def check_other_ranks(self) -> None:
        """Mutes the monitor if it has failed on another rank that measures by itself."""
        store = shared_store() if self._key and self.is_active else None
        if store is not None and store.check([self._key]):
            self.mute(int(store.get(self._key)))

    def _fail(self) -> None:
        is_known = self.state is State.MUTED
        self._mute()
        if is_known:
            return
        self.has_failed = True
        if self._first_failed_rank() == this_rank():
            warn_only(
                "AdamMonitor failed. It is disabled for the rest of the run; training continues.\n"
                f"{traceback.format_exc()}"
            )

    def _mute(self) -> None:
        if self.is_active:
            self.state = State.MUTED
            self._on_mute()

    def _first_failed_rank(self) -> int:
        own = this_rank()
        # The process with the store may be gone.
        with suppress(RuntimeError):
            store = shared_store() if self._key else None
            return own if store is None else int(store.compare_set(self._key, "", str(own)))
        return own


def warn_only(message: str) -> None:
    """Warns; logs the message instead where a filter turns warnings into errors.

    Example:
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error")
        ...     warn_only("does not raise")
    """
    try:
        warnings.warn(message, stacklevel=3)
    except Warning:
        logging.getLogger(__name__).warning(message)
