"""SharpnessMonitor on two ranks: `test_sharpness.py` compares them with one process."""

import warnings
from typing import Any
from unittest import mock

import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping

from lightning_adam import ConfigError, SharpnessMonitor
from lightning_adam.sharpness.curvature import stability_of
from tests.ranks.rank_trainings import fit, parameters
from tests.support.memory_logger import MemoryLogger
from tests.support.ranks import keep
from tests.test_sharpness import EXACT, KEY, batch


def monitored(**arguments: Any) -> dict[str, Any]:
    logger = MemoryLogger()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, module = fit("DDP", [SharpnessMonitor(2, **arguments)], logger)
    return {
        "parameters": parameters(module),
        "rows": [row[KEY] for _, row in logger.rows if KEY in row],
        "metric": float(trainer.callback_metrics.get(KEY, -1.0)),
        "said": [str(each.message) for each in caught if "SharpnessMonitor" in str(each.message)],
    }


def faulty(rank: int) -> dict[str, Any]:

    def fails(*arguments: Any) -> Any:
        if dist.get_rank() == rank:
            raise ZeroDivisionError("planted")
        return stability_of(*arguments)

    with mock.patch("lightning_adam.sharpness.monitor.stability_of", fails):
        return monitored()


def stopped() -> int:
    """The first measurement decides to stop."""
    stop = EarlyStopping(KEY, stopping_threshold=0.0, mode="max", check_on_train_epoch_end=True)
    return fit("DDP", [SharpnessMonitor(1), stop])[0].global_step


def refused() -> str:
    try:
        fit("FSDP2", [SharpnessMonitor()])
    except ConfigError as error:
        return str(error)
    return ""


def main() -> None:
    results = {
        "plain": parameters(fit("DDP", [])[1]),
        "of a batch": monitored(batch=batch(), **EXACT),
        "of the first batch": monitored(),
        "fault on rank 0": faulty(0),
        "fault on rank 1": faulty(1),
        "stopped": stopped(),
        "refused": refused(),
    }
    keep(results)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
