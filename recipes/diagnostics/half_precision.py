"""Train in float16 and bfloat16, and show what AdamMonitor finds and what its suggestions do.

python -m recipes.diagnostics.half_precision
python -m recipes.diagnostics.half_precision 'cases=["trainer.precision=bf16-true"]'
python -m recipes.diagnostics.half_precision optimizer.lr=3e-4 trainer.max_epochs=8 compare=false

The table has a row for each run. A row with a plus is the run above it with one suggestion of its
most severe finding.
"""

import math
import shlex
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
from recipes._common import Loader, mnist_loaders, quoted, validation_metric
from recipes.diagnostics.clinic import LitWithFault, main_finding, short_trainer, small_mlp


class Row(NamedTuple):
    """A run, as the table shows it."""

    precision: str
    eps: str
    beta2: str
    notices: str
    """Preflight notices, also those of severity info."""
    findings: str
    """Warnings and errors."""
    loss: str
    overrides: str


HEAD = Row("precision", "eps", "β2", "before the first step", "findings", "val/loss", "overrides")


class LitWithTorchAdamW(LitWithFault):
    """Uses the AdamW of torch, which accepts an eps that is 0 in the parameters' dtype."""

    def __init__(self, net: nn.Module, optimizer: DictConfig, *others: Any) -> None:
        super().__init__(net, optimizer, *others)
        self.adam = optimizer

    def configure_optimizers(self) -> AdamW:
        adam = self.adam
        return AdamW(self.parameters(), lr=adam.lr, betas=tuple(adam.betas), eps=adam.eps)


def train(
    cfg: DictConfig, overrides: str, loaders: tuple[Loader, Loader]
) -> tuple[Row, list[Finding]]:
    """Trains with a config, and returns its row, and its warnings and errors."""
    L.seed_everything(cfg.seed, verbose=False)
    monitor = instantiate(cfg.adam_monitor)
    trainer = short_trainer(cfg, instantiate(cfg.get("logger")), monitor)
    lit = LitWithTorchAdamW if cfg.by_torch else LitWithFault
    net = small_mlp(cfg.width, nn.ReLU, pixels_times=1.0)
    module = lit(net, cfg.optimizer, cfg.scheduler, cfg.planted)
    trainer.fit(module, *loaders)
    loss = validation_metric(trainer, module, loaders[1], "val/loss")
    # W&B would log the next run of this process to the same run.
    wandb.finish()
    found = [each for each in monitor.findings if each.is_above_info]
    row = Row(
        # Lightning replaces 16-mixed by bf16-mixed without a GPU.
        precision=trainer.precision,
        eps=f"{cfg.optimizer.eps:g}",
        beta2=f"{cfg.optimizer.betas[1]:g}",
        notices=codes(each for each in monitor.findings if each.is_notice),
        findings=codes(each for each in found if not each.is_notice),
        loss=f"{math.nan if loss is None else loss:.4f}",
        overrides=overrides,
    )
    return row, found


def codes(findings: Iterable[Finding]) -> str:
    """Returns the names of findings, each once."""
    return ", ".join(dict.fromkeys(each.code for each in findings)) or "none"


def suggested(findings: Sequence[Finding]) -> list[list[str]]:
    """Returns the overrides that the most severe finding suggests, the best first."""
    if not findings:
        return []
    suggestions = main_finding(findings, None).suggestions
    return [list(each.overrides) for each in suggestions if each.overrides and not each.is_sweep]


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as aligned columns."""
    lines = [HEAD, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


@hydra.main(version_base="1.3", config_path="conf", config_name="half_precision")
def main(cfg: DictConfig) -> None:
    job = list(HydraConfig.get().overrides.task)
    loaders = mnist_loaders(cfg.batch_size)
    rows = []
    for case in cfg.cases:
        faulty = [*job, *shlex.split(case)]
        row, findings = train(hydra.compose("half_precision", faulty), case, loaders)
        rows.append(row)
        for overrides in suggested(findings) if cfg.compare else []:
            changed = hydra.compose("half_precision", [*faulty, *overrides])
            rows.append(train(changed, f"+ {shlex.join(overrides)}", loaders)[0])
    print(f"\n{table(rows)}")
    print(f"runs: {quoted(HydraConfig.get().runtime.output_dir)}")


if __name__ == "__main__":
    main()
