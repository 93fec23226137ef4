"""AdamStatistics: a torchmetrics.Metric over the optimizer's state, with or without Lightning."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_adam.schema import Scope
from lightning_adam.statistics.catalogue import MAXIMA, STATISTICS, SUMS, Row
from lightning_adam.statistics.kernels import eager
from lightning_adam.statistics.views import key_part, tensor_views


class AdamStatistics(Metric):
    """What an Adam step did, measured right after it.

    The state is the matrix `[tensors, accumulators]` of the latest measurement; it is in float64
    on the optimizer's device, and `compute` is what brings it to the host.

    Args:
        scopes: What the statistics are given for: `model`, `group` (default: both).
        optimizer_name: What tells this optimizer from others in the keys, as in
            `adam_update/update_norm/optimizer/generator` (default: None, it is the only one).

    Example:
        >>> layer = torch.nn.Linear(3, 4)
        >>> adam = torch.optim.Adam(layer.parameters())
        >>> layer(torch.ones(3)).sum().backward()
        >>> adam.step()
        >>> statistics = AdamStatistics()
        >>> statistics.update(adam)
        >>> statistics.compute()["adam_moments/grad_norm"]
        4.0
    """

    full_state_update = False
    sums: Tensor
    maxima: Tensor

    def __init__(
        self,
        scopes: Iterable[str] = (Scope.model, Scope.group),
        optimizer_name: str | None = None,
    ) -> None:
        # Nothing that `tensor_views` admits is sharded: every rank holds the whole numbers.
        super().__init__(sync_on_compute=False)
        self.scopes = [Scope(scope) for scope in scopes]
        self.suffix = "" if optimizer_name is None else f"/optimizer/{key_part(optimizer_name)}"
        self.groups: list[str] = []
        self.add_state("sums", _empty(len(SUMS)), dist_reduce_fx="sum")
        self.add_state("maxima", _empty(len(MAXIMA)), dist_reduce_fx="max")

    def update(self, optimizer: Optimizer) -> None:
        """Measures the step that the optimizer has just taken, in place of the last measurement.

        Args:
            optimizer: An Adam or AdamW, right after `step()`, its gradients still in place.
        """
        views = tensor_views(optimizer)
        self.groups = [view.group for view in views]
        if not views:
            self.sums, self.maxima = _empty(len(SUMS)), _empty(len(MAXIMA))
            return
        device = views[0].parameter.device
        rows = torch.stack([eager.measure(view).to(device, non_blocking=True) for view in views])
        self.sums, self.maxima = torch.split(rows, [len(SUMS), len(MAXIMA)], dim=1)

    def compute(self) -> dict[str, float]:
        """The statistics by key; those that are undefined in a scope are absent.

        Returns:
            `adam_<family>/<statistic>` for the model, `…/group/<name>` for each group. Empty if no
            parameter took part in the step.
        """
        sums, maxima = self.sums.cpu(), self.maxima.cpu()
        values = {}
        for suffix, members in self._scopes().items():
            row = Row(*sums[members].sum(0).tolist(), *maxima[members].amax(0).tolist())
            for statistic in STATISTICS.values():
                value = statistic.derive(row)
                if value is not None:
                    values[statistic.key + suffix] = value
        return values

    def _scopes(self) -> dict[str, list[int]]:
        """What each scope appends to a key, and the rows that belong to it."""
        members: dict[str, list[int]] = {}
        for index, group in enumerate(self.groups):
            if Scope.model in self.scopes:
                members.setdefault(self.suffix, []).append(index)
            if Scope.group in self.scopes:
                members.setdefault(f"{self.suffix}/group/{group}", []).append(index)
        return members


def _empty(columns: int) -> Tensor:
    return torch.zeros(0, columns, dtype=torch.float64)
