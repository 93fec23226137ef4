"""SharpnessMonitor on two ranks logs the value of rank 0 on both, as one process does."""

import warnings
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from lightning_adam import ConfigError, SharpnessMonitor
from lightning_adam.monitor.sharpness.curvature import stability_of
from tests.support.memory_logger import MemoryLogger
from tests.support.parallel import fit_ranks, local_parameters
from tests.support.ranks import Ranks

pytestmark = pytest.mark.slow

KEY = "adam_sharpness/preconditioned"


def sharpness_of_a_batch() -> SharpnessMonitor:
    inputs = torch.randn(12, 6, generator=torch.Generator().manual_seed(5))
    batch = inputs, inputs[:, :1].sin()
    return SharpnessMonitor(2, batch=batch, iterations=60, tolerance=1e-6)


# What the ranks run.


def fit_plain() -> list[Tensor]:
    return local_parameters(fit_ranks("DDP", [])[1])


def fit_monitored(has_batch: bool, failing: int | None) -> dict[str, Any]:
    """Trains with the monitor, which fails on one rank, if any."""

    def fails(*arguments: Any) -> Any:
        if dist.is_initialized() and dist.get_rank() == failing:
            raise ZeroDivisionError("planted")
        return stability_of(*arguments)

    logger = MemoryLogger()
    monitor = sharpness_of_a_batch() if has_batch else SharpnessMonitor(2)
    with (
        warnings.catch_warnings(record=True) as caught,
        mock.patch("lightning_adam.monitor.sharpness.callback.stability_of", fails),
    ):
        warnings.simplefilter("always")
        trainer, module = fit_ranks("DDP", [monitor], logger)
    messages = [str(each.message) for each in caught]
    return {
        "parameters": local_parameters(module),
        "rows": [row[KEY] for _, row in logger.rows if KEY in row],
        "metric": float(trainer.callback_metrics.get(KEY, -1.0)),
        "warnings": [message for message in messages if "SharpnessMonitor" in message],
    }


def steps_until_stop() -> int:
    """Trains until the first measurement stops the run."""
    stop = EarlyStopping(KEY, stopping_threshold=0.0, mode="max", check_on_train_epoch_end=True)
    return fit_ranks("DDP", [SharpnessMonitor(1), stop])[0].global_step


def error_of_shards() -> str:
    try:
        fit_ranks("FSDP2", [SharpnessMonitor()])
    except ConfigError as error:
        return str(error)
    return ""


# What is asserted.


def assert_parameters_as_without(ranks: Ranks, results: list[dict[str, Any]]) -> None:
    for plain, result in zip(ranks.run(fit_plain), results, strict=True):
        assert all(map(torch.equal, plain, result["parameters"]))


def test_ranks_log_what_one_process_logs(ranks: Ranks) -> None:
    results = ranks.run(fit_monitored, True, None)
    expected = fit_monitored(True, None)["rows"]
    assert len(expected) == 4
    for result in results:
        assert result["rows"] == pytest.approx(expected, rel=1e-4)
        assert result["rows"] == results[0]["rows"]
        assert result["metric"] == result["rows"][-1]
        assert not result["warnings"]
    assert_parameters_as_without(ranks, results)


def test_all_ranks_log_the_sharpness_of_the_first_ranks_batch(ranks: Ranks) -> None:
    """Also if another rank fails."""
    first, second = ranks.run(fit_monitored, False, None)
    for results in ([first, second], ranks.run(fit_monitored, False, 1)):
        for result in results:
            assert result["rows"] == first["rows"]
            assert result["metric"] == first["rows"][-1]
            assert not result["warnings"]
        assert_parameters_as_without(ranks, results)


def test_fault_on_the_first_rank_ends_measuring_on_all(ranks: Ranks) -> None:
    results = ranks.run(fit_monitored, False, 0)
    assert [len(result["warnings"]) for result in results] == [1, 0]
    assert [result["rows"] for result in results] == [[], []]
    assert_parameters_as_without(ranks, results)


def test_sharpness_stops_all_ranks_at_the_same_step(ranks: Ranks) -> None:
    assert ranks.run(steps_until_stop) == [3, 3]


def test_sharded_parameters_are_an_error(ranks: Ranks) -> None:
    for error in ranks.run(error_of_shards):
        assert "they are sharded. Use DDPStrategy" in error
