"""AdamStatistics: a torchmetrics.Metric over the optimizer's state, with or without Lightning."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric
from typing_extensions import override

from lightning_adam.config.errors import ConfigError, ConfigPath, Source, nearest
from lightning_adam.config.monitor import Scope, parse_monitor
from lightning_adam.statistics import kernels
from lightning_adam.statistics.accumulators import Knowledge
from lightning_adam.statistics.catalogue import STATISTICS, Statistic, key_part, select
from lightning_adam.statistics.histograms import BINS, QUANTITIES
from lightning_adam.statistics.measurement import (
    Columns,
    Measurement,
    Tensors,
    Wanted,
    agreement,
    columns_of,
)
from lightning_adam.statistics.selection import check_selection
from lightning_adam.statistics.sharding import Part, is_sharded, over_ranks, this_rank
from lightning_adam.statistics.views import (
    Row,
    TensorView,
    Views,
    dequantised,
    knowledge_of,
    steps_as_adam,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


class AdamStatistics(Metric):
    """What an Adam step did, measured right after it.

    The state is the matrix `[tensors, columns]` of the latest measurement, in float64 on the
    optimizer's device; `compute` is what brings it to the host. Adam and AdamW are measured whole;
    of other optimizers with `betas` and `exp_avg` what their state alone allows to tell. Where
    parameters or state are sharded, all ranks of the default process group update together, and
    each gets the numbers of the whole.

    Args:
        statistics: What is computed: `headline`, `all`, or a list of names and globs (default:
            headline).
        scopes: What it is computed for: `model`, `group`, `layer`, `tensor` (default: the model and
            its parameter groups).
        worst: For each of these statistics, the tensors with its largest values: their number by
            the statistic's name (default: none).
        layer_depth: Parts of a module's path that make a layer, at least 1 (default: None, all).
        module: What the optimizer trains, for the names of layers and tensors (default: None, the
            names that the optimizer was given, or positions). FSDP1 needs it, as it is wrapped.
        optimizer_name: What tells this optimizer from others in the keys, as in
            `adam_update/optimizer/generator/update_norm` (default: None, it is the only one).
        kernel: What reads the tensors: `numba` on the CPU, `triton` on CUDA, `eager` anywhere, at
            many times the cost (default: `auto`, the fast one if it is installed).
        judged: Names of statistics that `measurement` is to tell beside them, as rules need them
            (default: none).

    Raises:
        ConfigError: If a statistic or a scope is unknown, a number is out of range, or the kernel
            is not installed.

    Example:
        >>> layer = torch.nn.Linear(3, 4)
        >>> adam = torch.optim.Adam(layer.parameters())
        >>> layer(torch.ones(3)).sum().backward()
        >>> adam.step()
        >>> statistics = AdamStatistics(["grad_norm", "eps_*"], scopes=["model"])
        >>> statistics.update(adam)
        >>> statistics.compute()["adam_gradient/grad_norm"]
        4.0
    """

    full_state_update = False
    sums: Tensor
    maxima: Tensor
    exponents: Tensor
    agreed: Tensor

    def __init__(
        self,
        statistics: str | Sequence[str] = "headline",
        scopes: Sequence[str] = (Scope.model.value, Scope.group.value),
        *,
        worst: Mapping[str, int] | None = None,
        layer_depth: int | None = None,
        module: nn.Module | None = None,
        optimizer_name: str | None = None,
        kernel: str = "auto",
        judged: Sequence[str] = (),
    ) -> None:
        # What ranks hold in parts, `update` has reduced already.
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
        suffix = "" if optimizer_name is None else f"/optimizer/{key_part(optimizer_name)}"
        worst_of = {STATISTICS[name]: tensors for name, tensors in config.worst.items()}
        for name in judged:
            if name not in STATISTICS:
                problem = f"must hold names of statistics, unlike {name}"
                close = nearest(name, STATISTICS, 1, cutoff=0.0)
                raise (path / "judged").invalid(list(judged), problem, close)
        self.statistics = select(config.statistics)
        self.kernel = config.kernel.value
        self._wanted = Wanted(
            self.statistics, config.scopes, worst_of, suffix, [STATISTICS[name] for name in judged]
        )
        self._views = Views(module, config.layer_depth)
        self._tensors = Tensors([], [], [])
        self._columns = columns_of(self._wanted.accumulators(Knowledge.ALL))
        self.add_state("sums", torch.zeros(0, 0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("maxima", torch.zeros(0, 0, dtype=torch.float64), dist_reduce_fx="max")
        self.add_state("exponents", _no_counts(0), dist_reduce_fx="sum")
        self.add_state("agreed", agreement(Knowledge.ALL), dist_reduce_fx="max")

    @property
    def knowledge(self) -> Knowledge:
        """What the optimizer's state allows to tell."""
        return self.measurement.knowledge

    @property
    def not_measured(self) -> list[Statistic]:
        """Those asked for that the optimizer's state does not allow to tell."""
        return self._wanted.beyond(self.knowledge)

    @property
    def passed_over(self) -> list[str]:
        """Names of the parameters with a gradient that is sparse, or without an `exp_avg`."""
        return self._views.passed_over

    @property
    def measurement(self) -> Measurement:
        """The last measurement, for itself."""
        return Measurement(
            self._wanted,
            self._columns,
            self._tensors,
            self.sums,
            self.maxima,
            self.exponents,
            self.agreed,
        )

    @torch.no_grad()
    def update(
        self,
        optimizer: Optimizer,
        histograms: bool = False,
        skipped_steps: Tensor | float = math.nan,
    ) -> None:
        """Measures the step that the optimizer has just taken, in place of the last measurement.

        Args:
            optimizer: An optimizer of Adam's family, right after `step()`, its gradients still in
                place. A parameter without a gradient takes no part.
            histograms: Whether to count binary exponents too, which costs more than all else
                (default: False). They need Adam or AdamW.
            skipped_steps: The steps that the optimizer has skipped so far, for the statistic of
                that name (default: not known).
        """
        if is_sharded(optimizer):
            self._update_together(optimizer, histograms, skipped_steps)
            return
        views = self._views.after_step(optimizer)
        knowledge = knowledge_of(optimizer, views)
        rows = [Row(*view[:2], view.max_exp_avg_sq is not None) for view in views]
        groups = _groups(rows)
        columns = self._columns_of(knowledge)
        exponents = _no_counts(0)
        if histograms and Knowledge.STEP in knowledge:
            exponents = self._exponents(views, groups)
        part = Part(*self._measured(views, columns, skipped_steps), exponents, agreement(knowledge))
        self._keep(rows, columns, part)

    @torch.no_grad()
    def abstain(
        self, optimizer: Optimizer, histograms: bool = False, has_failed: bool = True
    ) -> None:
        """Takes part with nothing in what the ranks measure together, who wait for this one.

        Args:
            optimizer: The optimizer; if its parameters are not sharded, nothing happens.
            histograms: Whether the others count binary exponents too (default: False).
            has_failed: Whether they are to know that what they measure lacks this rank's part
                (default: True).
        """
        if is_sharded(optimizer):
            self._update_together(
                optimizer, histograms, math.nan, abstains=True, has_failed=has_failed
            )

    def _update_together(
        self,
        optimizer: Optimizer,
        histograms: bool,
        skipped_steps: Tensor | float,
        abstains: bool = False,
        has_failed: bool = True,
    ) -> None:
        rows = self._views.rows(optimizer)
        groups, columns = _groups(rows), self._columns_of(Knowledge.ALL)
        # What this rank has nothing to tell of; of the same shapes on all ranks.
        part = Part(
            torch.zeros(len(rows), len(columns.sums), dtype=torch.float64),
            torch.full((len(rows), len(columns.maxima)), -math.inf, dtype=torch.float64),
            _no_counts(len(groups) if histograms and steps_as_adam(optimizer) else 0),
            agreement(Knowledge.ALL, failed_rank=this_rank() if has_failed else None),
        )
        try:
            if not abstains:
                part = self._own_part(optimizer, part, groups, columns, skipped_steps)
        finally:
            # Whatever has happened here, the other ranks wait for this one.
            parameters = (each for group in optimizer.param_groups for each in group["params"])
            self._keep(rows, columns, over_ranks(part, next(parameters).device))

    def _own_part(
        self,
        optimizer: Optimizer,
        nothing: Part,
        groups: list[str],
        columns: Columns,
        skipped_steps: Tensor | float,
    ) -> Part:
        views = self._views.after_step(optimizer)
        knowledge = knowledge_of(optimizer, views)
        own = self._columns_of(knowledge)
        sums, maxima = self._measured(views, own, skipped_steps)
        exponents = nothing.exponents
        if len(exponents) and views:
            counts = self._exponents(views, groups)
            exponents = torch.cat([counts, exponents[len(counts) :].to(counts.device)])
        at = [view.position for view in views]
        return Part(
            _within(nothing.sums, sums, at, map(columns.sums.index, own.sums)),
            _within(nothing.maxima, maxima, at, map(columns.maxima.index, own.maxima)),
            exponents,
            agreement(knowledge),
        )

    def _columns_of(self, knowledge: Knowledge) -> Columns:
        return columns_of(self._wanted.accumulators(knowledge))

    def _measured(
        self, views: Sequence[TensorView], columns: Columns, skipped_steps: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        # No tensor tells how often the optimizer has skipped.
        asked = [name for name in (*columns.sums, *columns.maxima) if name != "skipped_steps"]
        rows = self._rows(views, asked)
        sums, maxima = torch.tensor_split(rows, [len(columns.sums)], dim=1)
        if "skipped_steps" in columns.maxima:
            maxima = torch.cat([maxima, _column(skipped_steps, rows)], dim=1)
        return sums, maxima

    def _rows(self, views: Sequence[TensorView], columns: Sequence[str]) -> Tensor:
        if not self._views.are_quantised:
            return kernels.measure(views, columns, self.kernel)
        rows = [kernels.measure(each, columns, self.kernel) for each in dequantised(views)]
        return torch.cat([each.to(rows[0].device, non_blocking=True) for each in rows])

    def _exponents(self, views: Sequence[TensorView], groups: list[str]) -> Tensor:
        positions = [groups.index(view.place.group) for view in views]
        return kernels.count_exponents(views, positions, self.kernel)

    def _keep(self, rows: Sequence[Row], columns: Columns, part: Part) -> None:
        self._tensors, self._columns = Tensors.of(rows), columns
        self.sums, self.maxima, self.exponents, self.agreed = part

    def compute(self) -> dict[str, float]:
        """The statistics by key; those that are undefined in a scope are absent.

        Returns:
            `adam_<family>/<statistic>` for the model, followed by `/group/<name>`, `/layer/<path>`
            or `/tensor/<name>` for the other scopes. Empty if no parameter took part in the step.
        """
        self._check()
        return self.measurement.values()

    def table(self, scope: str) -> list[dict[str, str | float]]:
        """The statistics as rows, one for each group, layer or tensor, by their bare names.

        Args:
            scope: `group`, `layer` or `tensor`.

        Returns:
            Rows that begin with the name, under the scope's own, as a data frame takes them.

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
        """The counts by binary exponent, if the last update took them.

        Returns:
            For each of `histograms.QUANTITIES`, 256 counts under `adam_histogram/<quantity>` for
            the model and `adam_histogram/<quantity>/group/<name>` for each group.
            `histograms.fold` is what is drawn of them; `histograms.dominated_fractions` of those of
            `denominator` is what any eps would dominate.
        """
        self._check()
        return self.measurement.exponent_counts()

    def _check(self) -> None:
        if (rank := self.measurement.failed_rank) is not None:
            raise RuntimeError(f"AdamStatistics: the measurement has failed on rank {rank}")

    @override
    def forward(
        self,
        optimizer: Optimizer,
        histograms: bool = False,
        skipped_steps: Tensor | float = math.nan,
    ) -> dict[str, float]:
        """Measures and computes: what one step did has nothing to be accumulated with."""
        self.update(optimizer, histograms, skipped_steps)
        return self.compute()

    @override
    def reset(self) -> None:
        """Forgets the last measurement."""
        super().reset()
        self._tensors = Tensors([], [], [])

    @override
    def plot(
        self,
        val: Mapping[str, float] | Sequence[Mapping[str, float]] | None = None,
        ax: "Axes | None" = None,
    ) -> "tuple[Figure | SubFigure, Axes | list[Axes]]":
        """Draws a panel for each statistic, with a line or a bar for each scope.

        Args:
            val: What `compute` returned, once or as often as was measured (default: None, what it
                returns now).
            ax: Where to draw, if there is one statistic alone (default: None, a new figure).

        Returns:
            The figure and its axes.

        Raises:
            ModuleNotFoundError: Without matplotlib, which `lightning-adam[dashboard]` installs.

        Example:
            >>> weight = torch.nn.Parameter(torch.ones(3))
            >>> adam = torch.optim.Adam([weight])
            >>> statistics = AdamStatistics(["grad_norm", "update_norm"])
            >>> values = []
            >>> for _ in range(3):
            ...     weight.grad = torch.randn(3)
            ...     adam.step()
            ...     values.append(statistics(adam))
            >>> figure, axes = statistics.plot(values)
            >>> [each.get_title() for each in axes]
            ['grad_norm', 'update_norm']
        """
        from lightning_adam.statistics.plots import plot_statistics

        if val is None:
            val = self.compute()
        return plot_statistics([val] if isinstance(val, Mapping) else val, ax)


def _groups(rows: Sequence[Row]) -> list[str]:
    """The names of the groups, in their order."""
    return list(dict.fromkeys(row.place.group for row in rows))


def _column(value: Tensor | float, rows: Tensor) -> Tensor:
    """A number for each of the rows, which may be on the device alone."""
    if isinstance(value, Tensor):
        value = value.to(rows.device, non_blocking=True)
    return rows.new_zeros(len(rows), 1) + value


def _within(nothing: Tensor, part: Tensor, rows: list[int], columns: Iterable[int]) -> Tensor:
    """Some rows and columns of what holds nothing else."""
    whole = nothing.to(part.device, copy=True)
    places = torch.tensor(rows, dtype=torch.int64, device=part.device)
    columns_there = torch.tensor(list(columns), dtype=torch.int64, device=part.device)
    whole[places[:, None], columns_there] = part
    return whole


def _no_counts(groups: int) -> Tensor:
    return torch.zeros(groups, len(QUANTITIES), BINS, dtype=torch.int64)
