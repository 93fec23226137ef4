"""AdamMonitor on several ranks: logged values, collectives, checkpoints, stops and faults."""

import itertools
import re
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from lightning_adam import AdamMonitor
from lightning_adam.monitor.finding_reporter import FindingReporter
from lightning_adam.monitor.row_log import RowLog
from lightning_adam.monitor.session import MonitorSession
from lightning_adam.statistics import kernels
from tests.support.exploding import is_hyperparameter
from tests.support.memory_logger import MemoryLogger
from tests.support.parallel import KINDS, STEPS, Lit, fit_ranks, local_parameters
from tests.support.ranks import Collectives, Ranks

MEASURED = [1, 2, 3, 4, 6]
"""Every second step and, for histograms, every third."""
FAULT_CALLS: dict[str, tuple[Any, str, int]] = {
    "at the start": (MonitorSession, "_start", 0),
    "measuring": (kernels, "measure", 2),
    "sending": (MonitorSession, "_log_batch", 2),
    "logging": (RowLog, "_publish", 2),
    "judging": (FindingReporter, "judge", 2),
}
"""Functions, and the number of the call that fails."""

Fits = Callable[[str], list[dict[str, Any]]]


def build_monitor() -> AdamMonitor:
    return AdamMonitor(
        every_n_steps=2,
        statistics="all",
        scopes=["model", "group", "layer", "tensor"],
        histograms_every_n_steps=3,
    )


# Functions that the ranks run


def fit_plain(kind: str) -> dict[str, Any]:
    with Collectives() as collectives:
        _, module = fit_ranks(kind, [])
    return {"parameters": local_parameters(module), "collectives": collectives.count}


def fit_monitored(kind: str) -> dict[str, Any]:
    logger = MemoryLogger()
    with Collectives() as collectives:
        _, module = fit_ranks(kind, [build_monitor()], logger)
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    return {
        "parameters": local_parameters(module),
        "collectives": collectives.count,
        "rows": logger.rows,
        "run": logger.experiment.hparams["lightning_adam"]["run"] if is_first else None,
    }


def fit_both(kind: str) -> dict[str, Any]:
    return {"plain": fit_plain(kind), "monitored": fit_monitored(kind)}


def fit_in_halves(kind: str, is_monitored: bool) -> dict[str, Any]:
    """Trains one epoch, with or without the monitor, and a second one from its checkpoint."""
    path = f"{kind}.ckpt"
    trainer, _ = fit_ranks(
        kind, [build_monitor()] if is_monitored else [], MemoryLogger(), max_epochs=1
    )
    trainer.save_checkpoint(path)
    logger = MemoryLogger()
    _, module = fit_ranks(kind, [build_monitor()], logger, ckpt_path=path)
    return {"parameters": local_parameters(module), "rows": logger.rows}


def steps_until_statistic(kind: str) -> int:
    """Trains until early stopping on a statistic."""
    stop = EarlyStopping(
        "adam_schedule/step", stopping_threshold=2.5, mode="max", check_on_train_epoch_end=True
    )
    monitor = AdamMonitor(every_n_steps=1, statistics="all")
    trainer, _ = fit_ranks(
        kind, [monitor, stop], limit_train_batches=1, max_steps=-1, max_epochs=STEPS
    )
    return trainer.global_step


def steps_until_finding(kind: str, every_n_steps: int) -> int:
    """Trains until a finding on the last rank stops the run."""
    is_last = dist.get_rank() == dist.get_world_size() - 1
    # At this threshold it holds at every step.
    settings = {"threshold": -1.0, "patience": 1, "severity": "error" if is_last else "off"}
    monitor = AdamMonitor(
        every_n_steps, findings={"updates_lost": settings}, stop_on=["updates_lost"]
    )
    return fit_ranks(kind, [monitor])[0].global_step


def fit_with_fault(kind: str, place: str, rank: int) -> dict[str, Any]:
    """Trains while something fails once on one rank."""
    owner, name, call = FAULT_CALLS[place]
    original, calls, logger = getattr(owner, name), itertools.count(), MemoryLogger()

    def fails(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == call and dist.get_rank() == rank:
            raise ZeroDivisionError("planted")
        return original(*arguments, **keywords)

    with warnings.catch_warnings(record=True) as caught, mock.patch.object(owner, name, fails):
        warnings.simplefilter("always")
        trainer, module = fit_ranks(kind, [AdamMonitor(every_n_steps=1)], logger)
    return {
        "parameters": local_parameters(module),
        "step": trainer.global_step,
        "rows": logger.rows,
        "warnings": [str(each.message) for each in caught if "AdamMonitor" in str(each.message)],
    }


# Tests

each_kind = pytest.mark.parametrize("kind", KINDS)
fsdp2_and_others = pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind == "FSDP2" else pytest.mark.slow) for kind in KINDS],
)
"""For tests that run only one kind in the default tier."""


@pytest.fixture(scope="module")
def fits(ranks: Ranks) -> Fits:
    """Trains a kind on two ranks, with and without the monitor; once each."""
    return cache(lambda kind: ranks.run(fit_both, kind))


@cache
def rows_of_one_process(kind: str) -> Any:
    return fit_monitored(kind)["rows"]


def are_same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(map(torch.equal, first, second))


def assert_close_rows(first: Any, second: Any) -> None:
    assert second
    assert [step for step, _ in first] == [step for step, _ in second]
    for (_, values), (_, others) in zip(first, second, strict=True):
        assert values.keys() == others.keys()
        for key, value in others.items():
            if re.search(r"_p\d+$", key):
                # An element close to a power of two may be counted in either octave.
                assert values[key] == pytest.approx(value, rel=0.1), key
            elif key.endswith("exp_avg_carryover"):
                # The root of a difference of sums.
                assert values[key] ** 2 == pytest.approx(value**2, rel=1e-5, abs=1e-6), key
            else:
                assert values[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key


def assert_logged_like_one_process(fit: dict[str, Any], kind: str) -> None:
    expected = rows_of_one_process(kind)
    rows = fit["monitored"]["rows"]
    assert_close_rows(rows, expected)
    for (_, values), (_, of_one) in zip(rows, expected, strict=True):
        counted = [key for key in of_one if "fraction" in key and "signal" not in key]
        assert {key: values[key] for key in counted} == {key: of_one[key] for key in counted}


def assert_same_parameters(fit: dict[str, Any]) -> None:
    assert fit["plain"]["parameters"]
    assert are_same(fit["plain"]["parameters"], fit["monitored"]["parameters"])


def assert_few_collectives(fit: dict[str, Any], kind: str) -> None:
    expected = KINDS[kind].collectives * len(MEASURED) + KINDS[kind].at_start
    assert fit["monitored"]["collectives"] - fit["plain"]["collectives"] == expected


@each_kind
def test_ranks_log_like_one_process(fits: Fits, kind: str) -> None:
    for fit in fits(kind):
        assert_logged_like_one_process(fit, kind)


@each_kind
def test_first_rank_records_the_size_of_the_whole_model(fits: Fits, kind: str) -> None:
    run = fits(kind)[0]["monitored"]["run"]
    assert run["parameters"] == sum(each.numel() for each in Lit().parameters())
    assert run["device"] == "2 x cpu"


@each_kind
def test_monitor_changes_no_parameter_of_any_rank(fits: Fits, kind: str) -> None:
    for fit in fits(kind):
        assert_same_parameters(fit)


@each_kind
def test_measurement_takes_at_most_two_collectives(fits: Fits, kind: str) -> None:
    for fit in fits(kind):
        assert_few_collectives(fit, kind)


@pytest.mark.slow
def test_four_ranks_of_data_and_tensor_parallelism_measure_like_one_process(
    four_ranks: Ranks,
) -> None:
    kind = "tensor parallel"
    for fit in four_ranks.run(fit_both, kind):
        assert_logged_like_one_process(fit, kind)
        assert_same_parameters(fit)
        assert_few_collectives(fit, kind)


@pytest.mark.parametrize("is_monitored", [True, False], ids=["resumed", "attached later"])
@fsdp2_and_others
def test_ranks_log_the_same_after_a_resume(
    ranks: Ranks, fits: Fits, kind: str, is_monitored: bool
) -> None:
    """Also if the checkpoint is of a run without the monitor."""
    for fit, halves in zip(fits(kind), ranks.run(fit_in_halves, kind, is_monitored), strict=True):
        straight = fit["monitored"]
        pairs = zip(straight["parameters"], halves["parameters"], strict=True)
        assert all(torch.allclose(*pair, rtol=1e-5) for pair in pairs)
        later = [row for row in straight["rows"] if row[0] >= STEPS // 2]
        if not is_monitored:
            # Hyperparameters are logged once.
            logged = straight["rows"][0][1]
            once = {key: value for key, value in logged.items() if is_hyperparameter(key)}
            later[0] = (later[0][0], {**once, **later[0][1]})
        assert_close_rows(halves["rows"], later)


@fsdp2_and_others
def test_statistic_stops_all_ranks_at_the_same_step(ranks: Ranks, kind: str) -> None:
    assert ranks.run(steps_until_statistic, kind) == [3, 3]


@pytest.mark.parametrize("every_n_steps", [2, 4])
@fsdp2_and_others
def test_finding_of_one_rank_stops_all_ranks_at_the_next_measurement(
    ranks: Ranks, kind: str, every_n_steps: int
) -> None:
    """Also where an epoch, of 3 steps, is shorter than the interval."""
    assert ranks.run(steps_until_finding, kind, every_n_steps) == [every_n_steps] * 2


FAULTS = [
    pytest.param(kind, place, rank, marks=() if kind == "FSDP2" and rank else pytest.mark.slow)
    for kind, place, rank in itertools.product(("DDP", "FSDP2"), FAULT_CALLS, (0, 1))
]


@pytest.mark.parametrize(("kind", "place", "failing"), FAULTS)
def test_fault_on_one_rank_disables_monitoring_only(
    ranks: Ranks, fits: Fits, kind: str, place: str, failing: int
) -> None:
    results = ranks.run(fit_with_fault, kind, place, failing)
    for fit, result in zip(fits(kind), results, strict=True):
        assert result["step"] == STEPS
        assert are_same(result["parameters"], fit["plain"]["parameters"])
    # The rank that fails prints the error.
    reports = [result["warnings"] for result in results]
    (report,) = reports[failing]
    assert "ZeroDivisionError: planted" in report
    assert reports[1 - failing] == (
        [
            "AdamMonitor failed on rank 1, which prints the error. It is disabled for the rest of"
            " the run; training continues."
        ]
        if failing
        else []
    )
    assert max(len(result["rows"]) for result in results) <= (5 if kind == "DDP" else 4)
