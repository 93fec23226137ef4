"""The layout of rows shared by the host and the Triton kernels, and the supported dtypes."""

from collections import namedtuple
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lightning_adam.statistics.columns import COLUMNS, HYPERPARAMETERS

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
    raise ImportError(
        f"triton {triton.__version__} cannot compile this kernel. Install triton>=3.6"
    )

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""The codes of supported dtypes."""
KINDS = tl.constexpr(len(DTYPE_CODES))
DTYPES = tl.constexpr((tl.float32, tl.bfloat16, tl.float16, tl.float64))
SMALLEST_NORMAL = tl.constexpr(tuple(torch.finfo(each).tiny for each in DTYPE_CODES))
FLOAT32, FLOAT64 = (tl.constexpr(DTYPE_CODES[each]) for each in (torch.float32, torch.float64))
MIXED = tl.constexpr(-1)
"""A code for tensors of different dtypes; each row has its own code."""
BY_VALUE = tl.constexpr(-1)
"""A code for scalars of the host: the word has the bits of a float64, not an address."""


class TensorRow(NamedTuple):
    """The addresses, dtypes and position of a tensor; letters are those of the catalogue.

    The table contains all fields except `g`, which changes at each step.
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
    """The hyperparameters of a tensor and factors computed from them, in float64."""

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
    """The factor from m to m̂."""
    scale2: Any
    """The factor from √v to √v̂."""


def _named(name: str, fields: Iterable[str]) -> Any:
    return namedtuple(name, list(fields))


_OF_ELEMENTS = [name for name in COLUMNS if name not in ("elements", *HYPERPARAMETERS)]
ElementColumns = _named("ElementColumns", [*_OF_ELEMENTS, "weight_max_abs"])
"""The quantities that are reduced over elements: sums, then maxima. The last one is no column."""
ROW_FIELDS = ("elements", *ElementColumns._fields, "needs_redo", *SettingsRow._fields)
"""The fields of a chunk's row, followed by those of a tensor's settings."""

TABLE_FIELDS = tl.constexpr(len(TensorRow._fields) - 1)
GROUP = tl.constexpr(TensorRow._fields.index("group") - 1)
STEP_CODE = tl.constexpr(TensorRow._fields.index("step_code") - 1)
SETTINGS = tl.constexpr(len(SettingsRow._fields))
SENT = tl.constexpr(SettingsRow._fields.index("step"))
"""Number of fields of `SettingsRow` that the host sends for a group, as words and codes."""
SUMS = tl.constexpr(sum(not COLUMNS[name].is_maximum for name in _OF_ELEMENTS))
REDO = tl.constexpr(ROW_FIELDS.index("needs_redo"))
WIDTH = tl.constexpr(ROW_FIELDS.index("needs_redo") + 1)
"""Number of fields of a chunk's row."""
