"""AdamStatistics: a torchmetrics.Metric over the optimizer's state, with or without Lightning."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric
from typing_extensions import override

from lightning_adam.errors import ConfigError
from lightning_adam.reading import read_monitor
from lightning_adam.schema import Scope
from lightning_adam.statistics.accumulators import ACCUMULATORS, Knowledge
from lightning_adam.statistics.catalogue import STATISTICS, Statistic, key_part, select
from lightning_adam.statistics.histograms import BINS, QUANTITIES
from lightning_adam.statistics.kernels import eager
from lightning_adam.statistics.views import (
    NamedParameters,
    Place,
    Views,
    knowledge_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


class AdamStatistics(Metric):
    """What an Adam step did, measured right after it.

    The state is the matrix `[tensors, accumulators]` of the latest measurement, in float64 on the
    optimizer's device; `compute` is what brings it to the host. Adam and AdamW are measured whole;
    of other optimizers with `betas` and `exp_avg` what their state alone allows to tell.

    Args:
        statistics: What is computed: `headline`, `all`, or a list of names and globs (default:
            headline).
        scopes: What it is computed for: `model`, `group`, `layer`, `tensor` (default: the model and
            its parameter groups).
        worst: For each of these statistics, the tensors with its largest values: their number by
            the statistic's name (default: none).
        layer_depth: Parts of a module's path that make a layer, at least 1 (default: None, all).
        named_parameters: The module's `named_parameters`, uncalled, for the names of layers and
            tensors (default: None, the names that the optimizer was given, or positions).
        optimizer_name: What tells this optimizer from others in the keys, as in
            `adam_update/update_norm/optimizer/generator` (default: None, it is the only one).

    Raises:
        ConfigError: If a statistic or a scope is unknown, or a number is out of range.

    Example:
        >>> layer = torch.nn.Linear(3, 4)
        >>> adam = torch.optim.Adam(layer.parameters())
        >>> layer(torch.ones(3)).sum().backward()
        >>> adam.step()
        >>> statistics = AdamStatistics(["grad_norm", "eps_*"], scopes=["model"])
        >>> statistics.update(adam)
        >>> statistics.compute()["adam_moments/grad_norm"]
        4.0
    """

    full_state_update = False
    sums: Tensor
    maxima: Tensor
    exponents: Tensor

    def __init__(
        self,
        statistics: str | Sequence[str] = "headline",
        scopes: Sequence[str] = (Scope.model, Scope.group),
        *,
        worst: Mapping[str, int] | None = None,
        layer_depth: int | None = None,
        named_parameters: NamedParameters | None = None,
        optimizer_name: str | None = None,
    ) -> None:
        # Nothing that `Views` admits is sharded: every rank holds the whole numbers.
        super().__init__(sync_on_compute=False)
        arguments = {
            "statistics": statistics,
            "scopes": scopes,
            "worst": {} if worst is None else worst,
            "layer_depth": layer_depth,
        }
        config = read_monitor(arguments, "AdamStatistics")
        self.statistics = select(config.statistics)
        self.scopes = config.scopes
        self.worst = {STATISTICS[name]: tensors for name, tensors in config.worst.items()}
        self.suffix = "" if optimizer_name is None else f"/optimizer/{key_part(optimizer_name)}"
        self.knowledge = Knowledge.STEP
        self._views = Views(named_parameters, layer_depth)
        self._columns = _Columns([], [])
        self._places: list[Place] = []
        self._suffixes: dict[tuple[Scope, str], str] = {}
        self._taken: set[str] = set()
        self.add_state("sums", torch.zeros(0, 0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("maxima", torch.zeros(0, 0, dtype=torch.float64), dist_reduce_fx="max")
        self.add_state("exponents", _no_counts(0), dist_reduce_fx="sum")

    @property
    def is_measured(self) -> bool:
        """Whether any parameter took part in the last measurement."""
        return bool(self._places)

    @property
    def not_measured(self) -> list[Statistic]:
        """Those asked for that the optimizer's state does not allow to tell."""
        asked = [*self.statistics, *self.worst]
        return [each for each in asked if each.needs > self.knowledge]

    @property
    def passed_over(self) -> list[str]:
        """Names of the parameters with a gradient that is sparse, or without an `exp_avg`."""
        return self._views.passed_over

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
        views = self._views.after_step(optimizer, skipped_steps)
        self.knowledge = knowledge_of(optimizer, views)
        self._places = [view.place for view in views]
        self._columns = _columns([*self.statistics, *self.worst], self.knowledge)
        sums, maxima = self._columns
        # Tensors may stand on several devices.
        device = views[0].parameter.device if views else torch.device("cpu")
        rows = torch.zeros(len(views), len(sums) + len(maxima), dtype=torch.float64, device=device)
        if rows.numel():
            for row, view in zip(rows, views, strict=True):
                row.copy_(eager.measure(view, [*sums, *maxima]), non_blocking=True)
        self.sums, self.maxima = torch.split(rows, [len(sums), len(maxima)], dim=1)
        groups = list(dict.fromkeys(place.group for place in self._places))
        counted = groups if histograms and self.knowledge is Knowledge.STEP else []
        self.exponents = _no_counts(len(counted)).to(device)
        if counted:
            for view in views:
                counts = eager.count_exponents(view).to(device, non_blocking=True)
                self.exponents[groups.index(view.place.group)] += counts

    def compute(self) -> dict[str, float]:
        """The statistics by key; those that are undefined in a scope are absent.

        Returns:
            `adam_<family>/<statistic>` for the model, followed by `/group/<name>`, `/layer/<path>`
            or `/tensor/<name>` for the other scopes. Empty if no parameter took part in the step.
        """
        values = {}
        for scope in self.scopes:
            for suffix, row in self._rolled_up(scope).items():
                for statistic, value in _derived(self.statistics, row):
                    values[statistic.key + suffix] = value
        return values | self._worst_tensors()

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
            >>> statistics = AdamStatistics("lr", named_parameters=net.named_parameters)
            >>> statistics.update(adam)
            >>> statistics.table("layer")
            [{'layer': '0', 'lr': 0.001}, {'layer': '1', 'lr': 0.001}]
        """
        if scope not in list(Scope):
            raise ConfigError(
                f"AdamStatistics.table: expected group, layer or tensor, but got {scope}; call"
                ' table("layer")'
            )
        names = self._members(Scope(scope)).names
        rows = self._rolled_up(Scope(scope)).values()
        return [
            {scope: name}
            | {statistic.name: value for statistic, value in _derived(self.statistics, row)}
            for name, row in zip(names, rows, strict=True)
        ]

    def compute_exponents(self) -> dict[str, list[int]]:
        """The counts by binary exponent, if the last update took them.

        Returns:
            For each of `histograms.QUANTITIES`, 256 counts under `adam_histogram/<quantity>` for
            the model and `adam_histogram/<quantity>/group/<name>` for each group.
            `histograms.fold` is what is drawn of them; `histograms.dominated_fractions` of those of
            `denominator` is what any eps would dominate.
        """
        by_group = self.exponents.cpu()
        if not len(by_group):
            return {}
        suffixes = self._members(Scope.group).suffixes
        scopes = {self.suffix: by_group.sum(0), **dict(zip(suffixes, by_group, strict=True))}
        return {
            f"adam_histogram/{quantity}{suffix}": counts.tolist()
            for suffix, quantities in scopes.items()
            for quantity, counts in zip(QUANTITIES, quantities, strict=True)
        }

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
        self._places = []

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

    def _members(self, scope: Scope) -> "_Members":
        if scope is Scope.model:
            return _Members(["model"], [self.suffix], [0] * len(self._places))
        names = [getattr(place, scope.value) for place in self._places]
        positions = {name: position for position, name in enumerate(dict.fromkeys(names))}
        suffixes = [self._suffix(scope, name) for name in positions]
        return _Members(list(positions), suffixes, [positions[name] for name in names])

    def _suffix(self, scope: Scope, name: str) -> str:
        """What a group, a layer or a tensor appends to a key, the same at every measurement."""
        if (scope, name) not in self._suffixes:
            suffix = f"{self.suffix}/{scope.value}/{key_part(name)}"
            # Two names may differ only in what no key can hold.
            while suffix in self._taken:
                suffix += "_"
            self._taken.add(suffix)
            self._suffixes[scope, name] = suffix
        return self._suffixes[scope, name]

    def _rolled_up(self, scope: Scope) -> dict[str, dict[str, float]]:
        """The accumulators, by name, of each of the scope's, by what it appends to a key."""
        if not self._places:
            return {}
        suffixes, tensors = self._members(scope)[1:]
        index, (sums, maxima) = torch.tensor(tensors), (self.sums.cpu(), self.maxima.cpu())
        added = sums.new_zeros(len(suffixes), sums.shape[1]).index_add_(0, index, sums)
        largest = maxima.new_full((len(suffixes), maxima.shape[1]), -math.inf)
        largest.scatter_reduce_(0, index[:, None].expand_as(maxima), maxima, "amax")
        names = [*self._columns.sums, *self._columns.maxima]
        rows = torch.cat([added, largest], dim=1).tolist()
        return {
            suffix: dict(zip(names, row, strict=True))
            for suffix, row in zip(suffixes, rows, strict=True)
        }

    def _worst_tensors(self) -> dict[str, float]:
        """The tensors with the largest values of the statistics that `worst` names."""
        worst: dict[str, float] = {}
        rows = self._rolled_up(Scope.tensor) if self.worst else {}
        for statistic, tensors in self.worst.items():
            values = {
                statistic.key + suffix: value
                for suffix, row in rows.items()
                for _, value in _derived([statistic], row)
            }
            # NaN is the worst there is.
            order = {key: math.inf if math.isnan(value) else value for key, value in values.items()}
            for key in sorted(values, key=order.__getitem__, reverse=True)[:tensors]:
                worst[key] = values[key]
        return worst


class _Members(NamedTuple):
    """The scopes of one kind."""

    names: list[str]
    suffixes: list[str]
    """What each appends to a key."""
    tensors: list[int]
    """The position of each tensor's scope."""


class _Columns(NamedTuple):
    """The accumulators that a matrix of rows holds: its sums and its maxima."""

    sums: list[str]
    maxima: list[str]


def _columns(statistics: Iterable[Statistic], knowledge: Knowledge) -> _Columns:
    needed = {
        name
        for statistic in statistics
        if statistic.needs <= knowledge
        for name in statistic.accumulators
    }
    ordered = [name for name in ACCUMULATORS if name in needed]
    return _Columns(
        [name for name in ordered if not ACCUMULATORS[name].is_maximum],
        [name for name in ordered if ACCUMULATORS[name].is_maximum],
    )


def _derived(
    statistics: Iterable[Statistic], row: Mapping[str, float]
) -> Iterator[tuple[Statistic, float]]:
    """Those of a scope's statistics that its accumulators define."""
    for statistic in statistics:
        if all(name in row for name in statistic.accumulators):
            value = statistic.derive(*(row[name] for name in statistic.accumulators))
            if value is not None:
                yield statistic, value


def _no_counts(groups: int) -> Tensor:
    return torch.zeros(groups, len(QUANTITIES), BINS, dtype=torch.int64)
