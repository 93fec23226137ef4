"""`Failsafe`: an internal error disables the monitor on all ranks, and never stops training."""

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
"""Numbers the runs; all ranks count the same runs."""


class State(Enum):
    """State of the monitor."""

    OFF = "off"
    """Outside of a run."""
    ACTIVE = "active"
    """Measures and logs."""
    DISABLED = "disabled"
    """Has failed on some rank. It only takes part in the collectives of the ranks that do not know
    about the error yet."""


class Failsafe:
    """Runs the monitor's code; on an internal error it warns once and disables the monitor.

    The rank that fails first warns with the traceback. The other ranks are notified by the next
    measurement in which all ranks take part, or by the store that they share.

    Args:
        on_disable: Called once when the monitor is disabled.

    Example:
        >>> failsafe = Failsafe(lambda: None)
        >>> failsafe.start()
        >>> with warnings.catch_warnings(record=True):
        ...     with failsafe.guard():
        ...         raise ZeroDivisionError
        >>> failsafe.state.value
        'disabled'
    """

    def __init__(self, on_disable: Callable[[], None]) -> None:
        self._on_disable = on_disable
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

    def stop_contacting_ranks(self) -> None:
        """Stops communicating with the other ranks, which may have exited."""
        self._key = ""

    def stop(self) -> None:
        """Ends the run."""
        self.state = State.OFF

    def call(self, hook: Callable[[], None]) -> None:
        """Calls a function. Faster than `guard`, which matters at steps that are not measured."""
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

    def disable(self, failed_rank: int) -> None:
        """Disables the monitor because of an error on another rank."""
        if self.is_active and this_rank() == 0:
            warn_only(
                f"AdamMonitor failed on rank {failed_rank}, which prints the error. It is disabled"
                " for the rest of the run; training continues."
            )
        self._disable()

    def check_other_ranks(self) -> None:
        """Disables the monitor if it has failed on another rank."""
        store = shared_store() if self._key and self.is_active else None
        if store is not None and store.check([self._key]):
            self.disable(int(store.get(self._key)))

    def _fail(self) -> None:
        is_known = self.state is State.DISABLED
        self._disable()
        if is_known:
            return
        self.has_failed = True
        if self._first_failed_rank() == this_rank():
            warn_only(
                "AdamMonitor failed. It is disabled for the rest of the run; training continues.\n"
                f"{traceback.format_exc()}"
            )

    def _disable(self) -> None:
        if self.is_active:
            self.state = State.DISABLED
            self._on_disable()

    def _first_failed_rank(self) -> int:
        own = this_rank()
        # The process of the store may have exited.
        with suppress(RuntimeError):
            store = shared_store() if self._key else None
            return own if store is None else int(store.compare_set(self._key, "", str(own)))
        return own


def warn_only(message: str) -> None:
    """Warns, or logs the message if a filter turns warnings into errors.

    Example:
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error")
        ...     warn_only("does not raise")
    """
    try:
        warnings.warn(message, stacklevel=3)
    except Warning:
        logging.getLogger(__name__).warning(message)
