"""The Triton programs of a measurement."""

# ruff: noqa: N803, N806, SIM102, SIM300
# mypy: disable-error-code="no-untyped-def,assignment,call-arg"

import triton
import triton.language as tl

from lightning_adam.statistics.kernels.triton_columns import (
    add_terms,
    empty_columns,
    is_accurate,
    larger,
    largest_of,
    reduce_lanes,
    terms_of,
)
from lightning_adam.statistics.kernels.triton_elements import (
    INFINITY,
    elements_of,
    factors_of,
    has_float64,
)
from lightning_adam.statistics.kernels.triton_rows import (
    BY_VALUE,
    FLOAT32,
    GROUP,
    REDO,
    SENT,
    SETTINGS,
    STEP_CODE,
    SUMS,
    TABLE_FIELDS,
    WIDTH,
    SettingsRow,
    TensorRow,
)


@triton.jit(do_not_specialize=["tensors"])
def collect_settings(table, steps, groups, settings, tensors, BLOCK: tl.constexpr):
    """Writes a `SettingsRow` for each tensor."""
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tensor < tensors
    fields = table + tensor * TABLE_FIELDS
    group = groups + tl.load(fields + GROUP, mask=inside, other=0) * (2 * SENT)
    sent = ()
    for index in tl.static_range(SENT):
        sent += (_scalar(group + index, group + SENT + index, inside),)
    step = _scalar(steps + tensor, fields + STEP_CODE, inside)
    row = SettingsRow(*sent, step, 1.0, 1.0)
    scale1 = 1 / (1 - _power(row.beta1, step))
    scale2 = tl.sqrt(1 / (1 - _power(row.beta2, step)))
    row = SettingsRow(*sent, step, scale1, scale2)
    for index in tl.static_range(SETTINGS):
        tl.store(settings + tensor * SETTINGS + index, row[index], mask=inside)


@triton.jit
def _scalar(words, codes, inside):
    """Reads a number that is given by address or by value."""
    word = tl.load(words, mask=inside, other=0)
    code = tl.load(codes, mask=inside, other=BY_VALUE)
    is_single = code == FLOAT32
    is_double = (code != FLOAT32) & (code != BY_VALUE)
    single = tl.load(word.to(tl.pointer_type(tl.float32)), mask=is_single, other=0.0)
    double = tl.load(word.to(tl.pointer_type(tl.float64)), mask=is_double, other=0.0)
    value = tl.where(is_double, double, word.to(tl.float64, bitcast=True))
    return tl.where(is_single, single.to(tl.float64), value)


@triton.jit
def _power(base, exponent):
    """Computes a power in float64, as 1 - base^exponent loses digits if base is close to 1."""
    return tl.exp2(exponent * tl.log2(base))


@triton.jit
def measure_chunks(
    table,
    grads,
    settings,
    tensors_of_chunks,
    rows,
    CODES: tl.constexpr,
    AMSGRAD: tl.constexpr,
    NEEDED: tl.constexpr,
    NUMBER: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Writes the row of a chunk in float32, or in float64 if it has to be repeated."""
    row = rows + tl.program_id(0).to(tl.int64) * WIDTH
    if NUMBER == tl.float64:
        if tl.load(row + REDO) == 0:
            return
    _, tensor, exact, start, size = _chunk(table, grads, settings, tensors_of_chunks, CHUNK)
    if NUMBER == tl.float32:
        if has_float64(tensor):
            tl.store(row + REDO, 1.0)
            return
    s = factors_of(exact, NUMBER)
    columns = empty_columns(LANES, NEEDED, NUMBER)
    block = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    IS_FAST: tl.constexpr = NUMBER == tl.float32
    # All blocks except the last are complete and need no mask.
    whole = size // (ROWS * LANES) * (ROWS * LANES)
    inside = tl.zeros([ROWS, LANES], tl.int32) == 0
    for first in range(0, whole, ROWS * LANES):
        e = elements_of(tensor, s, start, first + block, inside, CODES, AMSGRAD, NUMBER, IS_FAST)
        columns = add_terms(columns, terms_of(e, s, tensor, inside, CODES, NUMBER), NEEDED)
    if whole < size:
        inside = whole + block < size
        e = elements_of(tensor, s, start, whole + block, inside, CODES, AMSGRAD, NUMBER, IS_FAST)
        columns = add_terms(columns, terms_of(e, s, tensor, inside, CODES, NUMBER), NEEDED)
    chunk = reduce_lanes(columns)
    tl.store(row, size.to(tl.float64))
    for index in tl.static_range(len(NEEDED)):
        tl.store(row + 1 + index, chunk[index].to(tl.float64))
    if NUMBER == tl.float32:
        tl.store(row + REDO, 1.0 - is_accurate(exact, chunk, NEEDED).to(tl.float64))


@triton.jit(do_not_specialize=["columns"])
def add_up(
    table,
    settings,
    rows,
    slots,
    result,
    columns,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
):
    """Writes the columns of a tensor that have a slot in the result."""
    index = tl.program_id(0).to(tl.int64)
    tensor = TensorRow(0, *_read(table + index * TABLE_FIELDS, TABLE_FIELDS))
    chunks = tl.cdiv(tensor.elements, CHUNK)
    column = tl.arange(0, PADDED_WIDTH)
    is_maximum = column > SUMS
    empty = tl.where(is_maximum, -INFINITY, 0.0).to(tl.float64)
    sums = empty
    maxima = empty
    for first in range(0, chunks, PARTS):
        part = first + tl.arange(0, PARTS)
        places = (tensor.first_chunk + part)[:, None] * WIDTH + column[None, :]
        inside = (part < chunks)[:, None] & (column < REDO)[None, :]
        values = tl.load(rows + places, mask=inside, other=0.0)
        values = tl.where(inside, values, empty[None, :])
        sums += tl.sum(values, axis=0)
        maxima = larger(maxima, largest_of(values))
    # Settings of a tensor without elements do not count.
    is_setting = (column >= WIDTH) & (column < WIDTH + SETTINGS) & (chunks > 0)
    setting = tl.load(settings + index * SETTINGS + column - WIDTH, mask=is_setting, other=0.0)
    values = tl.where(is_setting, setting, tl.where(is_maximum, maxima, sums))
    slot = tl.load(slots + column)
    tl.store(result + tensor.position * columns + slot, values, mask=slot >= 0)


@triton.jit
def count_chunks(
    table,
    grads,
    settings,
    tensors_of_chunks,
    groups,
    counts,
    CODES: tl.constexpr,
    AMSGRAD: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    BINS: tl.constexpr,
):
    """Adds the active elements of a chunk to the histograms, in the order of `QUANTITIES`."""
    index, tensor, exact, start, size = _chunk(table, grads, settings, tensors_of_chunks, CHUNK)
    if has_float64(tensor):
        return
    s = factors_of(exact, tl.float32)
    empty = tl.zeros([BINS], tl.int32)
    histograms = (empty, empty, empty, empty)
    block = tl.arange(0, ROWS * LANES)
    for first in range(0, size, ROWS * LANES):
        inside = first + block < size
        e = elements_of(tensor, s, start, first + block, inside, CODES, AMSGRAD, tl.float32, False)
        magnitudes = (e.g, e.m_hat, e.denominator, e.u)
        counted = ()
        for quantity in tl.static_range(4):
            exponents = (magnitudes[quantity].to(tl.int32, bitcast=True) >> 23) & 0xFF
            counted += (histograms[quantity] + tl.histogram(exponents, BINS, mask=e.active),)
        histograms = counted
    bins = tl.arange(0, BINS)
    group = tl.load(groups + index)
    for quantity in tl.static_range(4):
        places = counts + (group * 4 + quantity) * BINS + bins
        found = histograms[quantity].to(tl.int64)
        tl.atomic_add(places, found, mask=found > 0, sem="relaxed")


@triton.jit
def _chunk(table, grads, settings, tensors_of_chunks, CHUNK: tl.constexpr):
    """Returns the tensor of this program's chunk, its settings, and the position of the chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    index = tl.load(tensors_of_chunks + chunk)
    fields = _read(table + index * TABLE_FIELDS, TABLE_FIELDS)
    tensor = TensorRow(tl.load(grads + index), *fields)
    exact = SettingsRow(*_read(settings + index * SETTINGS, SETTINGS))
    start = (chunk - tensor.first_chunk) * CHUNK
    return index, tensor, exact, start, tl.minimum(tensor.elements - start, CHUNK).to(tl.int32)


@triton.jit
def _read(row, NUMBER: tl.constexpr):
    values = ()
    for index in tl.static_range(NUMBER):
        values += (tl.load(row + index),)
    return values
