"""Histograms, curves and tables as W&B and TensorBoard write them to disk."""

import csv
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from lightning_adam import AdamMonitor, __version__
from lightning_adam.monitor.publishing import Publisher, log_findings
from lightning_adam.reports.runs import read_runs
from lightning_adam.statistics.catalogue import STATISTICS, select
from tests.statistics.cases import reference_tensors
from tests.support.commands import GLOBAL_STEP, history, offline_runs, records
from tests.support.exploding import is_hyperparameter
from tests.support.memory_logger import MemoryLogger
from tests.support.monitored import TwoOptimizers, scoped
from tests.support.offline import (
    OfflineRun,
    Row,
    Table,
    csv_rows,
    events_under,
    fit_offline,
    steps_of,
    tables,
)
from tests.support.oracle import reference_magnitudes
from tests.support.tables import each_row
from tests.support.training import (
    ADAMW,
    Lit,
    assert_same_parameters,
    loss_of,
    network,
    run_training,
    trainer,
)

GRAD_NORM = STATISTICS["grad_norm"].key
QUANTITIES = ("grad", "exp_avg", "denominator", "normalized_update")
GROUPS = {"": None, "group/decay": 0, "group/no_decay": 1}
"""By scope: the index of its group in the optimizer."""
HISTOGRAMS = {
    scoped(scope, f"adam_histogram/{quantity}"): (quantity, scope)
    for quantity in QUANTITIES
    for scope in GROUPS
}
PARAMETERS = sum(parameter.numel() for parameter in network().parameters())
EPS_CURVE = "adam_underflow/eps_curve"
LAYERS = ("net.0", "net.3", "net.1")
"""The layers in the order of the parameter groups."""
CONSTANT = {"name": "constant"}


def histogram_keys(rows: Iterable[Row]) -> set[str]:
    keys = {key for row in rows for key in row if key.startswith("adam_histogram/")}
    return {key.removesuffix(".values") for key in keys if key.endswith(".values")}


def curves(run: OfflineRun, optimizer: str = "") -> list[Table]:
    return tables(run.folder, run.rows, f"{scoped(optimizer, EPS_CURVE)}_table")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> OfflineRun:
    """A run that logs everything. The last histogram is of the last step."""
    monitor = AdamMonitor(
        every_n_steps=10,
        scopes=["model", "group", "layer"],
        statistics="all",
        worst={"grad_norm": 2},
        histograms_every_n_steps=7,
        layer_table=True,
    )
    folder, module = tmp_path_factory.mktemp("run"), Lit(ADAMW, CONSTANT)
    return fit_offline(folder, module, monitor, batches=28, log_every_n_steps=7)


def test_histograms_and_scalars_are_logged_at_their_own_steps(run: OfflineRun) -> None:
    assert steps_of(run.rows, "adam_histogram/grad.values") == [0, 6, 13, 20, 27]
    assert steps_of(run.rows, f"{EPS_CURVE}_table.path") == [0, 6, 13, 20, 27]
    assert steps_of(run.rows, GRAD_NORM) == [0, 9, 19]
    assert steps_of(run.rows, "loss") == [6, 13, 20, 27]


def last_histogram(run: OfflineRun, key: str) -> tuple[list[int], list[float]]:
    last = [row for row in run.rows if f"{key}.values" in row][-1]
    return last[f"{key}.values"], last[f"{key}.bins"]


def test_wandb_histograms_count_the_elements_of_the_last_step_by_octave(run: OfflineRun) -> None:
    assert histogram_keys(run.rows) == HISTOGRAMS.keys()
    with each_row() as row:
        for key, (quantity, scope) in HISTOGRAMS.items():
            tensors = reference_tensors(run.optimizer, GROUPS[scope])
            counts, edges = last_histogram(run, key)
            magnitudes = reference_magnitudes(tensors)[quantity]
            with row(key):
                assert len(counts) == 64
                assert np.array_equal(np.diff(edges), np.ones(64))
                assert sum(counts) == sum(tensor.parameter.numel() for tensor in tensors)
                assert counts == np.histogram(np.log2(magnitudes), edges)[0].tolist()


def test_tensorboard_histograms_equal_those_of_wandb(run: OfflineRun) -> None:
    assert set(run.events.Tags()["histograms"]) == HISTOGRAMS.keys()
    with each_row() as row:
        for key in HISTOGRAMS:
            events = run.events.Histograms(key)
            counts, edges = last_histogram(run, key)
            shown = events[-1].histogram_value
            occupied = np.flatnonzero(counts)
            with row(key):
                assert [event.step for event in events] == [0, 6, 13, 20, 27]
                assert shown.bucket == counts
                assert shown.bucket_limit == edges[1:]
                assert shown.min == edges[occupied[0]]
                assert shown.max == edges[occupied[-1] + 1]
                assert shown.num == sum(counts)


def test_eps_curve_is_the_share_of_denominators_below_each_eps(run: OfflineRun) -> None:
    chart = curves(run)[-1]
    with each_row() as row:
        for scope, group in GROUPS.items():
            points = [
                (log10, share) for log10, line, share in chart.rows if line == (scope or "model")
            ]
            shares = [share for _, share in points]
            denominators = reference_magnitudes(reference_tensors(run.optimizer, group))[
                "denominator"
            ]
            octaves = np.floor(np.log2(denominators))
            with row(scope):
                assert [log10 for log10, _ in points] == list(range(-20, 1))
                assert shares == sorted(shares)
                assert shares[0] == 0
                assert 0 < shares[-2] < 1, "the comparison covers more than zeros and ones"
                for log10, share in points:
                    eps = 10.0**log10
                    beside_eps = np.mean(octaves == np.floor(np.log2(eps)))
                    expected = np.mean(denominators < eps)
                    assert share == pytest.approx(expected, abs=beside_eps + 1e-12)


def test_wandb_run_has_the_settings_the_step_metric_and_the_chart(run: OfflineRun) -> None:
    written = records(run.folder)
    text = json.dumps(written)
    for recorded in (__version__, '"class": "AdamW"', '"total_steps": 28', '"no_decay"'):
        assert recorded in text
    metrics = [each["metric"] for each in written if each["type"] == "metric"]
    ours = next(each for each in metrics if each.get("glob_name") == "adam_*")
    assert ours["step_metric"] == GLOBAL_STEP
    updates = [each["config"]["update"] for each in written if "config" in each]
    panels = [each.get(f"_wandb.visualize.{EPS_CURVE}") for each in updates]
    (panel,) = {each["panel_config"]["panelDefId"] for each in panels if each}
    assert panel == "wandb/lineseries/v0"
    assert {line for _, line, _ in curves(run)[-1].rows} == {
        "model",
        "group/decay",
        "group/no_decay",
    }


def test_parameters_are_bit_identical_with_and_without_full_logging(run: OfflineRun) -> None:
    without = run_training(Lit(ADAMW, CONSTANT), data=28)
    assert_same_parameters(run.module, without.module)


def layer_rows(rows: Sequence[Row], statistics: str) -> dict[tuple[int, str], list[Any]]:
    """Returns the values by step and layer, from the keys of the scope `layer`."""
    chosen = select([statistics])
    found = {}
    hyperparameters: dict[str, Any] = {}
    for row in rows:
        if any("/layer/" in key for key in row):
            # Hyperparameters are only logged when they change.
            hyperparameters |= {key: row[key] for key in row if is_hyperparameter(key)}
            row = {**hyperparameters, **row}
            for layer in LAYERS:
                values = [row.get(each.key_of(f"layer/{layer}/")) for each in chosen]
                found[row[GLOBAL_STEP], layer] = values
    return found


def test_layer_table_has_the_values_of_the_layer_keys(run: OfflineRun) -> None:
    (table,) = tables(run.folder, run.rows, "adam_layers")
    names = [statistic.name for statistic in select(["all"])]
    assert table.columns == [GLOBAL_STEP, "optimizer", "layer", *names]
    assert len(table.columns) == len({*table.columns})
    expected = layer_rows(run.rows, "all")
    assert [(step, layer) for step, _, layer, *_ in table.rows] == [
        (step, layer) for step in (0, 9, 19) for layer in LAYERS
    ]
    for step, optimizer, layer, *values in table.rows:
        assert optimizer is None
        assert values == expected[step, layer]


class RaisingAtBatch8(Lit):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 8:
            raise ZeroDivisionError("planted")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [pytest.param(Lit, marks=pytest.mark.slow), RaisingAtBatch8])
def test_layer_table_is_logged_in_several_tables_and_at_the_end_of_the_run(
    kind: type[Lit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb.Table, "MAX_ROWS", 4)
    monkeypatch.setattr("lightning_adam.monitor.row_log.ROWS_AT_ONCE", 7)
    monitor = AdamMonitor(1, scopes=["layer"], layer_table=True)
    logger = WandbLogger(offline=True, save_dir=tmp_path)
    try:
        run_training(kind(ADAMW), monitor, data=8 if kind is Lit else 20, logger=logger)
    except ZeroDivisionError:
        assert kind is RaisingAtBatch8
    finally:
        wandb.finish()
    (offline_run,) = offline_runs(tmp_path)
    rows = history(offline_run)
    pieces = tables(offline_run, rows, "adam_layers")
    assert [(piece.step, len(piece.rows)) for piece in pieces] == [
        (2, 4), (2, 4), (2, 1), (5, 4), (5, 4), (5, 1), (8, 4), (8, 2),
    ]  # fmt: skip
    joined = [row for piece in pieces for row in piece.rows]
    found = {(step, layer): values for step, _, layer, *values in joined}
    assert len(found) == len(joined), "no row is sent twice"
    assert found == layer_rows(rows, "headline")
    assert steps_of(rows, f"{EPS_CURVE}_table.path") == []
    assert histogram_keys(rows) == set()


def test_each_optimizer_has_its_own_histograms_curves_and_rows(tmp_path: Path) -> None:
    monitor = AdamMonitor(1, histograms_every_n_steps=2, layer_table=True)
    both = fit_offline(tmp_path, TwoOptimizers(torch.optim.Adam), monitor, batches=2)
    optimizers = ["optimizer/first", "optimizer/second"]
    assert histogram_keys(both.rows) == {
        scoped(optimizer, f"adam_histogram/{quantity}")
        for quantity in QUANTITIES
        for optimizer in optimizers
    }
    for optimizer in optimizers:
        charts = curves(both, optimizer)
        assert [chart.step for chart in charts] == [0, 1]
        assert {line for _, line, _ in charts[-1].rows} == {"model"}
    (layers,) = tables(both.folder, both.rows, "adam_layers")
    assert {tuple(row[:3]) for row in layers.rows} == {
        (step, net, f"{net}.{layer}")
        for step in range(2)
        for net in ("first", "second")
        for layer in (0, 1, 3)
    }


def test_elements_without_gradient_are_not_counted(tmp_path: Path) -> None:
    class WithoutFirstInput(Lit):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            inputs, targets = batch
            return loss_of(self.net, (inputs * (torch.arange(6) > 0), targets))

    monitor, logger = AdamMonitor(histograms_every_n_steps=1), TensorBoardLogger(tmp_path)
    run_training(WithoutFirstInput(ADAMW), monitor, data=3, logger=logger)
    events = events_under(tmp_path)
    for quantity in QUANTITIES:
        shown = events.Histograms(f"adam_histogram/{quantity}")[-1].histogram_value
        assert shown.num == sum(shown.bucket) == PARAMETERS - 16


def test_histograms_are_off_by_default(tmp_path: Path) -> None:
    run_training(Lit(ADAMW), AdamMonitor(1), data=3, logger=TensorBoardLogger(tmp_path))
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
def test_setting_that_no_logger_supports_is_a_warning(
    settings: dict[str, Any], warning: str, tmp_path: Path
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = AdamMonitor(1, **settings)
        run_training(Lit(ADAMW), monitor, data=3, logger=CSVLogger(tmp_path))
    ours = [str(each.message) for each in caught if "AdamMonitor" in str(each.message)]
    assert ours == [warning]
    assert [step for step, row in csv_rows(tmp_path).items() if GRAD_NORM in row] == [0, 1, 2]


class FailingLogger(MemoryLogger):
    """Raises at the given places."""

    def __init__(self, *failing: str) -> None:
        super().__init__()
        self.failing = failing

    def reach(self, place: str) -> None:
        if place in self.failing:
            raise ZeroDivisionError(f"planted in {place}")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        if any(key.startswith("adam_") for key in metrics):
            self.reach(f"row {step}")
        super().log_metrics(metrics, step)

    def log_hyperparams(self, *arguments: Any, **keywords: Any) -> None:
        self.reach("settings")

    @property
    def log_dir(self) -> str:
        # Lightning reads the folder before.
        if self._experiment is not None:
            self.reach("folder")
        return super().log_dir


def test_failing_logger_is_reported_once_and_affects_nothing_else() -> None:
    """Other loggers and later rows are logged, and training is unchanged."""

    def fit(monitor: AdamMonitor | None, *loggers: Any) -> L.LightningModule:
        return run_training(Lit(ADAMW), monitor, logger=[*loggers]).module

    without = fit(None)
    # A finding is logged before the first step, to the run's folder.
    findings = {"warmup_short": {"severity": "warning"}}
    with each_row() as each:
        for place in ("row 1", "settings", "folder"):
            failing, other = FailingLogger(place), MemoryLogger()
            with each(place), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                with_error = fit(AdamMonitor(1, findings=findings), other, failing)
                ours = [str(one.message) for one in caught if "AdamMonitor" in str(one.message)]
                (report,) = ours
                assert report.startswith("FailingLogger failed to log what AdamMonitor measured.")
                assert f"ZeroDivisionError: planted in {place}" in report
                assert other.steps_of(GRAD_NORM) == [0, 1, 2, 3, 4, 5]
                missing = 1 if place == "row 1" else None
                assert failing.steps_of(GRAD_NORM) == [x for x in range(6) if x != missing]
                assert_same_parameters(without, with_error)


class RefusingLogger(WandbLogger):
    """A logger that fails at histograms, tables and alerts."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if not all(isinstance(value, float | str) for value in metrics.values()):
            raise ZeroDivisionError("planted")
        super().log_metrics(metrics, step)


def test_logger_that_fails_at_histograms_and_tables_gets_all_numbers(tmp_path: Path) -> None:
    monitor = AdamMonitor(1, histograms_every_n_steps=3, layer_table=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_training(Lit(ADAMW), monitor, logger=RefusingLogger(offline=True, save_dir=tmp_path))
    wandb.finish()
    (report,) = [str(each.message) for each in caught if "AdamMonitor" in str(each.message)]
    assert "ZeroDivisionError: planted" in report
    (offline_run,) = offline_runs(tmp_path)
    assert steps_of(history(offline_run), GRAD_NORM) == [0, 1, 2, 3, 4, 5]


def test_names_of_the_worst_tensors_are_logged_if_the_logger_supports_strings(
    tmp_path: Path,
) -> None:
    class Numbers(Logger):
        """A logger that only supports numbers, such as MLflow's."""

        name, version = "numbers", 0
        keys: ClassVar[set[str]] = set()

        def log_hyperparams(self, *arguments: Any, **keywords: Any) -> None:
            pass

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            assert all(isinstance(value, float) for key, value in metrics.items() if "adam" in key)
            self.keys.update(metrics)

    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path), Numbers()]
    monitor = AdamMonitor(1, worst={"grad_norm": 2})
    run_training(Lit(ADAMW), monitor, data=3, logger=loggers)
    (metrics,) = tmp_path.rglob("metrics.csv")
    with metrics.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row[GRAD_NORM]]
    events = events_under(tmp_path)
    tensors = {f"net.{name}" for name, _ in network().named_parameters()}
    for rank in (1, 2):
        key = f"adam_gradient/worst_{rank}/grad_norm"
        names = [row[f"{key}_tensor"] for row in rows]
        assert len(names) == 3
        assert set(names) <= tensors
        texts = [
            each.tensor_proto.string_val[0].decode()
            for each in events.Tensors(f"{key}_tensor/text_summary")
        ]
        assert texts == names
        assert key in Numbers.keys
        assert f"{key}_tensor" not in Numbers.keys


def test_hyperparameters_are_logged_first_and_when_they_change() -> None:
    class Changing(Lit):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            if self.global_step == 3:
                optimizer.param_groups[0]["eps"] = 1e-6

    monitor = AdamMonitor(1, ["group"], ["beta2", "eps", "weight_decay", "lr"])
    run = run_training(Changing(ADAMW), monitor, data=6)
    schedule = "adam_schedule"
    expected = {
        scoped("group/decay", f"{schedule}/lr"): [*range(6)],
        scoped("group/decay", f"{schedule}/beta2"): [0],
        scoped("group/decay", f"{schedule}/weight_decay"): [0],
        scoped("group/decay", f"{schedule}/eps"): [0, 3],
        scoped("group/no_decay", f"{schedule}/eps"): [0],
    }
    assert {key: run.steps_of(key) for key in expected} == expected
    assert set(expected) <= run.trainer.callback_metrics.keys()


def test_percentiles_of_histograms_are_logged_to_every_logger() -> None:
    module = Lit(ADAMW, CONSTANT)
    monitor = AdamMonitor(10, ["model", "group"], histograms_every_n_steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = run_training(module, monitor, data=8)
    magnitudes = reference_magnitudes(reference_tensors(run.trainer.optimizers[0]))
    for name, quantity in (
        ("adam_moments/denominator", "denominator"),
        ("adam_update/normalized_update", "normalized_update"),
    ):
        for percent in (1, 50, 99):
            key = f"{name}_p{percent}"
            assert run.steps_of(key) == [0, 3, 7]
            assert run.steps_of(scoped("group/no_decay", key)) == [0, 3, 7]
            exact = np.quantile(magnitudes[quantity], percent / 100, method="inverted_cdf")
            assert abs(np.log2(run.values(key)[-1] / exact)) <= 1


def test_end_of_a_run_prints_the_folder_and_report_command_of_each_logger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr("lightning_adam.monitor.publishing.log_info", lines.append)
    monkeypatch.chdir(tmp_path)
    loggers = [
        WandbLogger(offline=True, save_dir=tmp_path / "our runs"),
        CSVLogger("logs", version="a"),
        TensorBoardLogger("logs", version="b"),
    ]
    run_training(Lit(ADAMW), AdamMonitor(1), data=2, logger=loggers)
    wandb.finish()
    (offline_run,) = offline_runs(tmp_path)
    folder = offline_run.relative_to(tmp_path)
    assert lines == [
        f"AdamMonitor logged to {folder} (WandbLogger); report: lightning-adam report '{folder}'",
        "AdamMonitor logged to logs/lightning_logs/a (CSVLogger); report: lightning-adam report"
        " logs/lightning_logs/a",
        "AdamMonitor logged to logs/lightning_logs/b (TensorBoardLogger); report: lightning-adam"
        " report logs/lightning_logs/b",
    ]
    sources = [each.source for each in read_runs([offline_run, tmp_path / "logs"])]
    assert sources == ["W&B", "CSVLogger", "TensorBoard"]


def test_run_that_logged_nothing_prints_nothing_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("lightning_adam.monitor.publishing.log_info", lines.append)
    run_training(Lit(ADAMW), AdamMonitor(flight_recorder=3), data=2, log_every_n_steps=0)
    assert lines == []


def test_measurement_without_values_logs_no_row() -> None:
    logger = MemoryLogger()
    publisher = Publisher(trainer(logger=logger))
    publisher.log_metrics({}, step=1)
    publisher.log_metrics({GRAD_NORM: 0.5}, step=2)
    assert logger.rows == [(2, {GRAD_NORM: 0.5})]


def test_wandb_summary_names_open_findings_and_the_step_at_which_each_was_raised(
    tmp_path: Path,
) -> None:
    findings = [
        ("schedule_length", "warning", 0, None),
        ("exp_avg_sq_lags", "info", 5, None),
        ("eps_dominates", "error", 33, 60),
        ("updates_lost", "error", 70, None),
        # Findings of another optimizer follow.
        ("updates_lost", "error", 40, 50),
    ]
    names = ("code", "severity", "step", "closed")
    rows = [dict(zip(names, each, strict=True)) for each in findings]
    logger = WandbLogger(offline=True, save_dir=tmp_path)
    try:
        log_findings(logger, rows, step=80)
        summary = dict(logger.experiment.summary)
    finally:
        wandb.finish()
    assert {key: value for key, value in summary.items() if key.startswith("adam_findings_")} == {
        "adam_findings_open": "updates_lost",
        "adam_findings_raised/eps_dominates": 33,
        "adam_findings_raised/updates_lost": 40,
    }
