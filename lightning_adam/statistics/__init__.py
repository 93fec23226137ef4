"""The numbers: what each statistic is, where it is read, and how it is computed."""

from lightning_adam.statistics.catalogue import STATISTICS, Statistic
from lightning_adam.statistics.metric import AdamStatistics
from lightning_adam.statistics.views import is_measurable

__all__ = ["STATISTICS", "AdamStatistics", "Statistic", "is_measurable"]
