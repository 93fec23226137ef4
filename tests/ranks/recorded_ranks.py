"""Trainings of many ranks with a flight recorder; `test_recorded_ranks.py` reads what they left."""

import itertools
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lightning_adam import AdamMonitor
from lightning_adam.statistics import kernels
from tests.ranks.rank_trainings import KINDS, STEPS, fit, world_size
from tests.support.ranks import folder, keep


class Ending(L.Callback):
    """An exception at the end of the training, on all ranks."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        raise ZeroDivisionError("planted")


class Breaking(L.Callback):
    """Breaks a weight of what one rank holds of a layer."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 3 and trainer.global_rank == trainer.world_size - 1:
            weight = pl_module.net[3].weight
            (weight.to_local() if isinstance(weight, DTensor) else weight).data.fill_(float("inf"))


def recorded(kind: str, root: Path, *others: L.Callback) -> dict[str, Any]:
    monitor = AdamMonitor(every_n_steps=100, flight_recorder=4)
    callbacks = [*others, monitor]
    with warnings.catch_warnings(record=True) as caught, suppress(ZeroDivisionError):
        warnings.simplefilter("always")
        fit(kind, callbacks, default_root_dir=root)
    said = [str(each.message) for each in caught]
    return {"said": [each for each in said if "has failed" in each]}


def faulty(kind: str, root: Path) -> dict[str, Any]:
    """The second rank's third measurement fails, in a training of all steps."""
    measure, calls = kernels.measure, itertools.count()

    def fails(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == 2 and dist.get_rank() == 1:
            raise ZeroDivisionError("planted")
        return measure(*arguments, **keywords)

    with mock.patch.object(kernels, "measure", fails):
        return recorded(kind, root)


def main() -> None:
    results: dict[str, Any] = {"steps": STEPS}
    for kind in KINDS:
        recorded(kind, folder() / f"{kind}, ended", Ending())
        recorded(kind, folder() / f"{kind}, broken", Breaking())
    results["faulty"] = faulty("FSDP2", folder() / "FSDP2, faulty")
    if world_size() > 1:
        keep(results)
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
