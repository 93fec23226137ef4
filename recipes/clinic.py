"""Trains a network with a planted fault, then again with the suggestion of its finding.

python -m recipes.clinic fault=eps
python -m recipes.clinic fault=bf16_updates compare=false
python -m recipes.clinic fault=learning_rate_small optimizer.lr=1e-5 logger=wandb_offline

Each fault is an option of `recipes/conf/fault`; `fault=none` is the healthy run.
"""

import math
import shlex
import warnings
from collections.abc import Iterable, Sequence
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
from torch.optim import Optimizer

from lightning_adam.config.monitor import Severity
from lightning_adam.findings.describe import describe_suggestions
from lightning_adam.findings.finding import Finding
from lightning_adam.reports.report import write_report
from lightning_adam.reports.runs import read_runs
from recipes.looking import folder_of, format_value, where_to_look
from recipes.mnist import LitClassifier, mnist_loaders
from recipes.quiet import quieten

NO_WORSE = 1.1
"""How much larger the loss may be with a remedy that is not expected to lower it."""


@dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    findings: Sequence[Finding]
    """Warnings and errors, and the finding of the planted fault whatever its severity."""
    loss: float
    location: str
    folder: Path | None

    @property
    def codes(self) -> str:
        """The names of the findings, each once."""
        return ", ".join(dict.fromkeys(each.code for each in self.findings)) or "none"

    def has_resolved(self, other: "Outcome") -> bool:
        """Returns whether there are no findings, and the loss is finite and no worse."""
        is_better = not math.isfinite(other.loss) or self.loss < NO_WORSE * other.loss
        return not self.findings and math.isfinite(self.loss) and is_better


class Exponential(nn.Module):
    """An activation that overflows."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.exp()


class LitWithFault(LitClassifier):
    """A classifier that multiplies its gradients, and adds those of the step before."""

    def __init__(
        self,
        net: nn.Module,
        optimizer: DictConfig,
        scheduler: DictConfig | None,
        planted: DictConfig,
    ) -> None:
        super().__init__(net, optimizer, scheduler)
        self.planted = planted
        self.last: dict[nn.Parameter, Tensor] = {}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        planted = self.planted
        step = self.trainer.global_step
        share = min(1.0, max(0, step - planted.from_step + 1) / planted.over_steps)
        is_over = planted.to_step is not None and step >= planted.to_step
        times = 1.0 if is_over else planted.gradients_times**share
        for parameter in self.parameters():
            if parameter.grad is None:
                continue
            parameter.grad.mul_(times)
            if planted.gradients_remember:
                last = self.last.get(parameter, torch.zeros_like(parameter.grad))
                parameter.grad.add_(last, alpha=planted.gradients_remember)
                self.last[parameter] = parameter.grad.clone()


class StopAfterEpoch(Callback):
    """Ends a run after an epoch, and saves a checkpoint."""

    def __init__(self, epochs: int, path: Path) -> None:
        self.epochs = epochs
        self.path = path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch + 1 == self.epochs:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


class Scale(nn.Module):
    """Multiplies its inputs."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.factor


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


def short_trainer(cfg: DictConfig, logger: Logger, *callbacks: Callback) -> L.Trainer:
    """Returns a trainer that saves no checkpoints."""
    trainer: L.Trainer = instantiate(
        cfg.trainer,
        logger=logger,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    return trainer


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Returns the errors, then the others."""
    return sorted(findings, key=lambda each: each.severity is not Severity.error)


def train(cfg: DictConfig) -> Outcome:
    """Trains with a config."""
    L.seed_everything(cfg.seed, verbose=False)
    logger = instantiate(cfg.logger)
    loaders = mnist_loaders(cfg.batch_size)

    def fit(ckpt_path: Path | None, *callbacks: Callback) -> Outcome:
        monitor = instantiate(cfg.adam_monitor)
        trainer = short_trainer(cfg, logger, monitor, *callbacks)
        planted = cfg.planted
        net = small_mlp(cfg.width, get_class(planted.activation), planted.pixels_times)
        module = LitWithFault(net, cfg.optimizer, cfg.scheduler, planted)
        trainer.fit(module, *loaders, ckpt_path=ckpt_path)
        found = [
            each for each in monitor.findings if each.is_above_info or each.code == cfg.finding
        ]
        loss = float(trainer.callback_metrics["val/loss"])
        return Outcome(found, loss, where_to_look(logger), folder_of(logger))

    checkpoint = None
    if cfg.planted.resume_after_epoch is not None:
        checkpoint = Path(HydraConfig.get().runtime.output_dir, "stopped.ckpt")
        fit(None, StopAfterEpoch(cfg.planted.resume_after_epoch, checkpoint))
        if cfg.planted.lose_moments:
            lose_moments(checkpoint)
    outcome = fit(checkpoint)
    # Two runs in one process need an end between them.
    wandb.finish()
    return outcome


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
    codes = {each.code for each in findings}
    code = code if code in codes else by_severity(findings)[0].code
    alike = [each for each in findings if each.code == code]
    return max([each for each in alike if each.is_open] or alike, key=lambda each: each.step)


def remedy_of(finding: Finding, by_hand: Sequence[str]) -> list[str]:
    """Returns the overrides of the second run.

    They are those that the finding suggests to type, else those of the config, else its first lead
    that is not a sweep.
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
    quieten()
    warnings.filterwarnings("ignore", message=".*AMP with fp16 is not supported on CPU")
    before = train(cfg)
    runs = [before]
    print(f"\nfindings: {before.codes}\nvalidation loss: {before.loss:.4f}")
    if before.findings:
        finding = main_finding(before.findings, cfg.finding)
        remedy = remedy_of(finding, cfg.by_hand)
        print(
            "\n".join(
                [f"suggestions for {finding.code}:", *describe_suggestions(finding.suggestions)]
            )
        )
        print(f"remedy: {shlex.join(remedy) or 'none'}")
        if cfg.compare and remedy:
            job = list(HydraConfig.get().overrides.task)
            after = train(hydra.compose("clinic", [*job, *remedy]))
            runs.append(after)
            print(f"\n{side_by_side(before, after)}")
            print("resolved" if after.has_resolved(before) else "not resolved")
    print("\n".join(dict.fromkeys(each.location for each in runs)))
    folders = [each.folder for each in runs if each.folder is not None]
    if folders:
        report = Path(HydraConfig.get().runtime.output_dir, "report.html")
        write_report(read_runs(folders), report)
        print(f"report: {format_value(str(report))}")
    return runs[-1].loss


if __name__ == "__main__":
    main()
