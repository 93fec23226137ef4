"""A training run in its own process that goes on until a signal ends it.

python -m tests.e2e.recorded_training training

The argument is where it prints `ready` and waits for a moment, again and again: in each batch of
the `training` or of the `validation`.
"""

import sys
import time
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_adam import AdamMonitor
from tests.support.training import ADAMW, Lit, loader, loss_of, trainer

READY = "ready\n"
READY_AT = 30
"""The optimizer step."""


class Waiting(Lit):
    def __init__(self, place: str) -> None:
        super().__init__(ADAMW)
        self.place = place

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.reach("training")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.reach("validation")
        loss_of(self.net, batch)

    def reach(self, place: str) -> None:
        if place == self.place and self.global_step >= READY_AT:
            sys.stdout.write(READY)
            sys.stdout.flush()
            time.sleep(0.2)


def main() -> None:
    fit = trainer(
        max_epochs=-1,
        logger=CSVLogger("."),
        callbacks=[AdamMonitor(flight_recorder=20)],
        num_sanity_val_steps=0,
    )
    fit.fit(Waiting(sys.argv[1]), loader(10), loader(50))
    sys.stdout.write("came to its end\n")


if __name__ == "__main__":
    main()
