"""A search whose runs train, on one process and on two: short runs end after their share."""

from collections import Counter
from pathlib import Path

import pytest

from tests.support.commands import environment, run, write_files
from tests.support.tuning_app import CONFIG, MINIMIZE, TUNE, runs

APP = """
import os
import hydra
import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset
from lightning_adam import AdamMixin


class Lit(AdamMixin, L.LightningModule):
    def __init__(self, optimizer, scheduler):
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.net = torch.nn.Linear(4, 1)
        self.validated = 0

    def loss(self, batch):
        return (self.net(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.validated = self.trainer.global_step
        self.log("val/loss", self.loss(batch), sync_dist=True)

    def on_fit_end(self):
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        with open(os.environ["TRAINED"], "a") as file:
            print(self.trainer.global_step, self.validated, f"{lr:.6f}", file=file)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    L.seed_everything(cfg.seed)
    inputs = torch.randn(64 * cfg.devices, 4, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(inputs), batch_size=2)
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", devices=cfg.devices, strategy=cfg.strategy, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(Lit(cfg.optimizer, cfg.scheduler), data, data)
    return trainer.callback_metrics["val/loss"].item()


if __name__ == "__main__":
    main()
"""
SCHEDULED = CONFIG.replace("  - _self_", "  - lightning_adam/scheduler: cosine\n  - _self_")


@pytest.mark.parametrize(
    ("devices", "strategy"),
    [
        pytest.param(1, "auto", marks=pytest.mark.slow),
        pytest.param(2, "ddp", marks=pytest.mark.nightly),
    ],
)
def test_short_runs_validate_after_their_share_of_the_steps(
    devices: int, strategy: str, tmp_path: Path
) -> None:
    config = SCHEDULED.format(package="") + f"devices: {devices}\nstrategy: {strategy}\n"
    write_files(tmp_path, {"train.py": APP, "conf/config.yaml": config})
    trained = tmp_path / "trained.txt"
    variables = environment(TRAINED=str(trained), CUDA_VISIBLE_DEVICES="")
    # Two learning rates of the ladder are in this range.
    words = ["hydra.sweeper.n_trials=4", "hydra.sweeper.space.lr={low: 0.003, high: 0.02}"]
    tuned = run([*TUNE, MINIMIZE, *words], tmp_path, variables)
    assert tuned.returncode == 0, tuned.output
    assert "optimizer.lr=" in tuned.after("overrides: ")
    assert "worth 3.92 of 4 full runs" in tuned.output
    found = runs(tmp_path)
    assert Counter(each.request.length for each in found) == {1: 3, 1 / 8: 2, 1 / 3: 2}
    assert {each.steps for each in found} == {96}
    # Each process has trained, validated and ended its schedule at the same step.
    steps = [round(96 * each.request.length) for each in found for _ in range(devices)]
    lines = [f"{each} {each} 0.000000" for each in steps]
    assert Counter(trained.read_text().splitlines()) == Counter(lines)
