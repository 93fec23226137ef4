"""Findings in real trainings: what is said, kept and done about them."""

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import wandb
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_adam import AdamMonitor
from lightning_adam.dashboard.report import page
from lightning_adam.dashboard.runs import read_runs
from lightning_adam.findings.finding import Finding
from lightning_adam.schema import Severity
from tests.support.commands import history, offline_runs
from tests.support.training import ADAMW, Lit, loader, parameters, trainer

STEPS = 60


class Scaled(Lit):
    """Whose loss is multiplied, as far as `until`."""

    def __init__(self, scale: float, until: int = 10**9, **configs: Any) -> None:
        super().__init__(**{"optimizer": ADAMW, **configs})
        self.scale, self.until = scale, until

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * (self.scale if self.global_step < self.until else 1.0)


def fitted(module: L.LightningModule, steps: int = STEPS, **settings: Any) -> AdamMonitor:
    monitor = AdamMonitor(**{"every_n_steps": 1, **settings})
    trainer(max_epochs=1, callbacks=[monitor]).fit(module, loader(steps))
    return monitor


def above_info(findings: list[Finding]) -> list[str]:
    return [each.code for each in findings if each.severity is not Severity.info]


def said(capture: pytest.CaptureFixture[str]) -> str:
    told = capture.readouterr()
    return told.out + told.err


def test_what_is_wrong_is_said_with_numbers_and_what_to_type(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"):
        monitor = fitted(Scaled(1e-9))
    (finding,) = [each for each in monitor.findings if each.code == "eps_dominates"]
    (block,) = [each for each in caplog.messages if each.startswith("AdamMonitor: eps_dominates")]
    lines = block.splitlines()
    assert lines[0] == "AdamMonitor: eps_dominates (error) at step 33, in model"
    assert "eps_energy_loss" in block
    assert f"  type:    {' '.join(finding.remedy)}" in lines
    assert lines[-1] == "  more:    lightning-adam explain eps_dominates"
    assert all(len(line) <= 100 for line in lines)
    (summary,) = [each for each in caplog.messages if "findings in 60 measurements" in each]
    assert "eps_dominates (error), from step 33 to the end" in summary


def test_the_remedy_cures() -> None:
    (finding,) = [each for each in fitted(Scaled(1e-9)).findings if each.code == "eps_dominates"]
    (override,) = finding.remedy
    name, _, value = override.partition("=")
    assert name == "optimizer.eps"
    healed = fitted(Scaled(1e-9, optimizer={**ADAMW, "eps": float(value)}))
    assert "eps_dominates" not in above_info(healed.findings)


def test_the_place_of_a_relocated_config_is_what_is_typed() -> None:
    from omegaconf import OmegaConf

    config = OmegaConf.create({"model": {"optimizer": ADAMW}})
    monitor = fitted(Scaled(1e-9, optimizer=config.model.optimizer))
    (finding,) = [each for each in monitor.findings if each.code == "eps_dominates"]
    assert finding.remedy[0].startswith("model.optimizer.eps=")


def test_a_sound_training_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        monitor = fitted(Lit({**ADAMW, "lr": 1e-3}))
    assert above_info(monitor.findings) == []
    assert "AdamMonitor has found nothing wrong in 60 measurements." in caplog.messages


def test_what_is_cured_in_the_middle_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        monitor = fitted(Scaled(1e-9, until=50), steps=70)
    (finding,) = [each for each in monitor.findings if each.code == "eps_dominates"]
    assert finding.closed is not None
    assert any("eps_dominates has ceased at step" in each for each in caplog.messages)


def test_what_comes_and_goes_is_not_said_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    class Restless(Scaled):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.scale = 1.0 if self.global_step % 60 else 100.0
            return super().training_step(batch, batch_idx)

    with caplog.at_level("INFO"):
        monitor = fitted(Restless(1.0, optimizer={**ADAMW, "betas": [0.9, 0.99]}), steps=600)
    lags = [each for each in monitor.findings if each.code == "exp_avg_sq_lags"]
    said = [each for each in caplog.messages if "AdamMonitor: exp_avg_sq_lags (w" in each]
    assert len(lags) > 5
    assert len(said) == 3


def test_findings_can_be_switched_off() -> None:
    assert fitted(Scaled(1e-9), findings=None).findings == []
    off = fitted(Scaled(1e-9), findings={"eps_dominates": {"severity": "off"}})
    assert "eps_dominates" not in [each.code for each in off.findings]


def test_a_finding_can_end_the_training() -> None:
    monitor = AdamMonitor(every_n_steps=1, stop_on=["eps_dominates"])
    fit = trainer(max_epochs=1, callbacks=[monitor])
    fit.fit(Scaled(1e-9), loader(STEPS))
    assert fit.global_step == 33
    fit = trainer(max_epochs=1, callbacks=[AdamMonitor(every_n_steps=1)])
    fit.fit(Scaled(1e-9), loader(STEPS))
    assert fit.global_step == STEPS


def test_a_finding_that_is_only_recorded_ends_it_too_and_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    monitor = AdamMonitor(every_n_steps=1, stop_on=["warmup_short"])
    fit = trainer(max_epochs=1, callbacks=[monitor])
    with caplog.at_level("INFO"):
        fit.fit(Lit(ADAMW), loader(STEPS))
    assert fit.global_step == 1
    assert any(each.startswith("AdamMonitor: warmup_short (info)") for each in caplog.messages)


class ByHand(Scaled):
    """Steps itself, and returns what is no loss of the batch: one number for each element."""

    def __init__(self, scale: float) -> None:
        super().__init__(scale)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return {"loss": loss.detach().repeat(3)}


@pytest.mark.filterwarnings("error:AdamMonitor has failed")
def test_where_no_loss_is_returned_the_rest_is_judged() -> None:
    assert above_info(fitted(ByHand(1e-9)).findings) == ["eps_dominates"]


def test_looking_for_findings_changes_no_parameter() -> None:
    with_findings, without = Scaled(1e-9), Scaled(1e-9)
    fitted(with_findings)
    fitted(without, findings=None)
    assert all(map(torch.equal, parameters(with_findings), parameters(without)))


def test_a_rule_that_fails_switches_the_monitor_off_and_not_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr("lightning_adam.findings.watch.Watch.judge", fail)
    module, other = Scaled(1.0), Scaled(1.0)
    with pytest.warns(UserWarning, match="AdamMonitor has failed and is off"):
        fitted(module)
    monkeypatch.undo()
    fitted(other, findings=None)
    assert all(map(torch.equal, parameters(module), parameters(other)))


def test_an_offline_run_keeps_a_table_a_summary_and_a_file(tmp_path: Path) -> None:
    logger = WandbLogger(offline=True, save_dir=tmp_path)
    monitor = AdamMonitor(every_n_steps=1, alert=True)
    trainer(max_epochs=1, callbacks=[monitor], logger=logger).fit(Scaled(1e-9), loader(STEPS))
    summary = dict(logger.experiment.summary)
    wandb.finish()
    (run,) = offline_runs(tmp_path)
    assert summary["adam_findings_open"].split(", ")[-1] == "eps_dominates"
    tables = [row["adam_findings.path"] for row in history(run) if "adam_findings.path" in row]
    table = json.loads((run / "files" / tables[-1]).read_text())
    assert [row[0] for row in table["data"]] == [each.code for each in monitor.findings]
    (read,) = read_runs([run])
    assert read.findings == monitor.findings


def test_the_page_shows_findings_and_marks_them_in_curves(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    monitor = AdamMonitor(every_n_steps=1)
    trainer(max_epochs=1, callbacks=[monitor], logger=logger).fit(Scaled(1e-9), loader(STEPS))
    (read,) = read_runs([tmp_path])
    assert read.findings == monitor.findings
    shown = page([read])
    (finding,) = [each for each in monitor.findings if each.code == "eps_dominates"]
    assert finding.remedy[0] in shown
    assert '"code": "eps_dominates", "run": 0' in shown or '"code":"eps_dominates"' in shown


def resumed(
    tmp_path: Path, change: Any, steps: int = STEPS, **settings: Any
) -> tuple[AdamMonitor, L.Trainer]:
    """A training that goes on from a checkpoint, in which something was changed."""
    saving = ModelCheckpoint(tmp_path, filename="half", save_weights_only=False)
    monitor = AdamMonitor(every_n_steps=5, **settings)
    first = trainer(max_epochs=1, callbacks=[monitor, saving], enable_checkpointing=True)
    first.fit(Lit({**ADAMW, "lr": 1e-3}), loader(steps))
    file = tmp_path / "half.ckpt"
    checkpoint = torch.load(file, weights_only=False)
    change(checkpoint["optimizer_states"][0])
    torch.save(checkpoint, file)
    monitor = AdamMonitor(every_n_steps=5, **settings)
    second = trainer(max_epochs=2, callbacks=[monitor])
    second.fit(Lit({**ADAMW, "lr": 1e-3}), loader(steps), ckpt_path=file, weights_only=False)
    return monitor, second


def lose_moments(state: dict[str, Any]) -> None:
    for each in state["state"].values():
        each["exp_avg"].zero_()
        each["exp_avg_sq"].zero_()


def lose_steps(state: dict[str, Any]) -> None:
    for each in state["state"].values():
        each["step"].zero_()


def nothing(state: dict[str, Any]) -> None:
    """The control."""


@pytest.mark.parametrize(
    ("change", "codes"),
    [(lose_moments, ["state_mismatch"]), (lose_steps, ["state_mismatch"]), (nothing, [])],
)
def test_state_that_was_lost_is_seen_at_the_first_step_after_a_resume(
    tmp_path: Path, change: Any, codes: list[str]
) -> None:
    monitor, _ = resumed(tmp_path, change)
    found = [each for each in monitor.findings if each.severity is Severity.error]
    assert [each.code for each in found] == codes
    # Not due by itself: 5 does not divide it.
    assert [each.step for each in found] == [STEPS + 1 for _ in codes]
    assert all(math.isfinite(each.evidence["direction_rms"]) for each in found)


def test_findings_go_on_after_a_resume(tmp_path: Path) -> None:
    def fit(epochs: int, **resume: Any) -> AdamMonitor:
        monitor = AdamMonitor(every_n_steps=5)
        saving = ModelCheckpoint(tmp_path, filename="half")
        fit = trainer(max_epochs=epochs, callbacks=[monitor, saving], enable_checkpointing=True)
        fit.fit(Scaled(1e-9), loader(STEPS), **resume)
        return monitor

    (first,) = [each for each in fit(1).findings if each.code == "eps_dominates"]
    again = [
        each
        for each in fit(2, ckpt_path=tmp_path / "half.ckpt").findings
        if each.code == "eps_dominates"
    ]
    assert [each.step for each in again] == [first.step]
