"""The catalogue is whole: its names are the promised keys, its columns are what kernels fill."""

import re

import pytest
import torch

from lightning_adam.statistics import STATISTICS, Statistic
from lightning_adam.statistics.catalogue import MAXIMA, SUMS, Row
from lightning_adam.statistics.kernels import eager
from lightning_adam.statistics.views import tensor_views
from tests.statistics.cases import stepped

HEADLINE = {
    "moments": [
        "grad_norm",
        "exp_avg_rms",
        "exp_avg_sq_mean",
        "denominator_mean",
        "momentum_alignment",
        "exp_avg_sq_lag",
    ],
    "underflow": [
        "eps_dominated_fraction",
        "eps_energy_loss",
        "exp_avg_sq_zero_fraction",
        "update_lost_fraction",
        "nonfinite_count",
    ],
    "update": ["update_norm", "direction_rms", "update_to_weight"],
    "weight_decay": ["weight_norm", "decay_norm", "decay_to_update"],
    "schedule": ["lr"],
}


def test_the_keys_are_the_promised_ones() -> None:
    promised = [f"adam_{family}/{name}" for family, names in HEADLINE.items() for name in names]
    assert [statistic.key for statistic in STATISTICS.values()] == promised


@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
def test_every_statistic_explains_itself(statistic: Statistic) -> None:
    assert statistic.formula
    assert statistic.meaning.endswith(".")
    assert re.fullmatch(r"adam_[a-z_]+/[a-z0-9_]+", statistic.key)


def test_a_kernel_fills_every_column() -> None:
    optimizer = stepped([torch.nn.Parameter(torch.randn(3))], decoupled=True)
    row = eager.measure(tensor_views(optimizer)[0])
    assert row.shape == (len(Row._fields),)
    assert row.dtype is torch.float64
    assert Row._fields == SUMS + MAXIMA
