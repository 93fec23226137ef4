"""The CPU kernel: one pass over all tensors, compiled by numba, on as many threads as torch has.

Tensors are split into items, which the OpenMP threads of torch process in chunks. numba's threads
would load a second OpenMP runtime, which slows down the next training step. Python threads compete
with those of torch, so they are only used if the OpenMP runtime of torch is not libgomp.

Tensors with elements outside the range of float32 are measured again in float64, and in float64
only until float32 is sufficient. `eager` measures non-contiguous tensors and other dtypes.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_adam._compat.numba import has_compiled
from lightning_adam._compat.openmp import run_in_team
from lightning_adam.statistics.columns import COLUMNS, HYPERPARAMETERS
from lightning_adam.statistics.histograms import BINS, QUANTITIES
from lightning_adam.statistics.kernels import eager
from lightning_adam.statistics.kernels.numba_loops import (
    BLOCK,
    DTYPE_CODES,
    ROW,
    STORED_TYPES,
    Array,
    Factors,
    add_grad_squares,
    add_items,
    add_items_exact,
    count_items,
    count_items_exact,
    read_steps,
)
from lightning_adam.statistics.param_states import (
    ParamStates,
    addresses_of,
    same_layout,
)

ITEM = 32 * BLOCK
"""Smallest number of elements of an item."""
ITEMS = 1 << 13
"""Largest number of items in addition to one per tensor, which bounds the memory."""
CHUNK = 8 * ITEM
"""Smallest number of elements that a thread takes at a time, for some tenths of a millisecond."""
SAFE = (1e-15, 1e15)
"""Range of magnitudes with squares that float32 represents accurately."""
SAFE_EPS = (1e-30, 1e30)
"""Range of eps with an inverse that float32 represents accurately."""
CANCELLED = 1e-3
"""Smallest fraction of Σp² that Σ(p+ηu)² may be: below it, float32 loses two digits or more."""
Result = TypeVar("Result")
Work = Callable[[Iterator[tuple[int, int]]], Result]


def measure(states: ParamStates, columns: Sequence[str]) -> Tensor:
    """Returns the columns of tensors on the CPU; see `eager.measure`."""
    plan = _plan_for(states)
    rows = np.empty((len(columns), len(states)))
    settings = plan.settings(states)
    with np.errstate(all="ignore"):
        for batch in plan.batches:
            row = batch.measure(states, settings)
            for place, name in enumerate(columns):
                rows[place, batch.indexes] = row[name]
    measured = torch.from_numpy(rows).T
    if plan.unsupported:
        measured[plan.unsupported] = eager.measure(states.select(plan.unsupported), columns)
    return measured


def count_exponents(states: ParamStates, groups: Sequence[int], number: int) -> Tensor:
    """Counts active elements on the CPU; see `eager.count_exponents`."""
    plan = _plan_for(states)
    counts = np.zeros((number, len(QUANTITIES), BINS), np.int64)
    settings = plan.settings(states)
    own = np.array(groups, dtype=np.int64)
    with np.errstate(all="ignore"):
        for batch in plan.batches:
            batch.count(states, settings, own[batch.indexes], counts)
    counted = torch.from_numpy(counts)
    if plan.unsupported:
        unsupported_groups = [groups[index] for index in plan.unsupported]
        counted += eager.count_exponents(
            states.select(plan.unsupported), unsupported_groups, number
        )
    return counted


def grad_squares(grads: Sequence[Tensor]) -> Tensor:
    """Returns Σg² of gradients on the CPU; see `eager.grad_squares`."""
    is_read = [
        grad.layout is torch.strided and grad.dtype in DTYPE_CODES and grad.is_contiguous()
        for grad in grads
    ]
    if not all(is_read):
        return eager.grad_squares(grads)
    items, firsts = _items(np.array([grad.numel() for grad in grads]))
    addresses = np.array(addresses_of(grads))
    kinds = np.array([DTYPE_CODES[grad.dtype] for grad in grads])
    squares = np.zeros(len(items))
    _in_threads(_adder(add_grad_squares, items, addresses, kinds, squares), _chunks(items))
    return torch.from_numpy(np.add.reduceat(squares, firsts))


def is_compiled() -> bool:
    """Returns whether the loops are compiled already, in this process or in the cache on disk."""
    return has_compiled(add_items)


class _Settings(NamedTuple):
    """The hyperparameters of each tensor."""

    lr: Array
    beta1: Array
    beta2: Array
    eps: Array
    weight_decay: Array
    sign: Array
    step: Array

    def at(self, indexes: Array) -> "_Settings":
        return _Settings(*(each[indexes] for each in self))


class _Plan:
    """The data that is reused while tensors stay at the same addresses.

    Args:
        states: The tensors.
    """

    def __init__(self, states: ParamStates) -> None:
        self.couplings = _couplings(states)
        self.step_addresses, self.step_kinds = _step_addresses(states)
        self.unsupported: list[int] = []
        """Indexes of the tensors that `eager` measures."""
        batches: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        contiguous = all(
            each is None or each.is_contiguous()
            for each in chain(
                states.parameter,
                states.grad,
                states.exp_avg,
                states.exp_avg_sq,
                states.max_exp_avg_sq,
            )
        )
        for index in range(len(states)):
            state = states[index]
            tensors = (state.parameter, state.grad, state.exp_avg, state.exp_avg_sq)
            dtypes = tuple(None if each is None else each.dtype for each in tensors)
            v_max = None if state.max_exp_avg_sq is None else state.max_exp_avg_sq.dtype
            is_read = all(each in DTYPE_CODES for each in dtypes) and v_max in (None, *DTYPE_CODES)
            if not is_read or not (contiguous or same_layout(state)):
                self.unsupported.append(index)
            else:
                key = (*dtypes, v_max, self.couplings[states.scopes.groups[index]])
                batches[key].append(index)
        self.batches = [
            _Batch(states, indexes, dtypes, is_coupled)
            for (*dtypes, is_coupled), indexes in batches.items()
        ]

    def settings(self, states: ParamStates) -> _Settings:
        """Returns the hyperparameters that the step used."""
        if self.step_addresses is None:
            steps = np.array([float(each) for each in states.step])
        else:
            steps = np.empty(len(states))
            read_steps(self.step_addresses, self.step_kinds, steps)
        table = np.array(
            [
                [float(getattr(of, name)) for name in ("lr", "beta1", "beta2", "eps")]
                + [float(of.weight_decay), -1.0 if of.maximize else 1.0]
                for of in states.settings
            ]
        )
        lr, beta1, beta2, eps, weight_decay, sign = table[states.scopes.groups].T
        return _Settings(lr, beta1, beta2, eps, weight_decay, sign, steps)


def _plan_for(states: ParamStates) -> _Plan:
    known = states.layout.prepared.get("numba")
    if known is None or known.couplings != _couplings(states):
        known = states.layout.prepared["numba"] = _Plan(states)
    plan: _Plan = known
    return plan


def _couplings(states: ParamStates) -> list[bool]:
    return [each.is_coupled for each in states.settings]


def _step_addresses(states: ParamStates) -> tuple[Array | None, Array]:
    """Returns addresses and dtypes of the steps; no addresses unless all are tensors on the CPU."""
    kinds = [
        DTYPE_CODES[each.dtype]
        for each in states.step
        if isinstance(each, Tensor)
        and each.device.type == "cpu"
        and each.dtype in (torch.float32, torch.float64)
    ]
    if len(kinds) < len(states):
        return None, np.array([])
    return np.array(addresses_of(states.step)), np.array(kinds)


class _Batch:
    """Tensors that are measured by one compiled function.

    Args:
        states: All tensors.
        indexes: The indexes of these tensors.
        dtypes: The dtypes of p, g, m, v and max_exp_avg_sq.
        is_coupled: Whether weight decay is coupled.
    """

    def __init__(
        self,
        states: ParamStates,
        indexes: list[int],
        dtypes: Sequence[torch.dtype | None],
        is_coupled: bool,
    ) -> None:
        self.indexes = np.array(indexes)
        self.coupled = True if is_coupled else None
        self.has_amsgrad = dtypes[4] is not None
        own = states.select(indexes)
        self.elements = np.array([each.numel() for each in own.parameter])
        columns: list[Any] = [own.parameter, own.grad, own.exp_avg, own.exp_avg_sq]
        columns.append(own.exp_avg_sq if dtypes[4] is None else own.max_exp_avg_sq)
        addresses = [addresses_of(each) for each in columns]
        self.addresses = np.ascontiguousarray(np.array(addresses).T)
        v = dtypes[3]
        assert v is not None
        kinds = [DTYPE_CODES[each or v] for each in dtypes]
        self.kinds = np.tile(np.array(kinds), (len(indexes), 1))
        self.normal = torch.finfo(v).tiny
        self.tokens: list[Any] | None = None
        if torch.float64 not in dtypes:
            self.tokens = [None if each is None else STORED_TYPES[each] for each in dtypes]
        self.is_exact = np.full(len(indexes), self.tokens is None)
        """Whether a tensor is measured in float64."""
        self.splits: dict[bytes, tuple[Array, Array, list[tuple[int, int]]]] = {}

    def measure(self, states: ParamStates, settings: _Settings) -> dict[str, Array]:
        """Returns the columns of each tensor by name."""
        factors, of = self._refresh(states, settings)
        row = np.zeros((len(self.indexes), len(ROW)))
        is_exact = self.is_exact
        if not is_exact.all():
            self._add(row, ~is_exact, factors)
            is_safe = self._is_safe(row, factors, of)
            is_exact = is_exact | ~is_safe
        if is_exact.any():
            row[is_exact] = 0
            self._add(row, is_exact, factors, exact=True)
        if self.tokens is not None and is_exact.any():
            is_exact = is_exact & ~self._is_safe(row, factors, of)
        self.is_exact = is_exact
        return self._columns(row, of)

    def count(self, states: ParamStates, settings: _Settings, groups: Array, counts: Array) -> None:
        """Adds the counts by group, quantity and exponent."""
        factors, _ = self._refresh(states, settings)
        for exact in (False, True):
            chosen = self.is_exact if exact else ~self.is_exact
            if chosen.any():
                items, _, chunks = self._split(chosen)
                function, arguments = self._call(exact, factors, count_items, count_items_exact)
                work = _counter(function, (items, *arguments, groups), counts.shape)
                counts += np.sum(_in_threads(work, chunks), axis=0)

    def _refresh(self, states: ParamStates, settings: _Settings) -> tuple[Array, _Settings]:
        """Returns the factors and hyperparameters of this step."""
        grads = states.grad
        if len(self.indexes) < len(states):
            grads = [grads[index] for index in self.indexes]
        self.addresses[:, 1] = addresses_of(grads)
        of = settings if len(self.indexes) == len(states) else settings.at(self.indexes)
        factors = Factors(
            first=1 / (1 - of.beta1**of.step),
            root=1 / np.sqrt(1 - of.beta2**of.step),
            eps=of.eps,
            inverse_eps=1 / of.eps,
            lr=of.lr,
            sign=of.sign,
            coupled=of.weight_decay if self.coupled else np.zeros_like(of.lr),
            decay_rate=of.lr * of.weight_decay,
            one_minus_beta2=1 - of.beta2,
            normal=np.full_like(of.lr, self.normal),
        )
        return np.stack(factors, axis=1), of

    def _call(
        self, exact: bool, factors: Array, in_float32: Any, in_float64: Any
    ) -> tuple[Any, tuple[Any, ...]]:
        """Returns a compiled function and its arguments between the items and the result."""
        if exact:
            return in_float64, (self.addresses, self.kinds, factors)
        assert self.tokens is not None
        singles = factors.astype(np.float32)
        return in_float32, (self.addresses, singles, *self.tokens, self.coupled)

    def _add(self, row: Array, chosen: Array, factors: Array, exact: bool = False) -> None:
        """Sums over the elements of some of the tensors."""
        items, firsts, chunks = self._split(chosen)
        rows = np.zeros((len(items), len(ROW)))
        function, arguments = self._call(exact, factors, add_items, add_items_exact)
        _in_threads(_adder(function, items, *arguments, rows), chunks)
        if len(items) > len(firsts):
            sums = np.add.reduceat(rows[:, :-NUM_MAXIMA], firsts)
            rows = np.hstack([sums, np.maximum.reduceat(rows[:, -NUM_MAXIMA:], firsts)])
        if chosen.all():
            row[:] = rows
        else:
            row[chosen] = rows

    def _split(self, chosen: Array) -> tuple[Array, Array, list[tuple[int, int]]]:
        """Returns the items of some tensors, the first item of each tensor, and the chunks."""
        key = b"" if chosen.all() else np.packbits(chosen).tobytes()
        if key not in self.splits:
            items, firsts = _items(self.elements[chosen])
            items[:, 0] = np.flatnonzero(chosen)[items[:, 0]]
            # A measurement needs few of them, which rarely change.
            if len(self.splits) > 8:
                self.splits.clear()
            self.splits[key] = items, firsts, _chunks(items)
        return self.splits[key]

    def _columns(self, row: Array, of: _Settings) -> dict[str, Array]:
        known = dict(zip(ROW, row.T, strict=True))
        known |= {name: getattr(of, name) for name in HYPERPARAMETERS}
        known["elements"] = self.elements.astype(np.float64)
        known["normalized_update_max_abs"] = np.where(
            known["active"] > 0, known["normalized_update_max_abs"], -np.inf
        )
        if self.coupled is None:
            known["effective_grad_squares"] = known["grad_squares"]
        if not self.has_amsgrad:
            known["max_exp_avg_sq_sum"] = np.zeros(len(self.indexes))
        if not self.elements.all():
            is_empty = self.elements == 0
            for name, column in COLUMNS.items():
                known[name] = np.where(is_empty, column.empty, known[name])
        return known

    def _is_safe(self, row: Array, factors: Array, of: _Settings) -> Array:
        """Returns for which tensors float32 is accurate: for factors, squared terms and p+ηu."""
        known = dict(zip(ROW, row.T, strict=True))
        active, nonzero = known["active"], known["weight_nonzero"]
        moved = known["exp_avg_max_abs"] * known["second_moment_positive"]
        effective = known["grad_max_abs"]
        if self.coupled:
            effective = known["effective_grad_squares"]
        is_safe: Any = np.isfinite(factors.astype(np.float32)).all(axis=1)
        is_safe &= (of.eps >= SAFE_EPS[0]) & (of.eps <= SAFE_EPS[1])
        for magnitudes, source in (
            (known["grad_max_abs"], known["grad_max_abs"]),
            (known["exp_avg_max_abs"], known["exp_avg_max_abs"]),
            (np.sqrt(known["exp_avg_sq_largest"]), known["exp_avg_sq_largest"]),
            (known["normalized_update_max_abs"], known["normalized_update_max_abs"]),
            (_root_mean(known["weight_squares"], nonzero), nonzero),
            (_root_mean(known["grad_over_second_moment"], active), effective),
            (_root_mean(known["signal"], active), moved),
            (_root_mean(known["energy_without_eps"], active), moved),
            (_root_mean(known["energy_lost_to_eps"], active), moved),
        ):
            is_safe &= (source == 0) | ((magnitudes >= SAFE[0]) & (magnitudes <= SAFE[1]))
        if self.coupled:
            for name in ("effective_grad_squares", "undecayed_over_denominator_squares"):
                magnitudes = _root_mean(known[name], active)
                is_safe &= (known[name] == 0) | ((magnitudes >= SAFE[0]) & (magnitudes <= SAFE[1]))
        # p+ηu cancels if p consists of the update, as after the first step from zero.
        is_accurate = known["undecayed_squares"] >= CANCELLED * known["weight_squares"]
        return np.asarray(is_safe & (is_accurate | (of.weight_decay == 0)))


NUM_MAXIMA = 4
"""Number of maxima, the last columns of a row."""


def _root_mean(squares: Array, elements: Array) -> Array:
    return np.sqrt(np.where(elements > 0, squares / np.maximum(elements, 1), 0))


def _items(elements: Array) -> tuple[Array, Array]:
    """Returns the tensor, start and end of each item, and the index of each tensor's first item."""
    size = max(ITEM, math.ceil(elements.sum() / ITEMS / BLOCK) * BLOCK)
    items = np.maximum(-(-elements // size), 1)
    ends = np.cumsum(items)
    firsts = ends - items
    tensors = np.repeat(np.arange(len(elements)), items)
    starts = (np.arange(ends[-1]) - firsts[tensors]) * size
    return np.stack([tensors, starts, np.minimum(starts + size, elements[tensors])], axis=1), firsts


def _chunks(items: Array) -> list[tuple[int, int]]:
    """Returns the ranges of items that a thread takes at a time."""
    before = np.cumsum(items[:, 2] - items[:, 1]) - (items[:, 2] - items[:, 1])
    firsts = np.flatnonzero(np.diff(before // CHUNK, prepend=-1)).tolist()
    return list(zip(firsts, [*firsts[1:], len(items)], strict=True))


def _adder(function: Any, *arguments: Any) -> Work[None]:
    """Returns a function that sums over the items of chunks."""

    def work(chunks: Iterator[tuple[int, int]]) -> None:
        for chunk in chunks:
            function(*chunk, *arguments)

    return work


def _counter(function: Any, arguments: tuple[Any, ...], shape: tuple[int, ...]) -> Work[Array]:
    """Returns a function that counts over the items of chunks, with separate counts per thread."""

    def work(chunks: Iterator[tuple[int, int]]) -> Array:
        counts = np.zeros(shape, np.int64)
        for chunk in chunks:
            function(*chunk, *arguments, counts)
        return counts

    return work


def _in_threads(work: Work[Result], chunks: list[tuple[int, int]]) -> list[Result]:
    """Runs the work in as many threads as torch has, and returns all results."""
    remaining = iter(chunks)
    results: list[Result] = []
    faults: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work(remaining))
        except BaseException as fault:
            faults.append(fault)

    threads = min(torch.get_num_threads(), len(chunks))
    if threads == 1:
        run()
    elif not run_in_team(run, threads):
        with ThreadPoolExecutor(threads - 1) as pool:
            for _ in range(threads - 1):
                pool.submit(run)
            run()
    if faults:
        raise faults[0]
    return results
