"""A search whose trials train on two processes: they are pruned together and counted once."""

from pathlib import Path

import pytest

from lightning_adam.tune.archive import Archive
from lightning_adam.tune.story import Outcome
from tests.support.commands import environment, run, write_files

APP = """
import os
import hydra
import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset
from lightning_adam import AdamMixin


class Lit(AdamMixin, L.LightningModule):
    def __init__(self, optimizer):
        super().__init__(optimizer=optimizer)
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log("val/loss", abs(torch.tensor(lr).log10() + 2.3), sync_dist=True)

    def on_fit_end(self):
        with open(os.environ["TRAINED"], "a") as file:
            print(self.global_rank, self.trainer.current_epoch, file=file)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    data = DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=2)
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", devices=2, strategy="ddp", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(Lit(cfg.optimizer), data, data)
    return trainer.callback_metrics["val/loss"].item()


if __name__ == "__main__":
    main()
"""
CONFIG = """
defaults:
  - lightning_adam/optimizer: adamw
  - _self_
"""


@pytest.mark.nightly
def test_all_ranks_of_a_pruned_trial_stop_together(tmp_path: Path) -> None:
    write_files(tmp_path, {"train.py": APP, "conf/config.yaml": CONFIG})
    trained = tmp_path / "trained.txt"
    words = ["hydra.sweeper.direction=minimize", "hydra.sweeper.n_trials=9"]
    words += ["hydra.sweeper.n_seeds=1", "hydra.sweeper.monitor=val/loss"]
    words += ["hydra.sweeper.stages.lr.space.lr.low=1e-6"]
    command = ["python", "train.py", "-m", "hydra/sweeper=adam_tune", *words]
    tuned = run(command, tmp_path, environment(TRAINED=str(trained), CUDA_VISIBLE_DEVICES=""))
    assert tuned.returncode == 0, tuned.output
    journal = tmp_path / "multirun/adam_tune_train/trials.journal"
    archive = Archive(f"journal:{journal}", "train", "minimize")
    found = [*archive.records("start"), *archive.records("lr")]
    assert len(found) == 9
    outcomes = [each.trial.outcome for each in found]
    assert set(outcomes) == {Outcome.complete, Outcome.stopped}
    lines = [line.split() for line in trained.read_text().splitlines()]
    epochs = {rank: [int(epoch) for r, epoch in lines if r == rank] for rank in ("0", "1")}
    assert sorted(epochs["0"]) == sorted(epochs["1"])
    assert len(epochs["0"]) == 9
    assert sum(epoch < 3 for epoch in epochs["0"]) == outcomes.count(Outcome.stopped)
