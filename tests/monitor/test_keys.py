"""Logged keys: none is a prefix of another, and a default run has few."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import WandbLogger

from lightning_adam import AdamMonitor
from lightning_adam.statistics.catalogue import STATISTICS
from tests.support.monitored import TwoOptimizers
from tests.support.training import ADAMW, Lit, run_training

MOST_CHARTS = 25
SCOPES = ("model", "group", "layer", "tensor")


class KeyLogger(WandbLogger):
    """Keeps the keys that W&B would get, without a run."""

    def __init__(self) -> None:
        super().__init__(offline=True)
        self.keys: set[str] = set()

    @property
    def experiment(self) -> Any:
        def nothing(*arguments: Any, **keywords: Any) -> None:
            pass

        return SimpleNamespace(
            config=SimpleNamespace(update=nothing),
            define_metric=nothing,
            disabled=True,
            offline=True,
            summary={},
        )

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.keys |= {key for key in metrics if key.startswith("adam_")}

    def finalize(self, status: str) -> None:
        pass


def fit(module: Any, monitor: AdamMonitor, **flags: Any) -> set[str]:
    logger = KeyLogger()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_adam.monitor.publishing._save_as_file", lambda *_: None)
        run_training(module, monitor, data=3, logger=logger, **flags)
    return logger.keys


def test_default_wandb_run_has_few_charts() -> None:
    """With clipping, which adds two charts."""
    keys = fit(Lit(ADAMW), AdamMonitor(1), gradient_clip_val=1.0)
    assert "adam_gradient/clip_coefficient" in keys
    assert len(keys) <= MOST_CHARTS


def name_all(module: torch.nn.Module) -> Any:
    """Returns parameter groups with names of scopes and statistics."""
    weights, biases = (
        [each for each in module.parameters() if (each.ndim > 1) == is_matrix]
        for is_matrix in (True, False)
    )
    return [
        {"params": weights, "name": "update_norm", "weight_decay": 0.1},
        {"params": biases, "name": "layer/worst_1", "weight_decay": 0.0},
    ]


class OneOptimizer(Lit):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(name_all(self.net))


class Two(TwoOptimizers):
    def __init__(self) -> None:
        super().__init__(torch.optim.Adam)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(name_all(self.first)), torch.optim.Adam(name_all(self.second))


@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    kind=st.sampled_from([OneOptimizer, Two]),
    scopes=st.lists(st.sampled_from(SCOPES), min_size=1, unique=True),
    statistics=st.sampled_from(["headline", "all"]),
    worst=st.dictionaries(st.sampled_from(sorted(STATISTICS)), st.integers(1, 3), max_size=3),
    histograms=st.booleans(),
    layer_table=st.booleans(),
)
def test_no_key_is_a_prefix_of_another(
    kind: Any,
    scopes: list[str],
    statistics: str,
    worst: dict[str, int],
    histograms: bool,
    layer_table: bool,
) -> None:
    """A file store such as MLflow's writes each key to a file, which cannot be a folder too."""
    monitor = AdamMonitor(
        1,
        scopes,
        statistics,
        worst=worst,
        histograms_every_n_steps=2 if histograms else None,
        layer_table=layer_table,
    )
    keys = fit(kind(), monitor)
    assert {"adam_layers"} <= keys or not layer_table
    assert any(key.startswith("adam_histogram/") for key in keys) == histograms
    parts = [key.split("/") for key in keys]
    parents = {"/".join(each[:depth]) for each in parts for depth in range(1, len(each))}
    assert keys & parents == set()
