"""The CUDA kernel in Triton: reads each element once, at about the speed of memory.

Tensors are split into chunks, and a launch has one program per chunk. A measurement consists of one
copy to the device and four launches, independent of the number of tensors:

1. `collect_settings` collects the hyperparameters of each tensor, some of which a fused or
   capturable optimizer keeps on the device, and computes factors from them in float64.
2. `measure_chunks` in float32 writes a row of columns for each chunk.
3. `measure_chunks` in float64 repeats chunks with values that float32 cannot square or that are
   not finite, and measures float64 tensors. Programs of other chunks return immediately.
4. `add_up` adds the rows of each tensor in a fixed order, so that results are deterministic.

Nothing waits for the copy. It contains the addresses of gradients and the hyperparameters that have
changed; everything else is copied once per layout (`triton_table.py`).

In float32, each lane of a chunk adds `CHUNK / LANES` terms, `ROWS` of them at a time. For terms of
one sign the relative error is at most 4e-6: CHUNK / LANES / ROWS / 2 roundings of at most 2⁻²⁴.
Lanes are added as a tree, chunks in float64.
"""

# mypy: disable-error-code="no-untyped-call"

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_adam.statistics.columns import COLUMNS, Capabilities
from lightning_adam.statistics.histograms import BINS, QUANTITIES
from lightning_adam.statistics.kernels import eager
from lightning_adam.statistics.kernels.triton_programs import (
    add_up,
    collect_settings,
    count_chunks,
    measure_chunks,
)
from lightning_adam.statistics.kernels.triton_rows import (
    ROW_FIELDS,
    SUMS,
    WIDTH,
    ElementColumns,
    SettingsRow,
)
from lightning_adam.statistics.kernels.triton_table import DeviceTable, to_device
from lightning_adam.statistics.param_states import ParamStates

CHUNK = 1 << 16
"""Elements per program. Writing its row takes 0.005 bytes per element, reading them 8 to 20."""
LANES = 128
"""Adjacent elements, one for each thread, so that the loads of a warp are coalesced."""
ROWS = 4
"""Rows of lanes that are loaded together. A thread adds them before it adds them to its sums, so
that it needs one sum per column, not one per row."""
OPTIONS = {"num_warps": LANES // 32, "enable_fp_fusion": True}
"""Compiler options. Half of the sums are of products, which benefit from fused operations."""
TENSORS = 128
"""Tensors per program of `collect_settings`."""
PARTS = 64
"""Rows of chunks that `add_up` adds at a time."""
ANY_DTYPES = (-1,) * 4
ALL_NEEDED = (True,) * len(ElementColumns._fields)
PADDED_WIDTH = 1 << (len(ROW_FIELDS) - 1).bit_length()


@torch.no_grad()
def measure(states: ParamStates, columns: Sequence[str]) -> Tensor:
    """Returns the columns of tensors on a CUDA device; see `eager.measure`."""
    with _current_device(states):
        table, settings = _updated(states)
        sizes = len(states), len(columns)
        result = torch.empty(sizes, dtype=torch.float64, device=table.device)
        if table.tensors:
            _measure(table, settings, result, tuple(columns))
        if table.unsupported:
            rows = eager.measure(states.select(table.unsupported), columns)
            result.index_copy_(0, table.unsupported_on_device, rows)
    return result


@torch.no_grad()
def count_exponents(states: ParamStates, groups: Sequence[int], number: int) -> Tensor:
    """Counts active elements on a CUDA device; see `eager.count_exponents`."""
    with _current_device(states):
        table, settings = _updated(states)
        shape = (number, len(QUANTITIES), BINS)
        counts = torch.zeros(shape, dtype=torch.int64, device=table.device)
        if table.chunks:
            count_chunks[(table.chunks,)](
                table.rows,
                table.grads,
                settings,
                table.tensors_of_chunks,
                to_device(table.select(groups), table.device),
                counts,
                CODES=table.codes,
                AMSGRAD=table.has_amsgrad,
                CHUNK=CHUNK,
                ROWS=ROWS,
                LANES=LANES,
                BINS=BINS,
                **OPTIONS,
            )
        if table.not_float32:
            own = [groups[index] for index in table.not_float32]
            counts += eager.count_exponents(states.select(table.not_float32), own, number)
    return counts


grad_squares = eager.grad_squares


def _current_device(states: ParamStates) -> AbstractContextManager[Any]:
    """Makes the device of the tensors the current one, on which Triton launches."""
    device = states.parameter[0].device
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _updated(states: ParamStates) -> tuple[DeviceTable, Tensor]:
    """Returns the table of the tensors and their rows of settings."""
    device, prepared = states.parameter[0].device, states.layout.prepared
    # One table per stream, as its copy on the device is updated in stream order.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    table: DeviceTable | None = prepared.get(("triton", stream))
    if table is None:
        table = prepared["triton", stream] = DeviceTable(states, CHUNK)
    sizes = table.tensors, len(SettingsRow._fields)
    settings = torch.empty(sizes, dtype=torch.float64, device=device)
    if table.tensors:
        table.update(states)
        collect_settings[(triton.cdiv(table.tensors, TENSORS),)](
            table.rows,
            table.steps,
            table.groups,
            settings,
            table.tensors,
            BLOCK=TENSORS,
            **OPTIONS,
        )
    return table, settings


def _measure(
    table: DeviceTable, settings: Tensor, result: Tensor, columns: tuple[str, ...]
) -> None:
    """Writes the rows of the tensors that the kernel supports."""
    rows = torch.empty(table.chunks, int(WIDTH), dtype=torch.float64, device=table.device)
    if table.chunks:
        # float64 is rarely needed, so one variant for all dtypes and columns is enough.
        for codes, has_amsgrad, needed, number, rows_at_a_time in (
            (table.codes, table.has_amsgrad, _needed(columns), tl.float32, ROWS),
            (ANY_DTYPES, True, ALL_NEEDED, tl.float64, 1),
        ):
            measure_chunks[(table.chunks,)](
                table.rows,
                table.grads,
                settings,
                table.tensors_of_chunks,
                rows,
                CODES=codes,
                AMSGRAD=has_amsgrad,
                NEEDED=needed,
                NUMBER=number,
                CHUNK=CHUNK,
                ROWS=rows_at_a_time,
                LANES=LANES,
                **OPTIONS,
            )
    if columns not in table.slots:
        slots = [columns.index(name) if name in columns else -1 for name in ROW_FIELDS]
        slots += [-1] * (PADDED_WIDTH - len(slots))
        table.slots[columns] = to_device(slots, table.device)
    add_up[(table.tensors,)](
        table.rows,
        settings,
        rows,
        table.slots[columns],
        result,
        len(columns),
        CHUNK=CHUNK,
        PARTS=PARTS,
        PADDED_WIDTH=PADDED_WIDTH,
        **OPTIONS,
    )


@cache
def _needed(columns: tuple[str, ...]) -> tuple[bool, ...]:
    """Returns which of `ElementColumns` are requested, or needed by `is_accurate`."""
    needed = {*columns, "grad_squares", "exp_avg_squares", "exp_avg_sq_sum", "weight_squares"}
    # Without Adam's step, u is not checked.
    if any(Capabilities.STEP in COLUMNS[name].needs for name in columns):
        needed |= {"normalized_update_squares", "exp_avg_sq_roots"}
    names: tuple[str, ...] = ElementColumns._fields
    return tuple(index >= SUMS or name in needed for index, name in enumerate(names))
