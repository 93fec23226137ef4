"""A training that is ill, what the monitor finds, and the same training with what it says to type.

python -m recipes.clinic fault=eps
python -m recipes.clinic fault=bf16_updates heal=false
python -m recipes.clinic fault=learning_rate_small optimizer.lr=1e-5 logger=wandb_offline

Every pathology is an option of `recipes/conf/fault`; `fault=none` is the training in health.
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
from torch.optim import Optimizer

from lightning_adam.config.monitor import Severity
from lightning_adam.findings.finding import Finding
from lightning_adam.reports.report import write_report
from lightning_adam.reports.runs import read_runs
from recipes.looking import folder_of, format_value, where_to_look
from recipes.mnist import LitClassifier, mnist_loaders
from recipes.quiet import quieten

NO_WORSE = 1.1
"""How much larger a loss may be where a remedy is not expected to lower it."""


@dataclass(frozen=True)
class Outcome:
    """What became of a training."""

    findings: Sequence[Finding]
    """Those that are told: of the severities warning and error."""
    loss: float
    look: str
    rows: Path | None

    @property
    def codes(self) -> str:
        """The findings' names, each once."""
        return ", ".join(dict.fromkeys(each.code for each in self.findings)) or "none"

    def is_healthier_than(self, other: "Outcome") -> bool:
        """Whether nothing is found any more, and the loss is finite and no worse."""
        is_better = not math.isfinite(other.loss) or self.loss < NO_WORSE * other.loss
        return not self.findings and math.isfinite(self.loss) and is_better


class Exponential(nn.Module):
    """An activation that overflows."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.exp()


class LitPatient(LitClassifier):
    """A classifier whose gradients can be made larger than they are, and remember others."""

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


class StopForNow(Callback):
    """Ends a training after an epoch, and leaves a checkpoint."""

    def __init__(self, epochs: int, path: Path) -> None:
        self.epochs = epochs
        self.path = path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch + 1 == self.epochs:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


class Times(nn.Module):
    """Inputs on another scale."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.factor


def small_mlp(width: int, activation: type[nn.Module], pixels_times: float) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        Times(pixels_times),
        nn.Linear(784, width),
        activation(),
        nn.Linear(width, width),
        activation(),
        nn.Linear(width, 10),
    )


def short_trainer(cfg: DictConfig, logger: Logger, *callbacks: Callback) -> L.Trainer:
    """A trainer of which only the numbers are kept."""
    trainer: L.Trainer = instantiate(
        cfg.trainer,
        logger=logger,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    return trainer


def above_info(findings: Sequence[Finding]) -> list[Finding]:
    """Those that are told."""
    return [each for each in findings if each.severity is not Severity.info]


def by_gravity(findings: Sequence[Finding]) -> list[Finding]:
    """The gravest first."""
    return sorted(findings, key=lambda each: each.severity is not Severity.error)


def train(cfg: DictConfig) -> Outcome:
    """Trains as it is configured."""
    L.seed_everything(cfg.seed, verbose=False)
    logger = instantiate(cfg.logger)
    loaders = mnist_loaders(cfg.batch_size)

    def fit(ckpt_path: Path | None, *callbacks: Callback) -> Outcome:
        monitor = instantiate(cfg.adam_monitor)
        trainer = short_trainer(cfg, logger, monitor, *callbacks)
        planted = cfg.planted
        net = small_mlp(cfg.width, get_class(planted.activation), planted.pixels_times)
        module = LitPatient(net, cfg.optimizer, cfg.scheduler, planted)
        trainer.fit(module, *loaders, ckpt_path=ckpt_path)
        told = above_info(monitor.findings)
        loss = float(trainer.callback_metrics["val/loss"])
        return Outcome(told, loss, where_to_look(logger), folder_of(logger))

    checkpoint = None
    if cfg.planted.resume_after_epoch is not None:
        checkpoint = Path(HydraConfig.get().runtime.output_dir, "stopped.ckpt")
        fit(None, StopForNow(cfg.planted.resume_after_epoch, checkpoint))
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


def remedy_of(findings: Sequence[Finding], by_hand: Sequence[str]) -> list[str]:
    """What the gravest finding says to type, or what stands for it in the configuration."""
    return list(by_gravity(findings)[0].remedy) or list(by_hand)


def side_by_side(before: Outcome, after: Outcome) -> str:
    """Two trainings, a row for each thing to compare."""
    rows = [
        ("", "as it is", "with the remedy"),
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
    remedy = remedy_of(before.findings, cfg.by_hand) if before.findings else []
    runs = [before]
    print(f"\nfindings: {before.codes}\nvalidation loss: {before.loss:.4f}")
    if not before.findings:
        print("nothing to heal")
    elif not cfg.heal or not remedy:
        print(f"to type: {shlex.join(remedy) or 'nothing'}")
    else:
        print(f"\nnow the same with {shlex.join(remedy)}\n")
        job = list(HydraConfig.get().overrides.task)
        after = train(hydra.compose("clinic", [*job, *remedy]))
        runs.append(after)
        print(f"\n{side_by_side(before, after)}")
        print(f"typed: {shlex.join(remedy)}")
        print("healed" if after.is_healthier_than(before) else "not healed")
    print("\n".join(dict.fromkeys(each.look for each in runs)))
    folders = [each.rows for each in runs if each.rows is not None]
    if folders:
        report = Path(HydraConfig.get().runtime.output_dir, "report.html")
        write_report(read_runs(folders), report)
        print(f"report: {format_value(str(report))}")
    return runs[-1].loss


if __name__ == "__main__":
    main()
