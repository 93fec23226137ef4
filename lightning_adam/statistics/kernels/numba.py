"""The CPU kernel: one pass over all tensors, compiled by numba, on torch's number of threads.

The tensors are cut into items, which torch's own threads take in turns. numba's would load a second
OpenMP beside torch's, which slows the training step that follows; threads of ours have to share the
processors with torch's, and stand in only where torch has another OpenMP than libgomp. Tensors
whose elements float32 does not do justice to are left to `eager`.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_adam._compat.openmp import run_in_team
from lightning_adam.statistics.accumulators import COLUMNS
from lightning_adam.statistics.histograms import BINS, QUANTITIES
from lightning_adam.statistics.kernels import eager
from lightning_adam.statistics.kernels.numba_loops import (
    BLOCK,
    ROW,
    STORED,
    Array,
    Factors,
    Maxima,
    add_items,
    count_items,
)
from lightning_adam.statistics.views import TensorView, lie_alike

ITEM = 32 * BLOCK
"""Elements of an item, at least: half a megabyte of float32."""
ITEMS = 1 << 13
"""Items into which the largest models are cut, beside one a tensor: they bound the memory."""
TURN = 8 * ITEM
"""Elements that a thread takes at a time, at least: some tenths of a millisecond."""
SAFE = (1e-15, 1e15)
"""Magnitudes whose squares float32 holds with all digits."""
CANCELLED = 1e-3
"""The share of Σp² that Σp₀² has to reach: below, float32 has lost two digits of p₀ or more."""
Result = TypeVar("Result")


def measure(views: Sequence[TensorView], columns: Sequence[str]) -> Tensor:
    """What the columns say of each tensor.

    Args:
        views: Tensors on the CPU, at least one, right after the step.
        columns: Names of `COLUMNS`, in their order.

    Returns:
        The matrix `[tensors, columns]` in float64.

    Example:
        >>> layer = torch.nn.Linear(3, 4, bias=False)
        >>> adam = torch.optim.Adam(layer.parameters())
        >>> layer(torch.ones(3)).sum().backward()
        >>> adam.step()
        >>> from lightning_adam.statistics.views import Views
        >>> measure(Views().after_step(adam), ["elements", "grad_squares", "grad_max_abs"])
        tensor([[12., 12.,  1.]], dtype=torch.float64)
    """
    rows = np.empty((len(views), len(columns)))
    is_left = np.ones(len(views), dtype=bool)
    with np.errstate(all="ignore"):
        for batch in _batches(views):
            row = batch.added_up()
            known = batch.columns(row)
            rows[batch.positions] = np.stack([known[name] for name in columns], axis=1)
            is_left[batch.positions] = ~batch.is_measured(row)
    measured = torch.from_numpy(rows)
    left = is_left.nonzero()[0].tolist()
    if left:
        measured[left] = eager.measure([views[each] for each in left], columns)
    return measured


def count_exponents(views: Sequence[TensorView], groups: Sequence[int]) -> Tensor:
    """Active elements by the binary exponent of each of `QUANTITIES`, for each group of tensors.

    Args:
        views: Tensors on the CPU, at least one, right after the step.
        groups: The position of each tensor's group in what is returned.

    Returns:
        Counts, `[groups, len(QUANTITIES), BINS]` in int64.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(5))
        >>> adam = torch.optim.Adam([weight])
        >>> weight.grad = torch.ones(5)
        >>> adam.step()
        >>> from lightning_adam.statistics.views import Views
        >>> int(count_exponents(Views().after_step(adam), [0])[0, 0, 127])
        5
    """
    counts = np.zeros((max(groups) + 1, len(QUANTITIES), BINS), np.int64)
    is_left = np.ones(len(views), dtype=bool)
    for batch in _batches(views):
        counts += batch.counted(np.array(groups)[batch.positions], counts.shape)
        is_left[batch.positions] = False
    left = is_left.nonzero()[0].tolist()
    if left:
        of_left = eager.count_exponents([views[at] for at in left], [groups[at] for at in left])
        counts[: len(of_left)] += of_left.numpy()
    return torch.from_numpy(counts)


class _Batch:
    """Tensors that one compiled function measures.

    Args:
        positions: Where they stand among all.
        views: The tensors.
        dtypes: Those of their p, g, m, v and max_exp_avg_sq.
        is_coupled: Whether they are under coupled decay.
    """

    def __init__(
        self,
        positions: list[int],
        views: Sequence[TensorView],
        dtypes: Sequence[torch.dtype],
        is_coupled: bool,
    ) -> None:
        self.positions = positions
        self.is_coupled = is_coupled
        self.elements = np.array([view.parameter.numel() for view in views])
        self.settings = _settings(views)
        with np.errstate(all="ignore"):
            self.factors = _factors(self.settings, torch.finfo(dtypes[3]).tiny)
            rate = self.settings.lr * self.settings.weight_decay
            self.decay = self.settings.weight_decay if is_coupled else rate / (1 - rate)
        self.items, self.firsts = _items(self.elements)
        self.arguments = (
            self.items,
            _addresses(views),
            self.factors,
            *(None if dtype is None else STORED[dtype] for dtype in dtypes),
            True if is_coupled else None,
        )

    def added_up(self) -> dict[str, Array]:
        """The row of each tensor, by name."""
        rows = np.zeros((len(self.items), len(ROW)))

        def work(turns: Iterator[tuple[int, int]]) -> None:
            for turn in turns:
                add_items(*turn, *self.arguments, rows)

        _in_threads(work, _turns(self.items))
        maxima = len(Maxima._fields)
        sums = np.add.reduceat(rows[:, :-maxima], self.firsts)
        bits = np.maximum.reduceat(rows[:, -maxima:], self.firsts)
        largest = bits.astype(np.int32).view(np.float32).astype(np.float64)
        return dict(zip(ROW, [*sums.T, *largest.T], strict=True))

    def counted(self, groups: Array, shape: tuple[int, ...]) -> Array:
        """The counts by group, quantity and exponent."""

        def work(turns: Iterator[tuple[int, int]]) -> Array:
            counts = np.zeros(shape, np.int64)
            for turn in turns:
                count_items(*turn, *self.arguments, groups, counts)
            return counts

        counts: Array = np.sum(_in_threads(work, _turns(self.items)), axis=0)
        return counts

    def columns(self, row: dict[str, Array]) -> dict[str, Array]:
        """What the row and the settings say of each of `COLUMNS`."""
        of = self.settings
        known = (
            row
            | of._asdict()
            | {
                "elements": self.elements.astype(np.float64),
                "nonfinite": np.zeros(len(self.elements)),
                "update_squares": of.lr**2 * row["direction_squares"],
                "decay_squares": self.decay**2 * row["undecayed_squares"],
                "decay_times_update": self.decay * of.lr * row["undecayed_times_direction"],
                "equilibrium_squares": np.where(
                    of.weight_decay > 0, self.elements * of.lr / (2 * of.weight_decay), 0
                ),
                "decay_rate": of.lr * of.weight_decay,
                "direction_max_abs": np.where(row["active"] > 0, row["direction_max_abs"], -np.inf),
            }
        )
        if not self.is_coupled:
            known["entered_squares"] = row["grad_squares"]
            known["exp_avg_times_entered"] = of.sign * row["exp_avg_times_entered"]
        is_empty = self.elements == 0
        return {
            name: np.where(is_empty, column.nothing, known[name]) if is_empty.any() else known[name]
            for name, column in COLUMNS.items()
            if name in known
        }

    def is_measured(self, row: dict[str, Array]) -> Array:
        """Whether float32 holds all factors and the squares of what is summed, and tells p₀."""
        moved = row["exp_avg_max_abs"] * row["second_moment_positive"]
        entered = row["entered_squares"] if self.is_coupled else row["grad_max_abs"]
        is_measured: Any = np.isfinite(self.factors).all(axis=1) & np.isfinite(self.decay)
        for magnitudes, source in (
            (row["grad_max_abs"], row["grad_max_abs"]),
            (row["exp_avg_max_abs"], row["exp_avg_max_abs"]),
            (np.sqrt(row["exp_avg_sq_largest"]), row["exp_avg_sq_largest"]),
            (row["direction_max_abs"], row["direction_max_abs"]),
            (_root_mean(row["weight_squares"], row["weight_nonzero"]), row["weight_nonzero"]),
            (_root_mean(row["entered_squares"], row["active"]), row["entered_squares"]),
            (_root_mean(row["entered_over_second_moment"], row["active"]), entered),
            (_root_mean(row["signal"], row["active"]), moved),
            (_root_mean(row["energy_without_eps"], row["active"]), moved),
            (_root_mean(row["energy_lost_to_eps"], row["active"]), moved),
        ):
            is_measured &= (source == 0) | _is_safe(magnitudes)
        if (self.decay > 0).any():
            # Where p is all update, as after the first step from zero, p₀ is a small difference.
            is_told = row["undecayed_squares"] >= CANCELLED * row["weight_squares"]
            is_measured &= is_told | (self.decay == 0)
        return np.asarray(is_measured)


def _root_mean(squares: Array, elements: Array) -> Array:
    return np.sqrt(np.where(elements > 0, squares / np.maximum(elements, 1), 0))


def _is_safe(magnitudes: Any) -> Any:
    return (magnitudes >= SAFE[0]) & (magnitudes <= SAFE[1])


class _Settings(NamedTuple):
    """The hyperparameters of each tensor."""

    lr: Array
    beta1: Array
    beta2: Array
    eps: Array
    weight_decay: Array
    decoupled: Array
    sign: Array
    step: Array


def _settings(views: Sequence[TensorView]) -> _Settings:
    distinct = {id(view.settings): view.settings for view in views}
    positions = {key: position for position, key in enumerate(distinct)}
    table = np.array(
        [
            (
                float(of.lr),
                float(of.beta1),
                float(of.beta2),
                of.eps,
                of.weight_decay,
                of.decoupled,
                -1.0 if of.maximize else 1.0,
            )
            for of in distinct.values()
        ]
    )
    of_views = table[[positions[id(view.settings)] for view in views]]
    return _Settings(
        lr=of_views[:, 0],
        beta1=of_views[:, 1],
        beta2=of_views[:, 2],
        eps=of_views[:, 3],
        weight_decay=of_views[:, 4],
        decoupled=of_views[:, 5],
        sign=of_views[:, 6],
        step=np.array([float(view.step) for view in views]),
    )


def _factors(of: _Settings, normal: float) -> Array:
    columns = Factors(
        first=1 / (1 - of.beta1**of.step),
        root=1 / np.sqrt(1 - of.beta2**of.step),
        eps=of.eps,
        inverse_eps=1 / of.eps,
        lr=of.lr,
        sign=of.sign,
        coupled=of.weight_decay,
        decay_rate=of.lr * of.weight_decay,
        forgotten=1 - of.beta2,
        normal=np.full_like(of.lr, normal),
    )
    return np.stack(columns, axis=1).astype(np.float32)


def _addresses(views: Sequence[TensorView]) -> Array:
    """Of p, g, m, v and max_exp_avg_sq of each tensor; 0 for what there is not."""
    # Attribute by attribute: with thousands of tensors, Python's calls cost more than the kernel.
    columns = [
        [0 if each is None else each.data_ptr() for each in tensors] for tensors in _tensors(views)
    ]
    return np.ascontiguousarray(np.array(columns).T)


def _tensors(views: Sequence[TensorView]) -> list[list[Tensor | None]]:
    """All p, all g, all m, all v and all max_exp_avg_sq."""
    return [
        [view.parameter for view in views],
        [view.grad for view in views],
        [view.exp_avg for view in views],
        [view.exp_avg_sq for view in views],
        [view.max_exp_avg_sq for view in views],
    ]


def _batches(views: Sequence[TensorView]) -> Iterator[_Batch]:
    """The tensors that can be measured, by what decides which function is compiled for them."""
    tensors = _tensors(views)
    dtypes = [[None if each is None else each.dtype for each in same] for same in tensors]
    are_flat = all(each is None or each.is_contiguous() for same in tensors for each in same)
    couplings = {
        id(of): of.weight_decay > 0 and not of.decoupled if _is_safe(of.eps) else None
        for of in {id(view.settings): view.settings for view in views}.values()
    }
    coupled = [couplings[id(view.settings)] for view in views]
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for position, key in enumerate(zip(*dtypes, coupled, strict=True)):
        alike[key].append(position)
    for (*of, v_max, is_coupled), positions in alike.items():
        is_stored = all(each in STORED for each in of) and (v_max is None or v_max in STORED)
        if is_stored and is_coupled is not None:
            chosen = [at for at in positions if are_flat or lie_alike(views[at])]
            own = views if len(chosen) == len(views) else [views[at] for at in chosen]
            if chosen:
                yield _Batch(chosen, own, (*of, v_max), is_coupled)


def _items(elements: Array) -> tuple[Array, Array]:
    """For each item its tensor, first element and end; and the position of each tensor's first."""
    size = max(ITEM, math.ceil(elements.sum() / ITEMS / BLOCK) * BLOCK)
    items = np.maximum(-(-elements // size), 1)
    ends = np.cumsum(items)
    firsts = ends - items
    tensors = np.repeat(np.arange(len(elements)), items)
    starts = (np.arange(ends[-1]) - firsts[tensors]) * size
    return np.stack([tensors, starts, np.minimum(starts + size, elements[tensors])], axis=1), firsts


def _turns(items: Array) -> list[tuple[int, int]]:
    """The first item and the one after the last that a thread takes at a time."""
    before = np.cumsum(items[:, 2] - items[:, 1]) - (items[:, 2] - items[:, 1])
    firsts = np.flatnonzero(np.diff(before // TURN, prepend=-1)).tolist()
    return list(zip(firsts, [*firsts[1:], len(items)], strict=True))


def _in_threads(
    work: Callable[[Iterator[tuple[int, int]]], Result], turns: list[tuple[int, int]]
) -> list[Result]:
    """What the work returns in each of as many threads as torch has; they share the turns."""
    left = iter(turns)
    results: list[Result] = []
    faults: list[BaseException] = []

    def share() -> None:
        try:
            results.append(work(left))
        except BaseException as fault:
            faults.append(fault)

    threads = min(torch.get_num_threads(), len(turns))
    if threads == 1:
        share()
    elif not run_in_team(share, threads):
        with ThreadPoolExecutor(threads - 1) as others:
            for _ in range(threads - 1):
                others.submit(share)
            share()
    if faults:
        raise faults[0]
    return results
