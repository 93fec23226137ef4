"""A training in a process of its own that goes on until it is stopped: by SIGTERM, say.

python -m tests.e2e.recorded_training training

The word is where it says `ready` and waits for a moment, over and over: `training` in a batch,
`validation` in one of those.
"""

import signal
import sys
import time
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_adam import AdamMonitor
from tests.support.training import ADAMW, Lit, loader, loss_of, trainer

READY_AT = 30
"""The optimizer step."""


class Slow(Lit):
    def __init__(self, place: str) -> None:
        super().__init__(ADAMW)
        self.place = place

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.come_by("training")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.come_by("validation")
        loss_of(self.net, batch)

    def come_by(self, place: str) -> None:
        if place == self.place and self.global_step >= READY_AT:
            sys.stdout.write("ready\n")
            sys.stdout.flush()
            time.sleep(0.2)


def main() -> None:
    fit = trainer(
        max_epochs=-1,
        logger=CSVLogger("."),
        callbacks=[AdamMonitor(flight_recorder=20)],
        num_sanity_val_steps=0,
    )
    fit.fit(Slow(sys.argv[1]), loader(10), loader(50))
    sys.stdout.write("came to its end\n")


if __name__ == "__main__":
    # Whoever has started the tests in the background of a shell ignores it, and so would this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
