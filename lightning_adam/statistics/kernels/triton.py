"""The kernel for CUDA, in Triton: each element is read once, at about the speed of memory.

Tensors are cut into chunks, and a launch has one program a chunk. A measurement is one copy to the
device and four launches, however many tensors there are:

1. `_collect_settings` brings together each tensor's hyperparameters, of which a fused or capturable
   optimizer keeps some on the device, and works out in float64 what follows from them.
2. `_measure_chunks` in float32 leaves a row of columns for each chunk.
3. `_measure_chunks` in float64 does again the chunks with magnitudes that float32 cannot square or
   that are not finite, and does those of float64 tensors. The other programs end at once.
4. `_add_up` adds each tensor's rows, in a fixed order: the same tensors give the same bits.

What they have to be told, such as addresses, is that one copy, and nothing waits for it.

In float32 each lane of a chunk adds up `CHUNK / LANES` terms, `ROWS` of them at a time. For terms
of one sign that is off by no more than 4e-6, CHUNK / LANES / ROWS / 2 roundings of at most 2⁻²⁴.
Lanes are added as a tree, chunks in float64.

A new column over elements is a line in `_added_terms` or `_maxima_terms`.
"""

# In capitals is what the compiler knows, as is Triton's custom; it is Triton that finds the types.
# ruff: noqa: N803, N806, SIM300
# mypy: disable-error-code="no-untyped-def,assignment,call-arg"

from collections import namedtuple
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_adam.statistics.accumulators import COLUMNS, Knowledge
from lightning_adam.statistics.histograms import BINS, QUANTITIES
from lightning_adam.statistics.kernels import eager
from lightning_adam.statistics.views import TensorView, lie_alike

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
    raise ImportError(f"triton {triton.__version__} does not compile this kernel; 3.6 does")

CHUNK = 1 << 16
"""Elements of a program. Its row takes 0.006 bytes an element, beside the 8 to 20 that it reads."""
LANES = 128
"""Elements side by side, one for each thread: what a warp loads lies together, wherever a tensor
begins."""
ROWS = 4
"""Rows of lanes at a time, all of whose loads are under way together. A thread adds them up before
it adds them to its sums, of which it needs one each for that, not one for every row."""
OPTIONS = {"num_warps": LANES // 32, "enable_fp_fusion": True}
"""Of the compiler. Half of the sums are of products, so fused they take fewer instructions."""
TENSORS = 128
"""Tensors of a program of `_collect_settings`."""
PARTS = 64
"""Rows of chunks that `_add_up` takes at a time."""

_LOW, _HIGH = tl.constexpr(1e-15), tl.constexpr(1e15)
"""Where the largest magnitude of a chunk has to lie for its squares, their sum over the chunk and
the squares of much smaller elements to be numbers of float32."""
_LOW_EPS, _HIGH_EPS = tl.constexpr(1e-30), tl.constexpr(1e30)
"""The same for eps, which is inverted but never squared."""
_SHIFT, _ROOT_OF_SHIFT = tl.constexpr(2.0**32), tl.constexpr(2.0**-16)
"""What makes a subnormal number normal, and takes its effect from the root."""
_INFINITY = tl.constexpr(float("inf"))

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""The dtypes that a kernel reads, by code."""
_FLOAT32, _BFLOAT16, _FLOAT16, _FLOAT64 = (tl.constexpr(kind) for kind in _KINDS.values())
_MIXED = tl.constexpr(-1)
"""In place of a code where tensors differ: each has its own in the table."""


class _Tensor(NamedTuple):
    """A tensor's row in the table that goes to the device; letters are the catalogue's."""

    p: Any
    """Addresses, 0 where there is nothing."""
    g: Any
    m: Any
    v: Any
    v_max: Any
    p_kind: Any
    """Codes of dtypes."""
    g_kind: Any
    m_kind: Any
    v_kind: Any
    elements: Any
    first_chunk: Any
    group: Any
    """The position of its histograms."""
    lr: Any
    """Addresses of those hyperparameters that may be on the device."""
    beta1: Any
    beta2: Any
    step: Any
    lr_kind: Any
    beta1_kind: Any
    beta2_kind: Any
    step_kind: Any


class _Settings(NamedTuple):
    """A tensor's hyperparameters and what follows from them, in float64."""

    lr: Any
    beta1: Any
    beta2: Any
    step: Any
    eps: Any
    weight_decay: Any
    is_decoupled: Any
    sign: Any
    """Minus one with maximize, else one."""
    scale1: Any
    """What makes m̂ of m."""
    scale2: Any
    """What makes √v̂ of √v."""


_FIELDS = tl.constexpr(len(_Tensor._fields))
_SETTINGS = tl.constexpr(len(_Settings._fields))
_KNOWN = tl.constexpr(_Settings._fields.index("scale1"))
"""How many settings go over with the table."""
_ADDRESSED = tl.constexpr(4)
"""How many of those are found by an address in it."""
_ADDRESSES = tl.constexpr(_Tensor._fields.index("lr"))
_ADDRESS_KINDS = tl.constexpr(_Tensor._fields.index("lr_kind"))

_ROW = [name for name in COLUMNS if name != "skipped_steps"]
"""The columns of a chunk's row; after them stands whether it has to be done again in float64."""
_AGAIN = tl.constexpr(len(_ROW))
_WIDTH = tl.constexpr(len(_ROW) + 1)
_SUMS = tl.constexpr(sum(not COLUMNS[name].is_maximum for name in _ROW))
"""They come first."""
_OF_CHUNK = (
    "elements",
    "update_squares",
    "decay_squares",
    "decay_times_update",
    "equilibrium_squares",
    "lr",
    "beta1",
    "beta2",
    "eps",
    "weight_decay",
    "decay_rate",
    "step",
)
"""Columns that no element is looked at for: they follow from settings and other sums."""
_FOLLOWS_FROM = {
    "update_squares": "direction_squares",
    "decay_squares": "undone_squares",
    "decay_times_update": "undone_times_direction",
}
_OF_ELEMENTS = [name for name in _ROW if name not in _OF_CHUNK]


def _named(name: str, fields: Iterable[str]) -> Any:
    """A tuple made by its parts' names, which have to be these, none missing."""
    return namedtuple(name, list(fields))


_Added = _named(
    "_Added",
    [
        *(name for name in _OF_ELEMENTS if not COLUMNS[name].is_maximum),
        "undone_squares",
        "undone_times_direction",
    ],
)
"""What is added up over elements."""
_Maxima = _named(
    "_Maxima",
    [*(name for name in _OF_ELEMENTS if COLUMNS[name].is_maximum), "weight_max_abs"],
)
"""What the largest is taken of over elements."""
_OfChunk = _named("_OfChunk", _OF_CHUNK)

_PLACES = {name: place for place, name in enumerate(_ROW)}
_ADDED_PLACES = tl.constexpr(tuple(_PLACES.get(name, -1) for name in _Added._fields))
_MAXIMA_PLACES = tl.constexpr(tuple(_PLACES.get(name, -1) for name in _Maxima._fields))
_OF_CHUNK_PLACES = tl.constexpr(tuple(_PLACES[name] for name in _OF_CHUNK))
"""Where each stands in the row; -1 for what no row has."""
_NUMBER_OF_MAXIMA = tl.constexpr(len(_Maxima._fields))
_DIRECTION = tl.constexpr(_Added._fields.index("direction_squares"))
_ALL_ADDED = (True,) * len(_Added._fields)


@torch.no_grad()
def measure(views: Sequence[TensorView], columns: Sequence[str]) -> Tensor:
    """What the columns say of each tensor.

    Args:
        views: Tensors of one CUDA device, at least one, right after the step.
        columns: Names of `COLUMNS`, in their order.

    Returns:
        The matrix `[tensors, columns]` in float64, on the tensors' device.

    Example:
        >>> layer = torch.nn.Linear(3, 4, bias=False, device="cuda")  # doctest: +SKIP
        >>> adam = torch.optim.Adam(layer.parameters(), fused=True)  # doctest: +SKIP
        >>> layer(torch.ones(3, device="cuda")).sum().backward()  # doctest: +SKIP
        >>> adam.step()  # doctest: +SKIP
        >>> from lightning_adam.statistics.views import Views
        >>> measure(Views().after_step(adam), ["elements", "grad_squares"])  # doctest: +SKIP
        tensor([[12., 12.]], device='cuda:0', dtype=torch.float64)
    """
    is_own = [_is_readable(view) for view in views]
    if all(is_own):
        return _measure(views, columns)
    own = [view for view, is_read in zip(views, is_own, strict=True) if is_read]
    others = [view for view, is_read in zip(views, is_own, strict=True) if not is_read]
    rows = iter(_measure(own, columns) if own else ())
    other_rows = iter(eager.measure(others, columns))
    return torch.stack([next(rows if is_read else other_rows) for is_read in is_own])


@torch.no_grad()
def count_exponents(views: Sequence[TensorView], groups: Sequence[int]) -> Tensor:
    """Active elements by the binary exponent of each of `QUANTITIES`, for each group of tensors.

    Args:
        views: Tensors of one CUDA device, at least one, right after the step.
        groups: The position of each tensor's group in what is returned.

    Returns:
        Counts, `[groups, len(QUANTITIES), BINS]` in int64, on the tensors' device.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(5, device="cuda"))  # doctest: +SKIP
        >>> adam = torch.optim.Adam([weight])  # doctest: +SKIP
        >>> weight.grad = torch.ones_like(weight)  # doctest: +SKIP
        >>> adam.step()  # doctest: +SKIP
        >>> from lightning_adam.statistics.views import Views
        >>> int(count_exponents(Views().after_step(adam), [0])[0, 0, 127])  # doctest: +SKIP
        5
    """
    shape = (max(groups) + 1, len(QUANTITIES), BINS)
    counts = torch.zeros(shape, dtype=torch.int64, device=views[0].parameter.device)
    own: list[tuple[TensorView, int]] = []
    others: list[tuple[TensorView, int]] = []
    for view, group in zip(views, groups, strict=True):
        is_single = torch.float64 not in _dtypes(view)
        (own if is_single and _is_readable(view) else others).append((view, group))
    if own:
        task = _Task([view for view, _ in own], [group for _, group in own])
        with task.on_device:
            task.collect_settings()
            if task.chunks:
                _count_chunks[(task.chunks,)](
                    task.table,
                    task.settings,
                    task.tensors_of_chunks,
                    counts,
                    KINDS=task.kinds,
                    AMSGRAD=task.has_amsgrad,
                    CHUNK=CHUNK,
                    ROWS=ROWS,
                    LANES=LANES,
                    BINS=BINS,
                    **OPTIONS,
                )
    if others:
        part = eager.count_exponents([view for view, _ in others], [group for _, group in others])
        counts[: len(part)] += part
    return counts


def _measure(views: Sequence[TensorView], columns: Sequence[str]) -> Tensor:
    task = _Task(views, [0] * len(views), columns)
    device = task.table.device
    rows = torch.empty(task.chunks, int(_WIDTH), dtype=torch.float64, device=device)
    result = torch.empty(len(views), len(columns), dtype=torch.float64, device=device)
    with task.on_device:
        task.collect_settings()
        if task.chunks:
            _measure_chunks[(task.chunks,)](
                task.table,
                task.settings,
                task.tensors_of_chunks,
                rows,
                KINDS=task.kinds,
                AMSGRAD=task.has_amsgrad,
                ADDED=_needed(columns),
                NUMBER=tl.float32,
                CHUNK=CHUNK,
                ROWS=ROWS,
                LANES=LANES,
                **OPTIONS,
            )
            # It is rarely needed, so one variant that reads everything and adds all will do.
            _measure_chunks[(task.chunks,)](
                task.table,
                task.settings,
                task.tensors_of_chunks,
                rows,
                KINDS=_ANY_KINDS,
                AMSGRAD=True,
                ADDED=_ALL_ADDED,
                NUMBER=tl.float64,
                CHUNK=CHUNK,
                ROWS=1,
                LANES=LANES,
                **OPTIONS,
            )
        _add_up[(len(views),)](
            task.table,
            rows,
            task.slots,
            result,
            len(columns),
            CHUNK=CHUNK,
            PARTS=PARTS,
            PADDED_WIDTH=triton.next_power_of_2(int(_WIDTH)),
            **OPTIONS,
        )
    return result


_ANY_KINDS = (-1, -1, -1, -1)


def _needed(columns: Iterable[str]) -> tuple[bool, ...]:
    """Which of `_Added` the columns need, and those by which a chunk's health is told."""
    names = set(columns)
    needed = names | {_FOLLOWS_FROM[name] for name in names & _FOLLOWS_FROM.keys()}
    needed |= {"grad_squares", "exp_avg_squares", "exp_avg_sq_sum", "weight_squares"}
    # Without a step there is no u, and a chunk is none the worse for it.
    if any(Knowledge.STEP in COLUMNS[name].needs for name in names):
        needed |= {"direction_squares", "denominator_sum"}
    return tuple(name in needed for name in _Added._fields)


def _dtypes(view: TensorView) -> list[torch.dtype]:
    """Those of p, g, m and v."""
    tensors = (view.parameter, view.grad, view.exp_avg, view.exp_avg_sq)
    return [tensor.dtype for tensor in tensors if tensor is not None]


def _is_readable(view: TensorView) -> bool:
    """Whether the tensor lies in memory as the kernel reads it; else it is left to `eager`."""
    p, v, v_max = view.parameter, view.exp_avg_sq, view.max_exp_avg_sq
    if v is None or (v_max is not None and v_max.dtype != v.dtype):
        return False
    others = [view.grad, view.exp_avg, v] if v_max is None else [view.grad, view.exp_avg, v, v_max]
    if any(dtype not in _KINDS for dtype in _dtypes(view)):
        return False
    if any(tensor.device != p.device for tensor in others):
        return False
    if not lie_alike(view):
        return False
    settings = view.settings
    if any(_is_on(each, p.device) for each in (settings.eps, settings.weight_decay)):
        return False
    scalars = (settings.lr, settings.beta1, settings.beta2, view.step)
    return all(
        each.numel() == 1 and each.dtype in (torch.float32, torch.float64)
        for each in scalars
        if isinstance(each, Tensor)
    )


def _is_on(value: Tensor | float, device: torch.device) -> bool:
    return isinstance(value, Tensor) and value.device == device


class _Task:
    """Tensors to measure, as the device is told of them.

    Args:
        views: The tensors.
        groups: The position of each one's histograms.
        columns: What is asked for.
    """

    def __init__(
        self, views: Sequence[TensorView], groups: Sequence[int], columns: Sequence[str] = ()
    ) -> None:
        self.tensors = len(views)
        self.device = device = views[0].parameter.device
        self.on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        self.has_amsgrad = any(view.max_exp_avg_sq is not None for view in views)
        chunks = [-(-view.parameter.numel() // CHUNK) for view in views]
        self.chunks = sum(chunks)
        known = int(_KNOWN)
        sizes = [
            self.tensors * int(_FIELDS),
            self.tensors * known,
            len(_ROW),
            self.chunks,
        ]
        sent = torch.empty(sum(sizes), dtype=torch.int64, device=device)
        self.table, self.known, self.slots, self.tensors_of_chunks = sent.split(sizes)
        self.settings = torch.empty(
            self.tensors, int(_SETTINGS), dtype=torch.float64, device=device
        )
        # Only from pinned memory does a copy not wait; it is not given away before the copy ended.
        host = torch.empty_like(sent, device="cpu", pin_memory=device.type == "cuda")
        parts = [part.numpy() for part in host.split(sizes)]
        numbers = parts[1].view(np.float64).reshape(self.tensors, known)
        address = self.known.data_ptr()
        first_chunk, rows = 0, []
        for index, view in enumerate(views):
            row, number = _described(view, address + index * known * 8)
            rows.append(row._replace(first_chunk=first_chunk, group=groups[index]))
            numbers[index] = number
            first_chunk += chunks[index]
        table = np.array(rows, dtype=np.int64)
        parts[0][:] = table.reshape(-1)
        position = {name: index for index, name in enumerate(columns)}
        parts[2][:] = [position.get(name, -1) for name in _ROW]
        parts[3][:] = np.repeat(np.arange(self.tensors), chunks)
        sent.copy_(host, non_blocking=True)
        self.kinds = _shared_kinds(table)

    def collect_settings(self) -> None:
        """Fills `settings`."""
        _collect_settings[(triton.cdiv(self.tensors, TENSORS),)](
            self.table,
            self.known.view(torch.float64),
            self.settings,
            self.tensors,
            BLOCK=TENSORS,
            **OPTIONS,
        )


def _described(view: TensorView, address: int) -> tuple[_Tensor, list[float]]:
    """The tensor's row of the table, and its settings, which will stand at this address."""
    p, g, m, v, v_max = (
        view.parameter,
        view.grad,
        view.exp_avg,
        view.exp_avg_sq,
        view.max_exp_avg_sq,
    )
    assert v is not None
    settings = view.settings
    numbers, addresses, kinds = [], [], []
    scalars = (settings.lr, settings.beta1, settings.beta2, view.step)
    for index, value in enumerate(scalars):
        if isinstance(value, Tensor) and value.device == p.device:
            numbers.append(0.0)
            addresses.append(value.data_ptr())
            kinds.append(_KINDS[value.dtype])
        else:
            numbers.append(float(value))
            addresses.append(address + 8 * index)
            kinds.append(_KINDS[torch.float64])
    numbers += [
        float(settings.eps),
        float(settings.weight_decay),
        float(settings.decoupled),
        -1.0 if settings.maximize else 1.0,
    ]
    return _Tensor(
        p.data_ptr(),
        g.data_ptr(),
        m.data_ptr(),
        v.data_ptr(),
        0 if v_max is None else v_max.data_ptr(),
        _KINDS[p.dtype],
        _KINDS[g.dtype],
        _KINDS[m.dtype],
        _KINDS[v.dtype],
        p.numel(),
        0,
        0,
        *addresses,
        *kinds,
    ), numbers


def _shared_kinds(table: npt.NDArray[np.int64]) -> tuple[int, ...]:
    """The dtypes of p, g, m and v that all tensors share, but for those that are in float64."""
    first = _Tensor._fields.index("p_kind")
    kinds = table[:, first : first + 4]
    kinds = kinds[(kinds != _KINDS[torch.float64]).all(axis=1)]
    if not len(kinds):
        return _ANY_KINDS
    return tuple(
        int(kind) if (own == kind).all() else -1
        for kind, own in zip(kinds[0], kinds.T, strict=True)
    )


@triton.jit
def _collect_settings(table, known, settings, tensors, BLOCK: tl.constexpr):
    """Writes the rows of `_Settings`."""
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tensor < tensors
    s = _settled(table, known, tensor, inside)
    for index in tl.static_range(_SETTINGS):
        tl.store(settings + tensor * _SETTINGS + index, s[index], mask=inside)


@triton.jit
def _settled(table, known, tensor, inside):
    """What host and device were given, and what follows from it."""
    values = ()
    for index in tl.static_range(_ADDRESSED):
        fields = table + tensor * _FIELDS + index
        address = tl.load(fields + _ADDRESSES, mask=inside, other=0)
        is_single = tl.load(fields + _ADDRESS_KINDS, mask=inside, other=0) == _FLOAT32
        singles = tl.load(address.to(tl.pointer_type(tl.float32)), mask=inside & is_single)
        doubles = tl.load(address.to(tl.pointer_type(tl.float64)), mask=inside & ~is_single)
        values += (tl.where(is_single, singles.to(tl.float64), doubles),)
    for index in tl.static_range(_ADDRESSED, _KNOWN):
        values += (tl.load(known + tensor * _KNOWN + index, mask=inside),)
    given = _Settings(*values, 0.0, 0.0)
    scale1 = 1 / (1 - _power(given.beta1, given.step))
    scale2 = tl.sqrt(1 / (1 - _power(given.beta2, given.step)))
    return _Settings(*values, scale1, scale2)


@triton.jit
def _power(base, exponent):
    """In float64, of which 1 - base^exponent may lose six digits when base is close to 1."""
    return tl.exp2(exponent * tl.log2(base))


@triton.jit
def _measure_chunks(
    table,
    settings,
    tensors_of_chunks,
    rows,
    KINDS: tl.constexpr,
    AMSGRAD: tl.constexpr,
    ADDED: tl.constexpr,
    NUMBER: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Writes the row of a chunk: in float32, or in float64 if it has to be done again."""
    chunk = tl.program_id(0).to(tl.int64)
    row = rows + chunk * _WIDTH
    index = tl.load(tensors_of_chunks + chunk)
    tensor = _Tensor(*_read(table + index * _FIELDS, _FIELDS))
    if NUMBER == tl.float64:
        if tl.load(row + _AGAIN) == 0:
            return
    else:
        if _has_float64(tensor):
            tl.store(row + _AGAIN, 1.0)
            return
    exact = _Settings(*_read(settings + index * _SETTINGS, _SETTINGS))
    s = _factors(exact, NUMBER)
    IS_FAST: tl.constexpr = NUMBER == tl.float32
    start = (chunk - tensor.first_chunk) * CHUNK
    size = tl.minimum(tensor.elements - start, CHUNK).to(tl.int32)

    added = _repeated(tl.zeros([LANES], NUMBER), len(ADDED))
    maxima = _repeated(tl.full([LANES], -_INFINITY, NUMBER), _NUMBER_OF_MAXIMA)
    block = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    # All blocks but the last are whole, and not asked at every element whether it is there.
    whole = size // (ROWS * LANES) * (ROWS * LANES)
    inside = tl.zeros([ROWS, LANES], tl.int32) == 0
    for first in range(0, whole, ROWS * LANES):
        e = _elements(tensor, s, start, first + block, inside, KINDS, AMSGRAD, NUMBER, IS_FAST)
        added = _plus(added, _added_terms(e, s, tensor, inside, KINDS, NUMBER), ADDED)
        maxima = _maximum(maxima, _maxima_terms(e, inside))
    if whole < size:
        inside = whole + block < size
        e = _elements(tensor, s, start, whole + block, inside, KINDS, AMSGRAD, NUMBER, IS_FAST)
        added = _plus(added, _added_terms(e, s, tensor, inside, KINDS, NUMBER), ADDED)
        maxima = _maximum(maxima, _maxima_terms(e, inside))
    sums = _Added(*_over_lanes_added(added))
    largest = _Maxima(*_over_lanes_largest(maxima))
    _store(row, sums, _ADDED_PLACES)
    _store(row, largest, _MAXIMA_PLACES)
    _store(row, _terms_of_chunk(exact, sums, size), _OF_CHUNK_PLACES)
    if NUMBER == tl.float32:
        tl.store(row + _AGAIN, 1.0 - _is_healthy(exact, sums, largest, ADDED).to(tl.float64))


@triton.jit
def _added_terms(e, s, tensor, inside, KINDS: tl.constexpr, NUMBER: tl.constexpr):
    """What each element adds to the sums. Of the places outside all that is read is zero."""
    ratio = tl.where(e.has_denominator, e.m_hat * e.inverse, 0.0)
    ratio_own = tl.where(e.has_second_moment, e.m_hat * e.inverse_own, 0.0)
    lost = e.u * (s.eps * e.inverse)
    lag = tl.where(e.active, e.entered * _smaller(e.inverse_own, s.inverse_eps), 0.0)
    if NUMBER == tl.float64:
        moved = e.update != 0
        nonfinite = ~(_is_finite(e.p) & _is_finite(e.g) & _is_finite(e.m) & _is_finite(e.v))
    else:
        # Here u may be too small for float32; and a chunk that is not finite will be done again.
        moved = (e.m != 0) & s.is_moving
        nonfinite = e.p != e.p
    v_kind: tl.constexpr = KINDS[3]
    v_decayed = _rounded(_reduced(e.v, s.forgotten, NUMBER), tensor.v_kind, v_kind, NUMBER)
    p_updated = _rounded(e.p - e.update, tensor.p_kind, KINDS[0], NUMBER)
    p_decayed = _rounded(_reduced(e.p, s.decay_rate, NUMBER), tensor.p_kind, KINDS[0], NUMBER)
    return _Added(
        grad_squares=e.g * e.g,
        grad_zero=_one(inside & (e.g == 0), NUMBER),
        exp_avg_sum=e.m,
        exp_avg_squares=e.m * e.m,
        weight_squares=e.p * e.p,
        nonfinite=_one(nonfinite, NUMBER),
        exp_avg_sq_sum=e.v,
        exp_avg_sq_subnormal=_one(
            (e.v > 0) & (e.v < _smallest_normal(tensor.v_kind, v_kind, NUMBER)), NUMBER
        ),
        exp_avg_sq_stalled=_one((e.v > 0) & (v_decayed == e.v), NUMBER),
        max_exp_avg_sq_sum=e.v_max,
        active=_one(e.active, NUMBER),
        entered_squares=e.entered * e.entered,
        exp_avg_times_entered=e.m * e.entered,
        denominator_sum=e.denominator,
        entered_over_second_moment=lag * lag,
        second_moment_positive=_one(e.has_second_moment, NUMBER),
        signal=_smaller(ratio_own * ratio_own, 1.0),
        eps_dominated=_one(e.active & (e.denominator < s.eps), NUMBER),
        denominator_share=tl.where(e.active, e.denominator * e.share, 0.0),
        energy_without_eps=ratio * ratio,
        energy_lost_to_eps=tl.where(e.has_denominator, lost * (2 * e.u + lost), 0.0),
        exp_avg_sq_zero=_one((e.v == 0) & (e.entered != 0), NUMBER),
        direction_squares=e.u * e.u,
        direction_large=_one(tl.abs(e.u) > 0.8, NUMBER),
        update_nonzero=_one(moved, NUMBER),
        update_lost=_one(moved & (p_updated == e.p), NUMBER),
        weight_nonzero=_one(e.p != 0, NUMBER),
        decay_lost=_one((e.p != 0) & (p_decayed == e.p), NUMBER),
        undone_squares=e.undone * e.undone,
        undone_times_direction=e.undone * e.u,
    )


@triton.jit
def _maxima_terms(e, inside):
    """What each element gives, of which the largest is taken."""
    return _Maxima(
        grad_max_abs=tl.abs(e.g),
        exp_avg_max_abs=tl.abs(e.m),
        exp_avg_sq_largest=tl.where(inside, e.v, -_INFINITY),
        direction_max_abs=tl.where(e.active, tl.abs(e.u), -_INFINITY),
        weight_max_abs=tl.abs(e.p),
    )


@triton.jit
def _terms_of_chunk(exact, sums, size):
    """What a chunk gives as a whole, in float64."""
    decay_rate = exact.lr * exact.weight_decay
    decays = exact.weight_decay > 0
    # What makes decay of p+ηu.
    strength = tl.where(
        decays & (exact.is_decoupled != 0), decay_rate / (1 - decay_rate), exact.weight_decay
    )
    elements = size.to(tl.float64)
    return _OfChunk(
        elements=elements,
        update_squares=exact.lr * exact.lr * sums.direction_squares.to(tl.float64),
        decay_squares=strength * strength * sums.undone_squares.to(tl.float64),
        decay_times_update=strength * exact.lr * sums.undone_times_direction.to(tl.float64),
        equilibrium_squares=tl.where(decays, elements * exact.lr / (2 * exact.weight_decay), 0.0),
        lr=exact.lr,
        beta1=exact.beta1,
        beta2=exact.beta2,
        eps=exact.eps,
        weight_decay=exact.weight_decay,
        decay_rate=decay_rate,
        step=exact.step,
    )


@triton.jit
def _is_healthy(exact, sums, largest, ADDED: tl.constexpr):
    """Whether float32 did the chunk justice: all finite, no square too large or too small."""
    total = tl.zeros([], tl.float64)
    for index in tl.static_range(len(ADDED)):
        total += sums[index].to(tl.float64)
    is_healthy = _is_finite(total) & _is_within(exact.eps, _LOW_EPS, _HIGH_EPS)
    is_healthy &= _is_within(largest.grad_max_abs, _LOW, _HIGH)
    is_healthy &= _is_within(largest.exp_avg_max_abs, _LOW, _HIGH)
    is_healthy &= _is_within(largest.exp_avg_sq_largest, _LOW * _LOW, _HIGH * _HIGH)
    is_healthy &= _is_within(largest.weight_max_abs, _LOW, _HIGH)
    if ADDED[_DIRECTION]:
        is_healthy &= _is_within(largest.direction_max_abs, _LOW, _HIGH)
    return is_healthy


class _Factors(NamedTuple):
    """What elements are multiplied by and compared with, in the numbers of the kernel."""

    lr: Any
    eps: Any
    inverse_eps: Any
    sign: Any
    scale1: Any
    scale2: Any
    forgotten: Any
    """1-β2."""
    decay_rate: Any
    """ηλ."""
    coupled_decay: Any
    is_coupled: Any
    is_moving: Any


@triton.jit
def _factors(exact, NUMBER: tl.constexpr):
    is_coupled = (exact.weight_decay > 0) & (exact.is_decoupled == 0)
    return _Factors(
        lr=exact.lr.to(NUMBER),
        eps=exact.eps.to(NUMBER),
        inverse_eps=(1 / exact.eps).to(NUMBER),
        sign=exact.sign.to(NUMBER),
        scale1=exact.scale1.to(NUMBER),
        scale2=exact.scale2.to(NUMBER),
        forgotten=(1 - exact.beta2).to(NUMBER),
        decay_rate=(exact.lr * exact.weight_decay).to(NUMBER),
        coupled_decay=tl.where(is_coupled, exact.weight_decay, 0.0).to(NUMBER),
        is_coupled=is_coupled,
        is_moving=exact.lr != 0,
    )


class _Elements(NamedTuple):
    """The elementwise quantities; letters and symbols are the catalogue's."""

    p: Any
    g: Any
    m: Any
    v: Any
    v_max: Any
    """Zero without amsgrad."""
    has_second_moment: Any
    """Where ṽ > 0, NaN included."""
    has_denominator: Any
    """Where v̂ > 0, NaN included."""
    inverse_own: Any
    """1/√ṽ."""
    inverse: Any
    """1/√v̂."""
    denominator: Any
    """√v̂."""
    share: Any
    """1/(√v̂+ε)."""
    m_hat: Any
    u: Any
    update: Any
    """ηu."""
    undone: Any
    """p+ηu."""
    entered: Any
    """g̃."""
    active: Any


@triton.jit
def _elements(
    tensor,
    s,
    start,
    places,
    inside,
    KINDS: tl.constexpr,
    AMSGRAD: tl.constexpr,
    NUMBER: tl.constexpr,
    IS_FAST: tl.constexpr,
):
    """Reads elements, and computes of them what several columns need.

    What is fast is wrong for magnitudes that `_is_healthy` does not let pass.
    """
    p = _load(tensor.p, tensor.p_kind, KINDS[0], start, places, inside, NUMBER)
    g = _load(tensor.g, tensor.g_kind, KINDS[1], start, places, inside, NUMBER)
    m = _load(tensor.m, tensor.m_kind, KINDS[2], start, places, inside, NUMBER)
    v = _load(tensor.v, tensor.v_kind, KINDS[3], start, places, inside, NUMBER)
    root, inverse_own = _root(v, s.scale2, IS_FAST)
    if AMSGRAD:
        has_max = inside & (tensor.v_max != 0)
        v_max = _load(tensor.v_max, tensor.v_kind, KINDS[3], start, places, has_max, NUMBER)
        v_hat = tl.where(tensor.v_max != 0, v_max, v)
        denominator, inverse = _root(v_hat, s.scale2, IS_FAST)
    else:
        v_max = tl.zeros_like(v)
        v_hat = v
        denominator = root
        inverse = inverse_own
    if IS_FAST:
        share = tl.rsqrt((denominator + s.eps) * (denominator + s.eps))
    else:
        share = 1 / (denominator + s.eps)
    # Outside, v and eps may both be zero.
    u = tl.where(inside, m * share * s.scale1, 0.0)
    update = s.lr * u
    undone = p + update
    signed = s.sign * g
    entered = signed + s.coupled_decay * undone
    if not IS_FAST:
        # Zero times a parameter that is not finite would be NaN.
        entered = tl.where(s.is_coupled, entered, signed)
    return _Elements(
        p=p,
        g=g,
        m=m,
        v=v,
        v_max=v_max,
        has_second_moment=inside & ~(v <= 0),
        has_denominator=inside & ~(v_hat <= 0),
        inverse_own=inverse_own,
        inverse=inverse,
        denominator=denominator,
        share=share,
        m_hat=m * s.scale1,
        u=u,
        update=update,
        undone=undone,
        entered=entered,
        active=(m != 0) | (v != 0) | (entered != 0),
    )


@triton.jit
def _root(v, scale2, IS_FAST: tl.constexpr):
    """√v̂ and its inverse."""
    # The root is scaled, for of a subnormal v few digits would be left.
    if IS_FAST:
        # The device takes a subnormal number for zero here.
        normal = v * _SHIFT
        denominator = tl.sqrt(normal) * (scale2 * _ROOT_OF_SHIFT)
        inverse = tl.rsqrt(normal) * (1 / (scale2 * _ROOT_OF_SHIFT))
    elif v.dtype == tl.float64:
        denominator = tl.sqrt(v) * scale2
        inverse = 1 / denominator
    else:
        denominator = tl.sqrt_rn(v) * scale2
        inverse = 1 / denominator
    return denominator, inverse


@triton.jit
def _load(address, kind, KIND: tl.constexpr, start, places, inside, NUMBER: tl.constexpr):
    """Elements of a dtype that all tensors share or, where they differ, of the tensor's own."""
    if KIND == _MIXED:
        if kind == _FLOAT32:
            values = _load_as(address, tl.float32, start, places, inside, NUMBER)
        elif kind == _BFLOAT16:
            values = _load_as(address, tl.bfloat16, start, places, inside, NUMBER)
        elif kind == _FLOAT16:
            values = _load_as(address, tl.float16, start, places, inside, NUMBER)
        else:
            values = _load_as(address, tl.float64, start, places, inside, NUMBER)
    elif KIND == _FLOAT32:
        values = _load_as(address, tl.float32, start, places, inside, NUMBER)
    elif KIND == _BFLOAT16:
        values = _load_as(address, tl.bfloat16, start, places, inside, NUMBER)
    else:
        values = _load_as(address, tl.float16, start, places, inside, NUMBER)
    return values


@triton.jit
def _load_as(address, DTYPE: tl.constexpr, start, places, inside, NUMBER: tl.constexpr):
    # A chunk's places are int32, and only its start is more than that can hold.
    first = address.to(tl.pointer_type(DTYPE)) + start
    return _converted(tl.load(first + places, mask=inside, other=0.0), NUMBER)


@triton.jit
def _converted(values, NUMBER: tl.constexpr):
    """To another dtype, by way of float32: torch does so too, to or from 16 bits."""
    return values.to(tl.float32).to(NUMBER) if values.dtype != tl.float64 else values.to(NUMBER)


@triton.jit
def _rounded(values, kind, KIND: tl.constexpr, NUMBER: tl.constexpr):
    """The values as the dtype holds them."""
    if KIND == _MIXED:
        if kind == _FLOAT32:
            rounded = values.to(tl.float32).to(NUMBER)
        elif kind == _BFLOAT16:
            rounded = values.to(tl.float32).to(tl.bfloat16).to(tl.float32).to(NUMBER)
        elif kind == _FLOAT16:
            rounded = values.to(tl.float32).to(tl.float16).to(tl.float32).to(NUMBER)
        else:
            rounded = values
    elif KIND == _BFLOAT16:
        rounded = values.to(tl.bfloat16).to(NUMBER)
    elif KIND == _FLOAT16:
        rounded = values.to(tl.float16).to(NUMBER)
    else:
        rounded = values
    return rounded


@triton.jit
def _smallest_normal(kind, KIND: tl.constexpr, NUMBER: tl.constexpr):
    smallest = tl.full([], 2.0**-126, NUMBER)
    if KIND == _FLOAT16:
        smallest = tl.full([], 2.0**-14, NUMBER)
    elif KIND == _MIXED:
        smallest = tl.where(kind == _FLOAT16, 2.0**-14, smallest)
        if NUMBER == tl.float64:
            smallest = tl.where(kind == _FLOAT64, 2.0**-1022, smallest)
    return smallest


@triton.jit
def _reduced(values, share, NUMBER: tl.constexpr):
    """values·(1-share), in float32 so that a share too small to change 1 is not lost."""
    return values * (1 - share) if NUMBER == tl.float64 else tl.fma(values, -share, values)


@triton.jit
def _has_float64(tensor):
    return (
        (tensor.p_kind == _FLOAT64)
        | (tensor.g_kind == _FLOAT64)
        | (tensor.m_kind == _FLOAT64)
        | (tensor.v_kind == _FLOAT64)
    )


@triton.jit
def _one(condition, NUMBER: tl.constexpr):
    return condition.to(NUMBER)


@triton.jit
def _is_finite(values):
    return tl.abs(values) < _INFINITY


@triton.jit
def _is_within(largest, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Also if it is zero, or the largest of nothing."""
    return (largest <= 0) | ((largest >= LOW) & (largest <= HIGH))


@triton.jit
def _smaller(one, other):
    return tl.minimum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _larger(one, other):
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(values):
    """The largest along the first axis. In float32 NaN is passed over: the sums tell of it."""
    largest = tl.max(values, axis=0)
    if values.dtype == tl.float64:
        number_of_nan = tl.sum((values != values).to(tl.int32), axis=0)
        largest = tl.where(number_of_nan > 0, float("nan"), largest)
    return largest


@triton.jit
def _read(row, WIDTH: tl.constexpr):
    values = ()
    for index in tl.static_range(WIDTH):
        values += (tl.load(row + index),)
    return values


@triton.jit
def _repeated(value, NUMBER: tl.constexpr):
    values = ()
    for _ in tl.static_range(NUMBER):
        values += (value,)
    return values


@triton.jit
def _plus(added, terms, ADDED: tl.constexpr):
    """The sums with those terms that are wanted."""
    sums = ()
    for index in tl.static_range(len(ADDED)):
        if ADDED[index]:
            sums += (added[index] + tl.sum(terms[index], axis=0),)
        else:
            sums += (added[index],)
    return sums


@triton.jit
def _maximum(maxima, terms):
    largest = ()
    for index in tl.static_range(_NUMBER_OF_MAXIMA):
        largest += (_larger(maxima[index], _largest(terms[index])),)
    return largest


@triton.jit
def _over_lanes_added(added):
    sums = ()
    for index in tl.static_range(len(added)):
        sums += (tl.sum(added[index], axis=0),)
    return sums


@triton.jit
def _over_lanes_largest(maxima):
    largest = ()
    for index in tl.static_range(len(maxima)):
        largest += (_largest(maxima[index]),)
    return largest


@triton.jit
def _store(row, values, PLACES: tl.constexpr):
    for index in tl.static_range(len(values)):
        if PLACES[index] >= 0:
            tl.store(row + PLACES[index], values[index].to(tl.float64))


@triton.jit
def _add_up(
    table,
    rows,
    slots,
    result,
    columns,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
):
    """Writes a tensor's row of the result: those columns of its chunks that have a slot there."""
    index = tl.program_id(0).to(tl.int64)
    tensor = _Tensor(*_read(table + index * _FIELDS, _FIELDS))
    chunks = tl.cdiv(tensor.elements, CHUNK)
    column = tl.arange(0, PADDED_WIDTH)
    is_maximum = column >= _SUMS
    nothing = tl.where(is_maximum, -_INFINITY, 0.0).to(tl.float64)
    sums = nothing
    maxima = nothing
    for first in range(0, chunks, PARTS):
        part = first + tl.arange(0, PARTS)
        places = (tensor.first_chunk + part)[:, None] * _WIDTH + column[None, :]
        inside = (part < chunks)[:, None] & (column < _AGAIN)[None, :]
        values = tl.load(rows + places, mask=inside, other=0.0)
        values = tl.where(inside, values, nothing[None, :])
        sums += tl.sum(values, axis=0)
        maxima = _larger(maxima, _largest(values))
    slot = tl.load(slots + column, mask=column < _AGAIN, other=-1)
    values = tl.where(is_maximum, maxima, sums)
    tl.store(result + index * columns + slot, values, mask=slot >= 0)


@triton.jit
def _count_chunks(
    table,
    settings,
    tensors_of_chunks,
    counts,
    KINDS: tl.constexpr,
    AMSGRAD: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    BINS: tl.constexpr,
):
    """Adds a chunk's active elements to the histograms, which are in the order of `QUANTITIES`."""
    chunk = tl.program_id(0).to(tl.int64)
    index = tl.load(tensors_of_chunks + chunk)
    tensor = _Tensor(*_read(table + index * _FIELDS, _FIELDS))
    s = _factors(_Settings(*_read(settings + index * _SETTINGS, _SETTINGS)), tl.float32)
    start = (chunk - tensor.first_chunk) * CHUNK
    size = tl.minimum(tensor.elements - start, CHUNK).to(tl.int32)
    histograms = _repeated(tl.zeros([BINS], tl.int32), 4)
    block = tl.arange(0, ROWS * LANES)
    for first in range(0, size, ROWS * LANES):
        inside = first + block < size
        e = _elements(tensor, s, start, first + block, inside, KINDS, AMSGRAD, tl.float32, False)
        magnitudes = (e.g, e.m_hat, e.denominator, e.u)
        counted = ()
        for quantity in tl.static_range(4):
            exponents = (magnitudes[quantity].to(tl.int32, bitcast=True) >> 23) & 0xFF
            counted += (histograms[quantity] + tl.histogram(exponents, BINS, mask=e.active),)
        histograms = counted
    bins = tl.arange(0, BINS)
    for quantity in tl.static_range(4):
        places = counts + (tensor.group * 4 + quantity) * BINS + bins
        found = histograms[quantity].to(tl.int64)
        tl.atomic_add(places, found, mask=found > 0, sem="relaxed")
