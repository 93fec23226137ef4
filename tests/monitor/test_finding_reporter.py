"""Findings in real training runs: what is logged and stored, and when the run stops."""

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import wandb
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from omegaconf import OmegaConf

from lightning_adam import AdamMonitor
from lightning_adam.config.monitor import Severity
from lightning_adam.findings import RULES, rule
from lightning_adam.findings.finding import Finding
from lightning_adam.findings.rule import Warmup
from lightning_adam.findings.suggestions import no_suggestion
from lightning_adam.reports.runs import read_runs
from tests.reports.parsed_report import report_of
from tests.support.commands import history, offline_runs
from tests.support.loops import ManualTwoSteps
from tests.support.tables import each_row
from tests.support.training import ADAMW, Lit, loader, parameters, trainer

STEPS = 45
TINY = 1e-9
"""A factor of the loss at which eps dominates."""
RAISED_AT = 33
"""The step at which this is found."""


class Scaled(Lit):
    """The loss is multiplied by `scale` up to step `until`."""

    def __init__(self, scale: float, until: int = 10**9, **configs: Any) -> None:
        super().__init__(**{"optimizer": ADAMW, **configs})
        self.scale, self.until = scale, until

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * (self.scale if self.global_step < self.until else 1.0)


class Run(NamedTuple):
    """A finished training run."""

    module: L.LightningModule
    monitor: AdamMonitor
    global_step: int
    log_lines: list[str]
    """The logged messages."""
    log_warnings: list[str]
    """Those at level WARNING."""

    def found(self, code: str) -> list[Finding]:
        return [each for each in self.monitor.findings if each.code == code]


def run_training(module: L.LightningModule, steps: int = STEPS, **settings: Any) -> Run:
    monitor = AdamMonitor(**{"every_n_steps": 1, **settings})
    fit = trainer(max_epochs=1, callbacks=[monitor])
    log_lines: list[str] = []
    log_warnings: list[str] = []

    def log_warning(line: str) -> None:
        log_lines.append(line)
        log_warnings.append(line)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_adam.monitor.finding_reporter.log_info", log_lines.append)
        patch.setattr("lightning_adam.monitor.finding_reporter.log_warning", log_warning)
        fit.fit(module, loader(steps))
    return Run(module, monitor, fit.global_step, log_lines, log_warnings)


@pytest.fixture(scope="module")
def tiny() -> Run:
    """A run in which eps dominates."""
    return run_training(Scaled(TINY))


@pytest.fixture(scope="module")
def without_findings() -> Run:
    """The same run without findings."""
    return run_training(Scaled(TINY), findings=None)


def above_info(findings: list[Finding]) -> list[str]:
    return [each.code for each in findings if each.is_above_info]


def have_same_parameters(one: Run, other: Run) -> bool:
    return all(map(torch.equal, parameters(one.module), parameters(other.module)))


def test_finding_is_logged_as_a_warning_with_its_evidence_and_override(tiny: Run) -> None:
    (finding,) = tiny.found("eps_dominates")
    (block,) = tiny.log_warnings
    lines = block.splitlines()
    assert lines[0] == f"AdamMonitor: eps_dominates (error) at step {RAISED_AT}, in model"
    assert "eps_energy_loss" in block
    assert f"  use:     {' '.join(finding.remedy)}" in lines
    assert lines[-1] == "  more:    lightning-adam explain eps_dominates"
    assert all(len(line) <= 100 for line in lines)
    summary = tiny.log_lines[-1].splitlines()
    assert summary[:3] == [
        f"AdamMonitor: 1 issue in {STEPS} measurements",
        f"  eps_dominates (error), from step {RAISED_AT} to the end",
        f"  use:     {' '.join(finding.remedy)}",
    ]


def test_suggestion_prevents_the_finding(tiny: Run) -> None:
    ((override,),) = [each.remedy for each in tiny.found("eps_dominates")]
    name, _, value = override.partition("=")
    assert name == "optimizer.eps"
    run = run_training(Scaled(TINY, optimizer={**ADAMW, "eps": float(value)}))
    assert "eps_dominates" not in above_info(run.monitor.findings)


def test_override_has_the_config_path_of_the_optimizer() -> None:
    partial = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.01}
    in_code = OmegaConf.create({"model": {"preset": ADAMW, "partial": partial}})
    composed = OmegaConf.create({"model": {"preset": {**ADAMW, "eps": 1e-8}, "partial": partial}})
    OmegaConf.set_struct(composed, True)
    rows = [
        (ADAMW, "optimizer.eps="),
        (in_code.model.preset, "cfg.model.preset.eps="),
        (composed.model.preset, "model.preset.eps="),
        (composed.model.partial, "+model.partial.eps="),
    ]
    with each_row() as row:
        for optimizer, beginning in rows:
            with row(beginning):
                run = run_training(Scaled(TINY, optimizer=optimizer))
                ((override,),) = [each.remedy for each in run.found("eps_dominates")]
                assert override.startswith(beginning)


def test_override_has_the_config_path_of_the_group_that_has_the_setting() -> None:
    head = {"name": "head", "match": "net.3.*", "eps": 1e-7}
    rows = [
        ([head], {"optimizer.eps", "optimizer.groups.0.eps"}),
        ([{**head, "match": "net.*"}], {"optimizer.groups.0.eps"}),
    ]
    with each_row() as row:
        for groups, expected in rows:
            with row(groups):
                run = run_training(Scaled(TINY, optimizer={**ADAMW, "groups": groups}))
                (finding,) = run.found("eps_dominates")
                assert {each.partition("=")[0] for each in finding.remedy} == expected


def test_healthy_run_logs_that_no_issues_were_found() -> None:
    run = run_training(Lit({**ADAMW, "lr": 1e-3}))
    assert above_info(run.monitor.findings) == []
    (summary,) = run.log_lines
    title, *rest = summary.splitlines()
    assert title == f"AdamMonitor: No issues found ({STEPS} measurements)"
    assert rest == ["  Not judged because the run is too short: correlated_updates."]


def test_run_with_too_few_measurements_logs_an_interval_that_is_short_enough() -> None:
    faulty = {**ADAMW, "eps": 1.0}
    run = run_training(Lit(faulty), steps=48, every_n_steps=50)
    (summary,) = run.log_lines
    assert "No issues found" not in summary
    assert "1 measurement is too few to judge" in summary
    found = re.search(r"Use adam_monitor\.every_n_steps=(\d+) in a run of 48 steps\.", summary)
    assert found is not None
    more_often = run_training(Lit(faulty), steps=48, every_n_steps=int(found[1]))
    assert above_info(more_often.monitor.findings) == ["eps_dominates"]


def test_suggested_interval_allows_for_the_warmup_of_the_learning_rate() -> None:
    scheduler = {"name": "constant", "warmup_steps": 32}
    configs = {"optimizer": {**ADAMW, "eps": 1.0}, "scheduler": scheduler}
    run = run_training(Lit(**configs), steps=60, every_n_steps=50)
    found = re.search(r"every_n_steps=(\d+) in a run", run.log_lines[-1])
    assert found is not None
    more_often = run_training(Lit(**configs), steps=60, every_n_steps=int(found[1]))
    assert above_info(more_often.monitor.findings) == ["eps_dominates"]


def test_finding_that_is_resolved_is_closed_and_logged() -> None:
    run = run_training(Scaled(TINY, until=40), steps=55)
    (finding,) = run.found("eps_dominates")
    assert finding.closed is not None
    assert any("eps_dominates resolved at step" in line for line in run.log_lines)


@pytest.mark.parametrize(("info_until", "printed"), [(0, [1, 10, 20]), (25, [30, 40])])
def test_recurring_finding_is_logged_three_times_at_most(
    info_until: int, printed: list[int]
) -> None:
    """Findings of severity info do not count."""

    @rule(
        severity=Severity.warning,
        sentence="It recurs.",
        when="",
        suggest=no_suggestion,
        source="this test",
        patience=1,
        warmup=Warmup.NONE,
        waits_for_peak=False,
    )
    def recurs(step: float) -> bool | Severity:
        """Holds for five of ten steps."""
        return step % 10 < 5 and (step > info_until or Severity.info)

    try:
        run = run_training(Lit(ADAMW))
    finally:
        del RULES["recurs"]
    assert [each.step for each in run.found("recurs")] == [1, 10, 20, 30, 40]
    lines = "\n".join(run.log_lines)
    found = re.findall(r"AdamMonitor: recurs \(warning\) at step (\d+)", lines)
    assert [int(step) for step in found] == printed


def test_findings_can_be_disabled_together_or_by_name(without_findings: Run) -> None:
    assert without_findings.monitor.findings == []
    settings = {"eps_dominates": {"severity": "off"}}
    assert run_training(Scaled(TINY), findings=settings).found("eps_dominates") == []


def test_local_rules_are_judged_in_the_scopes_of_the_monitor() -> None:
    @rule(
        severity=Severity.error,
        sentence="",
        when="",
        suggest=no_suggestion,
        source="",
        is_local=True,
    )
    def is_part(weight_norm: float, model: Mapping[str, float]) -> bool:
        """Holds in every part of the model."""
        return weight_norm < model["weight_norm"]

    try:
        found = {
            scopes: run_training(Lit(ADAMW), scopes=[*scopes]).found("is_part")
            for scopes in (("model",), ("layer",), ("group", "tensor"))
        }
    finally:
        del RULES["is_part"]
    kinds = {
        scopes: {(each.scope.partition("/")[0], each.severity) for each in findings}
        for scopes, findings in found.items()
    }
    assert kinds == {
        ("model",): set(),
        ("layer",): {("layer", Severity.warning)},
        # A finding in a group replaces those in its tensors.
        ("group", "tensor"): {("group", Severity.warning)},
    }


def test_stop_on_ends_training_when_the_finding_is_raised(tiny: Run) -> None:
    stopped = run_training(Scaled(TINY), stop_on=["eps_dominates"])
    assert (stopped.global_step, tiny.global_step) == (RAISED_AT, STEPS)


def test_notice_does_not_stop_a_run() -> None:
    """A run that is measured rarely may miss exp_avg_sq_lags."""
    run = run_training(Lit({**ADAMW, "lr": 1e-3}), every_n_steps=10, stop_on=["exp_avg_sq_lags"])
    assert "measured_rarely" in [each.code for each in run.monitor.findings]
    assert run.global_step == STEPS


def test_stop_on_an_info_finding_ends_training_and_logs_it() -> None:
    settings = {"eps_dominates": {"severity": "info"}}
    run = run_training(Scaled(TINY), findings=settings, stop_on=["eps_dominates"])
    assert run.global_step == RAISED_AT
    assert any(line.startswith("AdamMonitor: eps_dominates (info)") for line in run.log_lines)
    assert run.log_warnings == []


def test_stop_on_ignores_a_finding_that_its_rule_downgrades_to_info() -> None:
    """A jump that the second moment nearly absorbs does not stop the run."""

    class Jumping(Scaled):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.scale = 8.0 if self.global_step == 40 else 1.0
            return super().training_step(batch, batch_idx)

    run = run_training(Jumping(1.0), stop_on=["exp_avg_sq_lags"])
    assert {each.severity for each in run.found("exp_avg_sq_lags")} == {Severity.info}
    assert run.global_step == STEPS


class ManualWithoutLoss(Scaled):
    """Manual optimization that returns one number per sample instead of a loss."""

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


@pytest.mark.filterwarnings("error:AdamMonitor failed")
def test_rules_that_need_no_loss_are_judged_without_one() -> None:
    assert above_info(run_training(ManualWithoutLoss(TINY)).monitor.findings) == ["eps_dominates"]


def test_findings_change_no_parameter(tiny: Run, without_findings: Run) -> None:
    assert have_same_parameters(tiny, without_findings)


def test_error_in_a_rule_disables_the_monitor_and_training_continues(
    monkeypatch: pytest.MonkeyPatch, without_findings: Run
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr("lightning_adam.findings.engine.RuleEngine.judge", fail)
    with pytest.warns(UserWarning, match="AdamMonitor failed"):
        failed = run_training(Scaled(TINY))
    assert have_same_parameters(failed, without_findings)


def test_offline_wandb_run_keeps_a_table_a_summary_and_a_file(tmp_path: Path) -> None:
    logger = WandbLogger(offline=True, save_dir=tmp_path)
    monitor = AdamMonitor(every_n_steps=1, alert=True)
    # The notice schedule_length is a warning.
    module = Scaled(TINY, scheduler={"name": "cosine", "total_steps": 400})
    trainer(max_epochs=1, callbacks=[monitor], logger=logger).fit(module, loader(STEPS))
    summary = dict(logger.experiment.summary)
    wandb.finish()
    (run,) = offline_runs(tmp_path)
    assert above_info(monitor.findings) == ["schedule_length", "eps_dominates"]
    assert {key: value for key, value in summary.items() if key.startswith("adam_findings_")} == {
        "adam_findings_open": "eps_dominates",
        "adam_findings_raised/eps_dominates": RAISED_AT,
    }
    tables = [row["adam_findings.path"] for row in history(run) if "adam_findings.path" in row]
    table = json.loads((run / "files" / tables[-1]).read_text())
    assert [row[0] for row in table["data"]] == [each.code for each in monitor.findings]
    (read,) = read_runs([run])
    assert read.findings == monitor.findings


def test_report_lists_findings_and_marks_them_in_curves(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    monitor = AdamMonitor(every_n_steps=1)
    trainer(max_epochs=1, callbacks=[monitor], logger=logger).fit(Scaled(TINY), loader(STEPS))
    (read,) = read_runs([tmp_path])
    assert read.findings == monitor.findings
    shown = report_of(read)
    (finding,) = [each for each in monitor.findings if each.code == "eps_dominates"]
    assert finding.remedy[0] in shown.text
    (interval,) = [each for each in shown.data["findings"] if each["code"] == finding.code]
    assert (interval["run"], interval["start"], interval["end"]) == (0, finding.step - 1, None)


# ---- The file in the run's folder


def content_of(logger: CSVLogger) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(logger.log_dir, "adam_findings.json").read_text())
    return content


class Reading(Scaled):
    """Reads the file at the start and the end of some batches."""

    def __init__(self, logger: CSVLogger, fails_at: int = STEPS) -> None:
        super().__init__(TINY)
        self.to_csv, self.fails_at = logger, fails_at
        self.contents: list[dict[str, Any]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx in (0, 40):
            self.contents.append(content_of(self.to_csv))
        if batch_idx == self.fails_at:
            raise ZeroDivisionError("planted")


def test_file_is_written_at_the_start_at_a_finding_and_at_the_end(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    module, monitor = Reading(logger), AdamMonitor(every_n_steps=1)
    trainer(max_epochs=1, callbacks=[monitor], logger=logger).fit(module, loader(STEPS))
    first, later = module.contents
    last = content_of(logger)
    assert [each["has_ended"] for each in (first, later, last)] == [False, False, True]
    assert [each["measurements"] for each in (first, later, last)] == [0, RAISED_AT, STEPS]
    assert 0 <= first["seconds"] < later["seconds"] < last["seconds"]
    codes = [[row["code"] for row in each["findings"]] for each in (first, later, last)]
    assert "eps_dominates" not in codes[0]
    assert "eps_dominates" in codes[1]
    assert [*map(Finding.of_row, last["findings"])] == monitor.findings


def test_file_says_that_a_healthy_run_was_judged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit = trainer(max_epochs=1, callbacks=[AdamMonitor(every_n_steps=2)], logger=logger)
    fit.fit(Lit({**ADAMW, "lr": 1e-3}), loader(6))
    content = content_of(logger)
    assert above_info([Finding.of_row(row) for row in content["findings"]]) == []
    # The first step and every second one.
    assert (content["measurements"], content["has_ended"]) == (4, True)


@pytest.mark.filterwarnings("ignore:AdamMonitor failed")
@pytest.mark.parametrize("is_in_monitor", [True, False])
def test_file_says_that_a_run_has_ended_after_an_error(
    is_in_monitor: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("planted")

    logger = CSVLogger(tmp_path)
    fit = trainer(max_epochs=1, callbacks=[AdamMonitor(every_n_steps=1)], logger=logger)
    if is_in_monitor:
        monkeypatch.setattr("lightning_adam.findings.engine.RuleEngine.judge", fail)
        fit.fit(Scaled(TINY), loader(5))
    else:
        with pytest.raises(ZeroDivisionError):
            fit.fit(Reading(logger, fails_at=4), loader(STEPS))
        assert content_of(logger)["measurements"] == 4
    assert content_of(logger)["has_ended"]


def test_file_is_not_written_without_rules(tmp_path: Path) -> None:
    monitor = AdamMonitor(every_n_steps=1, findings=None)
    trainer(max_epochs=1, callbacks=[monitor], logger=CSVLogger(tmp_path)).fit(
        Scaled(TINY), loader(5)
    )
    assert not [*tmp_path.rglob("adam_findings.json")]
    (run,) = read_runs([tmp_path])
    assert (run.findings, run.measurements) == (None, 5)


# ---- Resumed runs

Saved = Callable[[str], tuple[Path, AdamMonitor]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The checkpoint and the monitor of a run of one epoch, healthy or with a tiny loss."""

    @functools.cache
    def save(kind: str) -> tuple[Path, AdamMonitor]:
        keep = ModelCheckpoint(tmp_path_factory.mktemp(kind), filename="half")
        monitor = AdamMonitor(every_n_steps=5)
        fit = trainer(max_epochs=1, callbacks=[monitor, keep], enable_checkpointing=True)
        fit.fit(resumable(kind), loader(STEPS))
        return Path(keep.best_model_path), monitor

    return save


def resumable(kind: str) -> Lit:
    return Lit({**ADAMW, "lr": 1e-3}) if kind == "healthy" else Scaled(TINY)


def resume(kind: str, checkpoint: Path) -> AdamMonitor:
    monitor = AdamMonitor(every_n_steps=5)
    fit = trainer(max_epochs=-1, max_steps=STEPS + 20, callbacks=[monitor])
    fit.fit(resumable(kind), loader(STEPS), ckpt_path=checkpoint, weights_only=False)
    return monitor


@pytest.mark.parametrize("lost", [("exp_avg", "exp_avg_sq"), ("step",), ()])
def test_lost_optimizer_state_is_found_at_the_first_step_after_a_resume(
    lost: tuple[str, ...], saved: Saved, tmp_path: Path
) -> None:
    checkpoint = torch.load(saved("healthy")[0], weights_only=False)
    for state in checkpoint["optimizer_states"][0]["state"].values():
        for name in lost:
            state[name].zero_()
    torch.save(checkpoint, tmp_path / "lossy.ckpt")
    monitor = resume("healthy", tmp_path / "lossy.ckpt")
    found = [each for each in monitor.findings if each.severity is Severity.error]
    # That step is only measured because of the resume: 5 does not divide it.
    expected = [("state_mismatch", STEPS + 1)] if lost else []
    assert [(each.code, each.step) for each in found] == expected
    assert all(math.isfinite(each.evidence["normalized_update_rms"]) for each in found)


def test_lost_state_is_found_if_the_first_batch_takes_two_steps(tmp_path: Path) -> None:
    """The second step of the batch must not replace the measurement of the first one."""

    def fit(epochs: int, path: Path | None) -> AdamMonitor:
        monitor = AdamMonitor(every_n_steps=1)
        runner = trainer(max_epochs=epochs, callbacks=[monitor])
        runner.fit(ManualTwoSteps({**ADAMW, "lr": 1e-3}), loader(STEPS), ckpt_path=path)
        runner.save_checkpoint(tmp_path / "intact.ckpt")
        return monitor

    fit(1, None)
    checkpoint = torch.load(tmp_path / "intact.ckpt", weights_only=False)
    for state in checkpoint["optimizer_states"][0]["state"].values():
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
    torch.save(checkpoint, tmp_path / "lossy.ckpt")
    found = fit(2, tmp_path / "lossy.ckpt").findings
    assert [each.step for each in found if each.code == "state_mismatch"] == [2 * STEPS + 1]


def test_open_findings_are_kept_by_a_checkpoint(saved: Saved) -> None:
    checkpoint, monitor = saved("tiny")
    (finding,) = [each for each in monitor.findings if each.code == "eps_dominates"]
    resumed = resume("tiny", checkpoint).findings
    assert [each.step for each in resumed if each.code == "eps_dominates"] == [finding.step]
