"""A logger that keeps metrics in memory."""

from lightning.pytorch.loggers import CSVLogger


class MemoryLogger(CSVLogger):
    """Keeps the logged metrics in memory, with the step each was logged under."""

    def __init__(self) -> None:
        super().__init__(".", name="recorded")
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.rows.append((step, dict(metrics)))

    def steps_of(self, key: str) -> list[int | None]:
        return [step for step, metrics in self.rows if key in metrics]
