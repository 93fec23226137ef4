"""Adam in float16 and bfloat16: what is lost, what the monitor finds, and what it says to type.

python -m recipes.half_precision
python -m recipes.half_precision 'cases=["trainer.precision=16-true optimizer.eps=1e-4"]'
python -m recipes.half_precision optimizer.lr=3e-4 trainer.max_epochs=8 heal=false

One row a training. Those with a plus are the one above them, with a cure of its gravest finding.
"""

import shlex
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import hydra
import lightning as L
import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn
from torch.optim import AdamW

from lightning_adam.findings.finding import Finding
from recipes.clinic import LitPatient, above_info, by_gravity, short_trainer, small_mlp
from recipes.looking import format_value
from recipes.mnist import mnist_loaders
from recipes.quiet import quieten


class Row(NamedTuple):
    """A training, as the table shows it."""

    precision: str
    eps: str
    beta2: str
    foreseen: str
    """What was found before the first step; of what need not be wrong too."""
    found: str
    loss: str
    typed: str


HEAD = Row("precision", "eps", "β2", "before the first step", "in training", "val/loss", "typed")


class LitByTorch(LitPatient):
    """The same, with the optimizer that torch builds, whatever its eps is in the dtype."""

    def __init__(self, net: nn.Module, optimizer: DictConfig, *others: Any) -> None:
        super().__init__(net, optimizer, *others)
        self.adam = optimizer

    def configure_optimizers(self) -> AdamW:
        adam = self.adam
        return AdamW(self.parameters(), lr=adam.lr, betas=tuple(adam.betas), eps=adam.eps)


def train(cfg: DictConfig, typed: str, loaders: Sequence[Any]) -> tuple[Row, list[Finding]]:
    """Trains as it is configured."""
    L.seed_everything(cfg.seed, verbose=False)
    monitor = instantiate(cfg.adam_monitor)
    trainer = short_trainer(cfg, instantiate(cfg.logger), monitor)
    lit = LitByTorch if cfg.by_torch else LitPatient
    net = small_mlp(cfg.width, nn.ReLU, pixels_times=1.0)
    trainer.fit(lit(net, cfg.optimizer, cfg.scheduler, cfg.planted), *loaders)
    # Two runs in one process need an end between them.
    wandb.finish()
    told = above_info(monitor.findings)
    row = Row(
        # What Lightning has made of it: without a GPU 16-mixed is bf16-mixed.
        precision=trainer.precision,
        eps=f"{cfg.optimizer.eps:g}",
        beta2=f"{cfg.optimizer.betas[1]:g}",
        foreseen=codes(each for each in monitor.findings if each.step == 0),
        found=codes(each for each in told if each.step > 0),
        loss=f"{float(trainer.callback_metrics['val/loss']):.4f}",
        typed=typed,
    )
    return row, told


def codes(findings: Iterable[Finding]) -> str:
    """The findings' names, each once."""
    return ", ".join(dict.fromkeys(each.code for each in findings)) or "nothing"


def cures_of(findings: Sequence[Finding]) -> list[list[str]]:
    """All that the gravest finding says to type, the best first."""
    gravest = by_gravity(findings)[:1]
    return [list(cure.overrides) for each in gravest for cure in each.cures if cure.overrides]


def table(rows: Sequence[Row]) -> str:
    """The trainings below each other."""
    lines = [HEAD, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


@hydra.main(version_base="1.3", config_path="conf", config_name="half_precision")
def main(cfg: DictConfig) -> None:
    quieten()
    warnings.filterwarnings("ignore", message=".*AMP with fp16 is not supported on CPU")
    job = list(HydraConfig.get().overrides.task)
    loaders = mnist_loaders(cfg.batch_size)
    rows = []
    for case in cfg.cases:
        ill = [*job, *shlex.split(case)]
        row, findings = train(hydra.compose("half_precision", ill), case, loaders)
        rows.append(row)
        for cure in cures_of(findings) if cfg.heal else []:
            healed = hydra.compose("half_precision", [*ill, *cure])
            rows.append(train(healed, f"+ {shlex.join(cure)}", loaders)[0])
    print(f"\n{table(rows)}")
    print(f"runs: {format_value(HydraConfig.get().runtime.output_dir)}")


if __name__ == "__main__":
    main()
