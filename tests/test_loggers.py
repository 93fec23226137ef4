"""Histograms, curves and tables, read back from what W&B and TensorBoard left on the disk."""

import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import Tensor

from lightning_adam import AdamMonitor
from lightning_adam.schema import Scope
from lightning_adam.statistics.catalogue import STATISTICS
from tests.statistics.cases import reference_tensors
from tests.support.commands import DECAY, MODEL, NO_DECAY, history, offline_runs, records
from tests.support.offline import (
    Row,
    Table,
    Trained,
    csv_rows,
    events_under,
    fitted,
    have_same_parameters,
    steps_of,
    tables,
    with_logger,
)
from tests.support.oracle import reference_magnitudes
from tests.support.training import ADAMW, Lit, loader, loss_of, network, trainer

GRAD_NORM = STATISTICS["grad_norm"].key
QUANTITIES = ("grad", "exp_avg", "denominator", "direction")
GROUPS = {MODEL: None, DECAY: 0, NO_DECAY: 1}
"""The position of each scope's group in the optimizer."""
LINES = {MODEL: "model", DECAY: "group/decay", NO_DECAY: "group/no_decay"}
PARAMETERS = sum(parameter.numel() for parameter in network().parameters())
EPS_CURVE = "adam_underflow/eps_curve"


def test_wandb_is_imported_by_those_who_log_to_it_only() -> None:
    script = "import sys; from lightning_adam import AdamMixin, AdamMonitor; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "lightning_adam.loggers" in ran.stdout.split()
    assert "wandb" not in ran.stdout.split()


def histogram_keys(rows: Iterable[Row]) -> set[str]:
    keys = {key for row in rows for key in row if key.startswith("adam_histogram/")}
    return {key.removesuffix(".values") for key in keys if key.endswith(".values")}


def charts(trained: Trained, suffix: str = "") -> list[Table]:
    return tables(trained.offline_run, trained.rows, f"{EPS_CURVE}{suffix}_table")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The last of its histograms is that of the last step."""
    monitor = AdamMonitor(every_n_steps=10, histograms_every_n_steps=7)
    return fitted(tmp_path_factory.mktemp("run"), monitor, batches=28, log_every_n_steps=7)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    monitor = AdamMonitor(
        every_n_steps=1,
        scopes=list(Scope),
        statistics="all",
        worst={"grad_norm": 2},
        histograms_every_n_steps=1,
        layer_table=True,
    )
    return fitted(tmp_path_factory.mktemp("everything"), monitor, batches=5)


def test_histograms_and_scalars_are_logged_each_at_steps_of_their_own(run: Trained) -> None:
    assert steps_of(run.rows, "adam_histogram/grad.values") == [0, 6, 13, 20, 27]
    assert steps_of(run.rows, f"{EPS_CURVE}_table.path") == [0, 6, 13, 20, 27]
    assert steps_of(run.rows, GRAD_NORM) == [0, 9, 19]
    assert steps_of(run.rows, "loss") == [6, 13, 20, 27]


@pytest.mark.parametrize("scope", GROUPS)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_wandb_shows_the_elements_of_the_last_step_by_octave(
    run: Trained, quantity: str, scope: str
) -> None:
    tensors = reference_tensors(run.optimizer, GROUPS[scope])
    counts, edges = last_histogram(run, f"adam_histogram/{quantity}{scope}")
    assert len(counts) == 64
    assert np.array_equal(np.diff(edges), np.ones(64))
    assert sum(counts) == sum(tensor.parameter.numel() for tensor in tensors)
    magnitudes = reference_magnitudes(tensors)[quantity]
    assert counts == np.histogram(np.log2(magnitudes), edges)[0].tolist()


def last_histogram(trained: Trained, key: str) -> tuple[list[int], list[float]]:
    last = [row for row in trained.rows if f"{key}.values" in row][-1]
    return last[f"{key}.values"], last[f"{key}.bins"]


@pytest.mark.parametrize("scope", GROUPS)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_tensorboard_shows_what_wandb_shows(run: Trained, quantity: str, scope: str) -> None:
    key = f"adam_histogram/{quantity}{scope}"
    events = run.events.Histograms(key)
    assert [event.step for event in events] == [0, 6, 13, 20, 27]
    counts, edges = last_histogram(run, key)
    shown = events[-1].histogram_value
    assert shown.bucket == counts
    assert shown.bucket_limit == edges[1:]
    occupied = np.flatnonzero(counts)
    assert shown.min == edges[occupied[0]]
    assert shown.max == edges[occupied[-1] + 1]
    assert shown.num == sum(counts)


def test_both_show_the_same_quantities(run: Trained) -> None:
    expected = {f"adam_histogram/{quantity}{scope}" for quantity in QUANTITIES for scope in GROUPS}
    assert histogram_keys(run.rows) == expected
    assert set(run.events.Tags()["histograms"]) == expected


@pytest.mark.parametrize("scope", GROUPS)
def test_the_curve_says_what_any_eps_would_dominate(run: Trained, scope: str) -> None:
    chart = charts(run)[-1]
    points = [(log10, share) for log10, line, share in chart.rows if line == LINES[scope]]
    assert [log10 for log10, _ in points] == list(range(-20, 1))
    shares = [share for _, share in points]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert 0 < shares[-2] < 1, "the comparison below is none of zeros and ones alone"
    denominators = reference_magnitudes(reference_tensors(run.optimizer, GROUPS[scope]))[
        "denominator"
    ]
    octaves = np.floor(np.log2(denominators))
    for log10, share in points:
        eps = 10.0**log10
        beside_eps = np.mean(octaves == np.floor(np.log2(eps)))
        assert share == pytest.approx(np.mean(denominators < eps), abs=beside_eps + 1e-12)


def test_the_curve_is_a_chart_in_wandb(run: Trained) -> None:
    updates = [each["config"]["update"] for each in records(run.offline_run) if "config" in each]
    panels = [each.get(f"_wandb.visualize.{EPS_CURVE}") for each in updates]
    (panel,) = {each["panel_config"]["panelDefId"] for each in panels if each}
    assert panel == "wandb/lineseries/v0"
    lines = {line for _, line, _ in charts(run)[-1].rows}
    assert lines == set(LINES.values())


class TwoOptimizers(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = network(), network()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters()) for net in (self.first, self.second)]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        for optimizer, net in zip(self.optimizers(), (self.first, self.second), strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss_of(net, batch))
            optimizer.step()


def test_several_optimizers_have_histograms_curves_and_rows_of_their_own(tmp_path: Path) -> None:
    monitor = AdamMonitor(1, histograms_every_n_steps=2, layer_table=True)
    trained = fitted(tmp_path, monitor, batches=2, module=TwoOptimizers())
    optimizers = ["/optimizer/first", "/optimizer/second"]
    assert histogram_keys(trained.rows) == {
        f"adam_histogram/{quantity}{optimizer}{scope}"
        for quantity in QUANTITIES
        for optimizer in optimizers
        for scope in ("", "/group/group_0")
    }
    for optimizer in optimizers:
        curves = charts(trained, optimizer)
        assert [curve.step for curve in curves] == [0, 1]
        assert {line for _, line, _ in curves[-1].rows} == {"model", "group/group_0"}
    (layers,) = tables(trained.offline_run, trained.rows, "adam_layers")
    assert {tuple(row[:3]) for row in layers.rows} == {
        (step, net, f"{net}.{layer}")
        for step in range(2)
        for net in ("first", "second")
        for layer in (0, 1, 3)
    }


def test_idle_elements_are_not_counted(tmp_path: Path) -> None:
    class Blind(Lit):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            inputs, targets = batch
            return loss_of(self.net, (inputs * (torch.arange(6) > 0), targets))

    logger = TensorBoardLogger(tmp_path)
    with_logger(AdamMonitor(histograms_every_n_steps=1), logger, module=Blind(ADAMW))
    events = events_under(tmp_path)
    for quantity in QUANTITIES:
        shown = events.Histograms(f"adam_histogram/{quantity}")[-1].histogram_value
        assert shown.num == sum(shown.bucket) == PARAMETERS - 16


def test_without_the_setting_there_are_no_histograms(tmp_path: Path) -> None:
    with_logger(AdamMonitor(1), TensorBoardLogger(tmp_path))
    tags = events_under(tmp_path).Tags()
    assert GRAD_NORM in tags["scalars"]
    assert tags["histograms"] == []


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        (
            {"histograms_every_n_steps": 1},
            "AdamMonitor's histograms need a WandbLogger or a TensorBoardLogger.",
        ),
        ({"layer_table": True}, "AdamMonitor's layer_table needs a WandbLogger."),
    ],
)
def test_what_no_logger_can_show_is_a_warning_and_the_rest_is_logged(
    settings: dict[str, Any], warning: str, tmp_path: Path
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with_logger(AdamMonitor(1, **settings), CSVLogger(tmp_path))
    ours = [str(each.message) for each in caught if "AdamMonitor" in str(each.message)]
    assert ours == [warning]
    assert [step for step, row in csv_rows(tmp_path).items() if GRAD_NORM in row] == [0, 1, 2]


def test_parameters_are_bit_identical_with_and_without_all_of_it(everything: Trained) -> None:
    undisturbed = Lit(ADAMW)
    trainer(max_epochs=1).fit(undisturbed, loader(5))
    assert have_same_parameters(everything.module, undisturbed)
    assert everything.events.Tags()["histograms"]


class Refusing(WandbLogger):
    """A logger to which histograms cannot be sent."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any(isinstance(value, wandb.Histogram) for value in metrics.values()):
            raise ZeroDivisionError("planted")
        super().log_metrics(metrics, step)


def test_a_logger_that_fails_is_reported_once_and_training_ends_as_without_it(
    tmp_path: Path,
) -> None:
    undisturbed = with_logger(AdamMonitor(1), CSVLogger(tmp_path), batches=6)
    monitor = AdamMonitor(1, histograms_every_n_steps=3, layer_table=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        disturbed = with_logger(monitor, Refusing(offline=True, save_dir=tmp_path), batches=6)
    wandb.finish()
    reports = [str(each.message) for each in caught if "AdamMonitor" in str(each.message)]
    assert len(reports) == 1
    assert "ZeroDivisionError: planted" in reports[0]
    assert have_same_parameters(undisturbed, disturbed)
    (offline_run,) = offline_runs(tmp_path)
    assert steps_of(history(offline_run), GRAD_NORM) == [0]
