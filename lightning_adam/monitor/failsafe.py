"""Warnings that never stop training."""

import logging
import warnings


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
