"""The rows that the host and the Triton kernels share, and the dtypes that they read."""

from collections import namedtuple
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lightning_adam.statistics.columns import COLUMNS, HYPERPARAMETERS

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
    raise ImportError(f"triton {triton.__version__} does not compile this kernel; 3.6 does")

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""The dtypes that a kernel reads, by code."""
KINDS = tl.constexpr(len(DTYPE_CODES))
DTYPES = tl.constexpr((tl.float32, tl.bfloat16, tl.float16, tl.float64))
SMALLEST_NORMAL = tl.constexpr(tuple(torch.finfo(each).tiny for each in DTYPE_CODES))
FLOAT32, FLOAT64 = (tl.constexpr(DTYPE_CODES[each]) for each in (torch.float32, torch.float64))
MIXED = tl.constexpr(-1)
"""In place of a code where tensors differ: each has its own in its row."""
BY_VALUE = tl.constexpr(-1)
"""In place of a code for a scalar of the host: its word is no address, but its bits in float64."""


class TensorRow(NamedTuple):
    """A tensor's addresses, dtypes and place; letters are the catalogue's.

    The table holds all but `g`, which changes at each step.
    """

    g: Any
    p: Any
    m: Any
    v: Any
    v_max: Any
    """0 without amsgrad."""
    p_code: Any
    g_code: Any
    m_code: Any
    v_code: Any
    step_code: Any
    elements: Any
    first_chunk: Any
    group: Any
    """Index of its hyperparameters."""
    position: Any
    """Index of its row in the result."""


class SettingsRow(NamedTuple):
    """A tensor's hyperparameters and what follows from them, in float64."""

    lr: Any
    beta1: Any
    beta2: Any
    eps: Any
    weight_decay: Any
    is_decoupled: Any
    sign: Any
    """-1 with maximize, else 1."""
    step: Any
    scale1: Any
    """What makes m̂ of m."""
    scale2: Any
    """What makes √v̂ of √v."""


def _named(name: str, fields: Iterable[str]) -> Any:
    return namedtuple(name, list(fields))


_OF_ELEMENTS = [name for name in COLUMNS if name not in ("elements", *HYPERPARAMETERS)]
ElementColumns = _named("ElementColumns", [*_OF_ELEMENTS, "weight_max_abs"])
"""What is computed of elements: sums, then maxima, of which the last is no column."""
PLACES = ("elements", *ElementColumns._fields, "needs_redo", *SettingsRow._fields)
"""A chunk's row, and after it a tensor's settings."""

TABLE_FIELDS = tl.constexpr(len(TensorRow._fields) - 1)
GROUP = tl.constexpr(TensorRow._fields.index("group") - 1)
STEP_CODE = tl.constexpr(TensorRow._fields.index("step_code") - 1)
SETTINGS = tl.constexpr(len(SettingsRow._fields))
SENT = tl.constexpr(SettingsRow._fields.index("step"))
"""How many fields of `SettingsRow` the host sends for a group, as words and then their codes."""
SUMS = tl.constexpr(sum(not COLUMNS[name].is_maximum for name in _OF_ELEMENTS))
REDO = tl.constexpr(PLACES.index("needs_redo"))
WIDTH = tl.constexpr(PLACES.index("needs_redo") + 1)
"""Of a chunk's row."""
