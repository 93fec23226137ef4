"""Train a network with a planted fault, then again with the suggestion of its finding.

python -m recipes.diagnostics.clinic fault=eps
python -m recipes.diagnostics.clinic fault=bf16_updates compare=false
python -m recipes.diagnostics.clinic fault=learning_rate_small logger=wandb_offline

Each fault is a file of `recipes/diagnostics/conf/fault`; `fault=none` is the healthy run.
"""

import math
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
import lightning as L
import torch
import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from lightning_adam import AdamMixin
from lightning_adam.config.monitor import Severity
from lightning_adam.findings.describe import describe_suggestions
from lightning_adam.findings.finding import Finding
from lightning_adam.reports.report import write_report
from lightning_adam.reports.runs import read_runs
from recipes._common import (
    check_positive,
    how_to_look,
    mnist_loaders,
    quoted,
    run_folder,
    validation_metric,
)

warnings.filterwarnings("ignore", message=".*AMP with fp16 is not supported on CPU")

MAX_LOSS_RATIO = 1.1
"""The largest ratio of the losses with and without a remedy that counts as no worse."""


@dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    findings: Sequence[Finding]
    """Warnings and errors, and the finding of the planted fault whatever its severity."""
    loss: float
    """NaN if the run diverged, or if validation is disabled."""
    look: list[str]
    """The lines that say where the run is."""
    folder: Path | None

    @property
    def codes(self) -> str:
        """The names of the findings, each once."""
        return ", ".join(dict.fromkeys(each.code for each in self.findings)) or "none"

    def has_resolved(self, other: "Outcome") -> bool:
        """Returns whether there are no findings, and the loss is finite and no worse."""
        is_better = not math.isfinite(other.loss) or self.loss < MAX_LOSS_RATIO * other.loss
        return not self.findings and math.isfinite(self.loss) and is_better


class LitWithFault(AdamMixin, L.LightningModule):
    """A classifier that multiplies its gradients, and adds those of the step before."""

    def __init__(
        self, net: nn.Module, optimizer: DictConfig, scheduler: DictConfig, planted: DictConfig
    ) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.net = net
        self.planted = planted
        self.last: dict[nn.Parameter, Tensor] = {}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val/loss", cross_entropy(self.net(images), labels), prog_bar=True)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        planted = self.planted
        step = self.trainer.global_step
        progress = min(1.0, max(0, step - planted.from_step + 1) / planted.over_steps)
        is_over = planted.to_step is not None and step >= planted.to_step
        factor = 1.0 if is_over else planted.gradients_times**progress
        for parameter in self.parameters():
            if parameter.grad is None:
                continue
            parameter.grad.mul_(factor)
            if planted.gradients_remember:
                last = self.last.get(parameter, torch.zeros_like(parameter.grad))
                parameter.grad.add_(last, alpha=planted.gradients_remember)
                self.last[parameter] = parameter.grad.clone()


class Exponential(nn.Module):
    """An activation that overflows."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.exp()


class Scale(nn.Module):
    """Multiplies its inputs."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.factor


class StopAfterEpoch(Callback):
    """Ends a run after an epoch."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def small_mlp(width: int, activation: type[nn.Module], pixels_times: float) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        Scale(pixels_times),
        nn.Linear(784, width),
        activation(),
        nn.Linear(width, width),
        activation(),
        nn.Linear(width, 10),
    )


def short_trainer(cfg: DictConfig, logger: Logger | None, *callbacks: Callback) -> L.Trainer:
    """Returns a trainer that saves no checkpoints."""
    trainer: L.Trainer = instantiate(
        cfg.trainer,
        logger=logger or False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    return trainer


def train(cfg: DictConfig) -> Outcome:
    """Trains with a config; resumes from a checkpoint if `planted.resume_after_epoch` is set."""
    logger, checkpoint = instantiate(cfg.get("logger")), None
    if cfg.planted.resume_after_epoch is not None:
        checkpoint = Path(HydraConfig.get().runtime.output_dir, "stopped.ckpt")
        trainer, _, _ = fit(cfg, logger, None, StopAfterEpoch(cfg.planted.resume_after_epoch))
        trainer.save_checkpoint(checkpoint)
        if cfg.planted.lose_moments:
            lose_moments(checkpoint)
    trainer, findings, loss = fit(cfg, logger, checkpoint)
    outcome = Outcome(
        [each for each in findings if each.is_above_info or each.code == cfg.finding],
        math.nan if loss is None else loss,
        how_to_look(trainer.logger),
        run_folder(trainer.logger),
    )
    # W&B would log the next run of this process to the same run.
    wandb.finish()
    return outcome


def fit(
    cfg: DictConfig, logger: Logger | None, ckpt_path: Path | None, *callbacks: Callback
) -> tuple[L.Trainer, list[Finding], float | None]:
    """Trains once, and returns all findings and the validation loss."""
    L.seed_everything(cfg.seed, verbose=False)
    monitor = instantiate(cfg.adam_monitor)
    trainer = short_trainer(cfg, logger, monitor, *callbacks)
    planted = cfg.planted
    net = small_mlp(cfg.width, get_class(planted.activation), planted.pixels_times)
    module = LitWithFault(net, cfg.optimizer, cfg.scheduler, planted)
    training, validation = mnist_loaders(cfg.batch_size)
    trainer.fit(module, training, validation, ckpt_path=ckpt_path)
    return trainer, monitor.findings, validation_metric(trainer, module, validation, "val/loss")


def lose_moments(checkpoint: Path) -> None:
    """Sets the moments in a checkpoint to 0, and leaves the step as it is."""
    saved = torch.load(checkpoint, weights_only=True)
    for optimizer in saved["optimizer_states"]:
        for state in optimizer["state"].values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
    torch.save(saved, checkpoint)


def main_finding(findings: Sequence[Finding], code: str | None) -> Finding:
    """Returns the finding of the planted fault, or the most severe if it is not there.

    Of several scopes, the latest that is open: its suggestion applies to all of them.
    """
    if code not in {each.code for each in findings}:
        code = min(findings, key=lambda each: each.severity is not Severity.error).code
    alike = [each for each in findings if each.code == code]
    return max([each for each in alike if each.is_open] or alike, key=lambda each: each.step)


def remedy_of(finding: Finding, by_hand: Sequence[str]) -> list[str]:
    """Returns the overrides of the second run.

    They are the suggestion of the finding, else those of the config, else the first lead that is
    not a sweep.
    """
    leads = [each.overrides for each in finding.suggestions if not each.is_sweep]
    return list(finding.remedy or by_hand or next(filter(None, leads), ()))


def side_by_side(before: Outcome, after: Outcome) -> str:
    """Returns a table of two runs."""
    rows = [
        ("", "with the fault", "with the remedy"),
        ("findings", before.codes, after.codes),
        ("validation loss", f"{before.loss:.4f}", f"{after.loss:.4f}"),
    ]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{name:<{first}}  {was:<{second}}  {now}".rstrip() for name, was, now in rows)


@hydra.main(version_base="1.3", config_path="conf", config_name="clinic")
def main(cfg: DictConfig) -> float:
    check_positive(cfg, "batch_size", "width")
    before = train(cfg)
    runs = [before]
    print(f"\nfindings: {before.codes}\nvalidation loss: {before.loss:.4f}")
    if before.findings:
        finding = main_finding(before.findings, cfg.finding)
        remedy = remedy_of(finding, cfg.by_hand)
        suggestions = describe_suggestions(finding.suggestions)
        print("\n".join([f"suggestions for {finding.code}:", *suggestions]))
        print(f"remedy: {shlex.join(remedy) or 'none'}")
        if cfg.compare and remedy:
            job = list(HydraConfig.get().overrides.task)
            after = train(hydra.compose("clinic", [*job, *remedy]))
            runs.append(after)
            print(f"\n{side_by_side(before, after)}")
            print("resolved" if after.has_resolved(before) else "not resolved")
    print("\n".join(line for each in runs for line in each.look))
    folders = [each.folder for each in runs if each.folder is not None]
    if folders:
        report = Path(HydraConfig.get().runtime.output_dir, "report.html")
        write_report(read_runs(list(dict.fromkeys(folders))), report)
        print(f"report: {quoted(report)}")
    return runs[-1].loss


if __name__ == "__main__":
    main()
