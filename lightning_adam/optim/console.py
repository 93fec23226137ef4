"""Console output about a run, through the logger `lightning_adam`."""

import logging
import sys
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

COLUMNS = ("lr", "betas", "eps", "weight_decay")
"""The settings that `group_table` shows, if the optimizer has them."""


class _Console(logging.Handler):
    """Prints to stderr while the root logger has no handler, like Lightning's logger."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            print(self.format(record), file=sys.stderr)  # noqa: T201


_LOGGER = logging.getLogger("lightning_adam")
_LOGGER.addHandler(_Console())
if _LOGGER.level == logging.NOTSET:
    _LOGGER.setLevel(logging.INFO)


@rank_zero_only
def log_info(message: str) -> None:
    """Logs a message at INFO, on rank 0."""
    _LOGGER.info(message)


@rank_zero_only
def log_warning(message: str) -> None:
    """Logs a message at WARNING, on rank 0.

    Example:
        >>> log_warning("a warning")
    """
    _LOGGER.warning(message)


def group_table(optimizer: Optimizer) -> str:
    """Formats the parameter groups of an optimizer as a table.

    Args:
        optimizer: An optimizer whose groups have a `name` and `param_names`.

    Example:
        >>> import torch
        >>> weight = torch.zeros(3, 4)
        >>> group = {"params": [weight], "name": "decay", "param_names": ["weight"]}
        >>> print(group_table(torch.optim.AdamW([group])))
        group  tensors  parameters  lr     betas         eps    weight_decay  names
        decay  1        12          0.001  (0.9, 0.999)  1e-08  0.01          weight
    """
    columns = [name for name in COLUMNS if name in optimizer.defaults]
    rows = [["group", "tensors", "parameters", *columns, "names"]]
    for group in optimizer.param_groups:
        names = group["param_names"]
        rows.append(
            [
                group["name"],
                str(len(names)),
                f"{sum(parameter.numel() for parameter in group['params']):,}",
                *(_cell(group[column]) for column in columns),
                ", ".join(names[:2]) + (", …" if len(names) > 2 else ""),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_cell, value))})"
    if isinstance(value, Tensor):
        value = value.item()
    return f"{value:g}" if isinstance(value, int | float) else str(value)
