"""Findings before the first step of a sharded run, on two ranks."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_adam import AdamMonitor
from tests.support.parallel import Sharded, fsdp2, loader
from tests.support.ranks import Ranks
from tests.support.training import trainer

pytestmark = pytest.mark.slow

LEFT_OUT = "net.3.weight"


class ValidatedFirst(Sharded):
    """FSDP2 keeps the whole parameters of the root after the forward of a validation."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def on_train_start(self) -> None:
        assert not any(isinstance(each, DTensor) for each in self.net.parameters())


class WithoutNames(ValidatedFirst):
    """Has groups without parameter names that lack some parameters."""

    def configure_optimizers(self) -> Any:
        named = self.named_parameters()
        return torch.optim.AdamW(each for name, each in named if name != LEFT_OUT)


def left_out_notices(kind: type[ValidatedFirst]) -> list[str]:
    """Returns the notices about parameters that are in no group."""
    monitor = AdamMonitor()
    fit = trainer(
        devices=2,
        strategy=fsdp2(),
        callbacks=[monitor],
        max_steps=1,
        num_sanity_val_steps=1,
        use_distributed_sampler=False,
    )
    fit.fit(kind(), loader("FSDP2"), loader("FSDP2"))
    return [each.sentence for each in monitor.findings if each.code == "parameters_left_out"]


def test_only_parameters_without_a_group_are_reported_as_left_out(ranks: Ranks) -> None:
    assert ranks.run(left_out_notices, ValidatedFirst) == [[], []]
    for (sentence,) in ranks.run(left_out_notices, WithoutNames):
        assert sentence.endswith(f"are never trained: {LEFT_OUT}.")
