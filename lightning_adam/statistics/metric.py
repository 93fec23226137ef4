"""`AdamStatistics`: a torchmetrics.Metric of the optimizer state, with or without Lightning."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric
from typing_extensions import override

from lightning_adam.config.errors import ConfigError, ConfigPath, Source, nearest
from lightning_adam.config.monitor import Scope, parse_monitor
from lightning_adam.statistics import kernels
from lightning_adam.statistics.catalogue import STATISTICS, Statistic, select
from lightning_adam.statistics.columns import GIVEN, Capabilities, ParamSubset
from lightning_adam.statistics.histograms import BINS, QUANTITIES
from lightning_adam.statistics.measurement import (
    Columns,
    Measurement,
    MetricRequest,
    rank_status,
)
from lightning_adam.statistics.param_states import ParamStates, dequantized
from lightning_adam.statistics.scopes import Scopes
from lightning_adam.statistics.selection import check_selection
from lightning_adam.statistics.sharding import (
    LocalStats,
    all_reduce_stats,
    is_sharded,
    this_rank,
    unwrap_wrapper,
)
from lightning_adam.statistics.state_reader import StateReader, capabilities_of, steps_as_adam


class AdamStatistics(Metric):
    """Computes statistics of an Adam step, right after the step.

    The metric state is the matrix `[tensors, columns]` of the latest measurement, in float64 on the
    device of the optimizer. `compute` copies it to the host. Adam and AdamW have all statistics;
    other optimizers with `betas` and `exp_avg` have those that their state provides. If parameters
    or state are sharded, all ranks of the default process group update together, and each gets the
    statistics of the whole model.

    Args:
        statistics: Statistics to compute: `headline`, `all`, or a list of names and globs (default:
            headline).
        scopes: Sets of tensors to describe: `model`, `group`, `layer`, `tensor` (default: the
            model).
        worst: By name of a statistic: number of tensors with the largest values to return (default:
            none).
        layer_depth: Number of parts of a module's path that form a layer's name, at least 1
            (default: None, all).
        module: Module that the optimizer trains, for the names of layers and tensors (default:
            None, the names in the optimizer, or positions). FSDP1 requires the wrapped module.
        optimizer_name: Name of the optimizer in the keys, as in
            `adam_update/optimizer/generator/update_norm` (default: None, it is the only one).
        kernel: Implementation that reads the tensors: `numba` on the CPU, `triton` on CUDA, `eager`
            on any device, many times slower (default: `auto`, the fast one if it is installed).
        rule_statistics: Names of additional statistics that are only in `measurement`, for rules
            (default: none).

    Raises:
        ConfigError: If a statistic or a scope is unknown, a number is out of range, or the kernel
            is not installed.

    Example:
        >>> layer = torch.nn.Linear(3, 4)
        >>> adam = torch.optim.Adam(layer.parameters())
        >>> layer(torch.ones(3)).sum().backward()
        >>> adam.step()
        >>> statistics = AdamStatistics(["grad_norm", "eps_*"])
        >>> statistics.update(adam)
        >>> statistics.compute()["adam_gradient/grad_norm"]
        4.0
    """

    full_state_update = False
    sums: Tensor
    maxima: Tensor
    exponents: Tensor
    status: Tensor

    def __init__(
        self,
        statistics: str | Sequence[str] = "headline",
        scopes: Sequence[str] = (Scope.model.value,),
        *,
        worst: Mapping[str, int] | None = None,
        layer_depth: int | None = None,
        module: nn.Module | None = None,
        optimizer_name: str | None = None,
        kernel: str = "auto",
        rule_statistics: Sequence[str] = (),
    ) -> None:
        # `update` reduces over ranks, so that `compute` need not.
        super().__init__(sync_on_compute=False)
        arguments = {
            "statistics": statistics,
            "scopes": scopes,
            "worst": {} if worst is None else worst,
            "layer_depth": layer_depth,
            "kernel": kernel,
        }
        path = ConfigPath("AdamStatistics", source=Source.PYTHON)
        selection = parse_monitor(arguments, path)
        check_selection(selection)
        config = selection.config
        for name in rule_statistics:
            if name not in STATISTICS:
                problem = f"must hold names of statistics, unlike {name}"
                close = nearest(name, STATISTICS, 1, cutoff=0.0)
                raise (path / "rule_statistics").invalid(list(rule_statistics), problem, close)
        self.statistics = select(config.statistics)
        self.kernel = config.kernel.value
        self._request = MetricRequest(
            self.statistics,
            config.scopes,
            {STATISTICS[name]: tensors for name, tensors in config.worst.items()},
            optimizer_name or "",
            [STATISTICS[name] for name in rule_statistics],
        )
        self._reader = StateReader(module, config.layer_depth)
        self._scopes = Scopes([], [])
        self._subsets: list[frozenset[ParamSubset]] = []
        self._columns = self._request.columns(Capabilities.ALL)
        self._before_clip: Tensor | None = None
        self.add_state("sums", torch.zeros(0, 0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("maxima", torch.zeros(0, 0, dtype=torch.float64), dist_reduce_fx="max")
        self.add_state("exponents", _no_counts(0), dist_reduce_fx="sum")
        self.add_state("status", rank_status(Capabilities.ALL), dist_reduce_fx="max")

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities of the optimizer."""
        return self.measurement.capabilities

    @property
    def not_measured(self) -> list[Statistic]:
        """The requested statistics that the optimizer does not provide."""
        return self._request.unavailable(self.capabilities)

    @property
    def skipped(self) -> list[str]:
        """Names of the parameters without `exp_avg`, or with a sparse gradient."""
        return self._reader.skipped

    @property
    def measurement(self) -> Measurement:
        """The last measurement."""
        stats = LocalStats(self.sums, self.maxima, self.exponents, self.status)
        return Measurement(self._request, self._columns, self._scopes, self._subsets, stats)

    @torch.no_grad()
    def before_clip(self, optimizer: Optimizer) -> None:
        """Measures the gradient norms before clipping, for the next `update`.

        Args:
            optimizer: The optimizer, between `backward()` and clipping, with unscaled gradients.
        """
        grads = self._reader.gradients(unwrap_wrapper(optimizer))
        self._before_clip = kernels.grad_squares(grads, self.kernel)

    @torch.no_grad()
    def update(
        self,
        optimizer: Optimizer,
        histograms: bool = False,
        skipped_steps: Tensor | float = math.nan,
        loss_scale: Tensor | float = math.nan,
    ) -> None:
        """Measures the step that the optimizer has just taken. Replaces the last measurement.

        Args:
            optimizer: An optimizer of Adam's family right after `step()`, with its gradients.
                Parameters without a gradient are not measured.
            histograms: Whether to also count binary exponents, which takes more time than all
                other statistics and requires Adam or AdamW (default: False).
            skipped_steps: Number of steps that the optimizer has skipped so far (default: unknown).
            loss_scale: Scale of the GradScaler (default: none).
        """
        optimizer = unwrap_wrapper(optimizer)
        given = {"skipped_steps": skipped_steps, "loss_scale": loss_scale}
        if is_sharded(optimizer):
            self._update_together(optimizer, histograms, given)
            return
        states = self._reader.after_step(optimizer)
        capabilities = capabilities_of(optimizer, states)
        columns = self._request.columns(capabilities)
        exponents = _no_counts(0)
        if histograms and Capabilities.STEP in capabilities:
            exponents = self._exponents(states, states.scopes.group_names)
        sums, maxima = self._measure(states, columns, given)
        self._scopes, self._columns = states.scopes, columns
        self._store(states.settings, LocalStats(sums, maxima, exponents, rank_status(capabilities)))

    @torch.no_grad()
    def update_empty(
        self, optimizer: Optimizer, histograms: bool = False, has_failed: bool = True
    ) -> None:
        """Takes part in the collectives of `update` on other ranks, without measuring.

        Args:
            optimizer: The optimizer. Does nothing if its parameters are not sharded.
            histograms: Whether the other ranks count binary exponents (default: False).
            has_failed: Whether to report a failure of this rank (default: True).
        """
        optimizer = unwrap_wrapper(optimizer)
        if is_sharded(optimizer):
            failed_rank = this_rank() if has_failed else None
            empty = self._empty(optimizer, histograms, failed_rank)
            self._reduce(optimizer, empty)

    def _update_together(
        self, optimizer: Optimizer, histograms: bool, given: Mapping[str, Tensor | float]
    ) -> None:
        stats = self._empty(optimizer, histograms, this_rank())
        try:
            stats = self._local_stats(optimizer, stats, given)
        finally:
            # Even on an error, as the other ranks wait for this one.
            self._reduce(optimizer, stats)

    def _empty(self, optimizer: Optimizer, histograms: bool, failed_rank: int | None) -> LocalStats:
        """Returns the columns of a rank without parameters, with the same shapes on all ranks."""
        self._scopes = self._reader.all_scopes(optimizer)
        self._columns = self._request.columns(Capabilities.ALL)
        parameters, columns = len(self._scopes), self._columns
        groups = len(self._scopes.group_names) if histograms and steps_as_adam(optimizer) else 0
        return LocalStats(
            torch.zeros(parameters, len(columns.sums), dtype=torch.float64, device="cpu"),
            torch.full(
                (parameters, len(columns.maxima)), -math.inf, dtype=torch.float64, device="cpu"
            ),
            _no_counts(groups),
            rank_status(Capabilities.ALL, failed_rank),
        )

    def _reduce(self, optimizer: Optimizer, stats: LocalStats) -> None:
        parameters = (each for group in optimizer.param_groups for each in group["params"])
        self._store(
            self._reader.settings(optimizer), all_reduce_stats(stats, next(parameters).device)
        )

    def _local_stats(
        self, optimizer: Optimizer, empty: LocalStats, given: Mapping[str, Tensor | float]
    ) -> LocalStats:
        states = self._reader.after_step(optimizer)
        capabilities = capabilities_of(optimizer, states)
        columns = self._request.columns(capabilities)
        sums, maxima = self._measure(states, columns, given)
        exponents = empty.exponents
        if len(exponents) and len(states):
            exponents = self._exponents(states, self._scopes.group_names)
        return LocalStats(
            _insert(empty.sums, sums, states.positions, self._columns.sums, columns.sums),
            _insert(empty.maxima, maxima, states.positions, self._columns.maxima, columns.maxima),
            exponents,
            rank_status(capabilities),
        )

    def _measure(
        self, states: ParamStates, columns: Columns, given: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, Tensor]:
        given = {**given, "grad_squares_before_clip": self._squares_before_clip(states)}
        # Columns from the caller come last.
        read, others = zip(*map(_split, columns), strict=True)
        rows = self._rows(states, [*read[0], *read[1]])
        parts = torch.tensor_split(rows, [len(read[0])], dim=1)
        sums, maxima = (
            torch.cat([part, *(_column_of(given[name], rows) for name in names)], dim=1)
            for part, names in zip(parts, others, strict=True)
        )
        return sums, maxima

    def _squares_before_clip(self, states: ParamStates) -> Tensor | float:
        squares, self._before_clip = self._before_clip, None
        if squares is None:
            return math.nan
        positions = torch.tensor(states.positions, dtype=torch.int64, device="cpu")
        return squares[positions.to(squares.device, non_blocking=True)]

    def _rows(self, states: ParamStates, columns: Sequence[str]) -> Tensor:
        if not self._reader.are_quantized:
            return kernels.measure(states, columns, self.kernel)
        rows = [kernels.measure(each, columns, self.kernel) for each in dequantized(states)]
        return torch.cat([each.to(rows[0].device, non_blocking=True) for each in rows])

    def _exponents(self, states: ParamStates, groups: Sequence[str]) -> Tensor:
        indexes = [groups.index(name.group) for name in states.scopes.names]
        return kernels.count_exponents(states, indexes, len(groups), self.kernel)

    def _store(self, settings: Sequence[Any], stats: LocalStats) -> None:
        self._subsets = [each.subsets for each in settings]
        self.sums, self.maxima, self.exponents, self.status = stats

    def compute(self) -> dict[str, float]:
        """Returns the statistics by key. Undefined ones are absent.

        Returns:
            `adam_<family>/<statistic>` for the model, `adam_<family>/group/<name>/<statistic>`,
            `adam_<family>/layer/<path>/<statistic>` or `adam_<family>/tensor/<name>/<statistic>`
            for other scopes, and `adam_<family>/worst_1/<statistic>` for `worst`. A single
            parameter group is the model. Empty if no parameter took part in the step.
        """
        self._check()
        return self.measurement.values()

    def table(self, scope: str) -> list[dict[str, str | float]]:
        """Returns the statistics by name as rows, one for each group, layer or tensor.

        Args:
            scope: `group`, `layer` or `tensor`.

        Returns:
            Rows that begin with the name of the scope, for example for a data frame.

        Raises:
            ConfigError: If the scope is none of these.

        Example:
            >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
            >>> adam = torch.optim.Adam(net.parameters())
            >>> net(torch.ones(3)).sum().backward()
            >>> adam.step()
            >>> statistics = AdamStatistics("lr", module=net)
            >>> statistics.update(adam)
            >>> statistics.table("layer")
            [{'layer': '0', 'lr': 0.001}, {'layer': '1', 'lr': 0.001}]
        """
        if scope not in list(Scope):
            raise ConfigError(
                f"AdamStatistics.table: scope={scope!r} must be 'group', 'layer' or 'tensor'",
                'Use for example table("layer")',
            )
        self._check()
        return self.measurement.table(Scope(scope))

    def compute_exponents(self) -> dict[str, list[int]]:
        """Returns the counts by binary exponent of the last update with `histograms=True`.

        Returns:
            For each of `histograms.QUANTITIES`, 256 counts under `adam_histogram/<quantity>` for
            the model and, with several groups, `adam_histogram/group/<name>/<quantity>` for each.
            `histograms.fold` converts them for a chart. `histograms.dominated_fractions` computes
            the fraction of elements that an eps would dominate from those of `denominator`.
        """
        self._check()
        return self.measurement.exponent_counts()

    def _check(self) -> None:
        if (rank := self.measurement.failed_rank) is not None:
            raise RuntimeError(f"AdamStatistics: the measurement failed on rank {rank}")

    @override
    def forward(
        self,
        optimizer: Optimizer,
        histograms: bool = False,
        skipped_steps: Tensor | float = math.nan,
        loss_scale: Tensor | float = math.nan,
    ) -> dict[str, float]:
        """Measures a step and returns its statistics. Nothing is accumulated over steps."""
        self.update(optimizer, histograms, skipped_steps, loss_scale)
        return self.compute()

    @override
    def reset(self) -> None:
        """Discards the last measurement."""
        super().reset()
        self._scopes = Scopes([], [])


def _column_of(value: Tensor | float, rows: Tensor) -> Tensor:
    """Returns a column with one number, or one for each row, without waiting for the device."""
    if isinstance(value, Tensor):
        value = value.to(rows.device, non_blocking=True).reshape(-1, 1)
    return rows.new_zeros(len(rows), 1) + value


def _split(columns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates the columns of the kernels from those of the caller."""
    return [each for each in columns if each not in GIVEN], [
        each for each in columns if each in GIVEN
    ]


def _insert(
    empty: Tensor,
    part: Tensor,
    positions: Sequence[int],
    columns: Sequence[str],
    own: Iterable[str],
) -> Tensor:
    """Inserts the rows and columns of this rank into the matrix of all parameters."""
    whole = empty.to(part.device, copy=True)
    rows = torch.tensor(positions, dtype=torch.int64, device=part.device)
    at = torch.tensor([columns.index(name) for name in own], dtype=torch.int64, device=part.device)
    whole[rows[:, None], at] = part
    return whole


def _no_counts(groups: int) -> Tensor:
    return torch.zeros(groups, len(QUANTITIES), BINS, dtype=torch.int64, device="cpu")
