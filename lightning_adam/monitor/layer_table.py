"""`LayerTable`: the statistics of every layer, for W&B."""

from collections.abc import Mapping, Sequence

from lightning.pytorch.loggers import Logger

from lightning_adam.monitor.log_keys import LAYERS
from lightning_adam.monitor.loggers import is_wandb
from lightning_adam.monitor.publishing import log_table

ROWS_AT_ONCE = 1000
"""Number of rows per table. A killed run loses about as many."""


class LayerTable:
    """Collects rows of layers, and sends them to W&B in several tables during the run.

    All tables have the key `adam_layers`. In a W&B panel, `runs.history.concat["adam_layers"]`
    concatenates them.

    Args:
        columns: The names of the columns.

    Example:
        >>> table = LayerTable(["trainer/global_step", "layer", "grad_norm"])
        >>> table.add({"trainer/global_step": 0, "layer": "net.0", "grad_norm": 1.5})
        >>> len(table.rows)
        1
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = list(columns)
        self.rows: list[list[str | float | None]] = []

    def add(self, row: Mapping[str, str | float]) -> None:
        """Adds a row; missing columns are empty."""
        self.rows.append([row.get(column) for column in self.columns])

    def take(self) -> list[list[str | float | None]]:
        """Returns the rows, and removes them."""
        rows, self.rows = self.rows, []
        return rows

    def log(self, logger: Logger, rows: Sequence[Sequence[str | float | None]], step: int) -> None:
        """Logs rows.

        Args:
            logger: A logger; only WandbLogger logs tables.
            rows: The rows.
            step: The logged step.
        """
        if is_wandb(logger):
            import wandb

            # W&B truncates longer tables.
            most = wandb.Table.MAX_ROWS
            for first in range(0, len(rows), most):
                log_table(logger, LAYERS, self.columns, rows[first : first + most], step)
