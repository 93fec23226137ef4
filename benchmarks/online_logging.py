"""How much slower is training when W&B logs online?

python -m benchmarks.online_logging
python -m benchmarks.online_logging --repetitions 3 --epochs 2

Trains the CNN of the recipe with W&B offline and with local servers, each in a separate process: a
fast server, a slow one, and one that answers 503 from the middle of the run on. The runs alternate,
and each is divided by the offline run of its round. The training loop is timed from batch to batch,
without `wandb.finish()`. "Logging" is the share of the loop in the logger. "Slower" is its increase
over offline, as a share of an offline step: the figure with the least noise.

The second offline run shows the noise. If it is as large as the effect, the machine is too busy.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger
from omegaconf import OmegaConf

from benchmarks.quiet import quieten, silence
from lightning_adam import AdamMonitor
from recipes._common import mnist_loaders
from recipes.mnist import LitClassifier, small_cnn
from tests.support.wandb_server import variables

REPOSITORY = Path(__file__).parents[1]
WIDTH = 32
BATCH_SIZE = 64
BATCHES = 63
FINISH_S = 5
"""Seconds after which the client stops waiting for a server that fails."""
TRANSMIT_S = 1
"""How often rows are sent: W&B's client would every 15 seconds, and these runs are short."""

MONITORS: dict[str, dict[str, Any]] = {
    "every step": {"every_n_steps": 1},
    "every 10": {"every_n_steps": 10},
    "every 10, histograms every 100": {"every_n_steps": 10, "histograms_every_n_steps": 100},
}
OFFLINE = "offline"


class Server:
    """A stand-in for W&B's server, in another process."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.commands = process.stdin
        self.url = process.stdout.readline().strip()

    def say(self, command: str) -> None:
        self.commands.write(f"{command}\n")
        self.commands.flush()


@dataclass(frozen=True)
class Arm:
    """The destination of a run's metrics."""

    server: Server | None = None
    fails: bool = False


@dataclass(frozen=True)
class Timed:
    """Seconds."""

    steps: list[float]
    logging: float
    finish: float

    @property
    def median(self) -> float:
        return median(self.steps)

    @property
    def logging_of_a_step(self) -> float:
        return self.logging / len(self.steps)

    @property
    def total(self) -> float:
        return sum(self.steps)


class TimedLogger(WandbLogger):
    """Knows how long it took altogether."""

    seconds = 0.0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        begin = time.perf_counter()
        super().log_metrics(metrics, step)
        self.seconds += time.perf_counter() - begin


class Clock(L.Callback):
    """Takes the time at each batch, and lets the server fail in the middle."""

    def __init__(self, arm: Arm, batches: int) -> None:
        self.arm, self.middle = arm, batches // 2
        self.times: list[float] = []

    def on_train_batch_start(self, *arguments: Any, **keywords: Any) -> None:
        self.times.append(time.perf_counter())
        if self.arm.server is not None and self.arm.fails and len(self.times) == self.middle:
            self.arm.server.say("unavailable")

    def on_train_end(self, *arguments: Any, **keywords: Any) -> None:
        self.times.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.online_logging")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--delay", type=float, default=2.0, help="of a slow server's answer")
    parser.add_argument("--monitors", nargs="+", choices=MONITORS, default=[*MONITORS])
    typed = parser.parse_args()
    torch.set_num_threads(1)
    quieten()
    os.environ |= {
        "WANDB_SILENT": "true",
        "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": str(TRANSMIT_S),
    }
    print(machine())
    with ExitStack() as stack:
        arms = {
            OFFLINE: Arm(),
            "offline again": Arm(),
            "well": Arm(stack.enter_context(server())),
            f"slow ({typed.delay:g} s)": Arm(stack.enter_context(server(typed.delay))),
            "503 from the middle": Arm(stack.enter_context(server()), fails=True),
        }
        timed(Arm(), 1, MONITORS["every step"])
        for monitor in typed.monitors:
            rounds = [
                turn(arms, number, typed.epochs, MONITORS[monitor])
                for number in range(typed.repetitions)
            ]
            print(f"\nAdamMonitor {monitor}:")
            print(table([*arms], rounds))


def machine() -> str:
    return (
        f"{os.cpu_count()} CPUs ({platform.machine()}), 1 thread; torch {torch.__version__},"
        f" wandb {wandb.__version__}, Python {platform.python_version()}"
    )


@contextmanager
def server(delay_s: float = 0.0) -> Iterator[Server]:
    """A server that ends with the block."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.wandb_server", "--delay", str(delay_s)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Server(process)


def turn(
    arms: dict[str, Arm], number: int, epochs: int, monitor: Mapping[str, Any]
) -> dict[str, Timed]:
    """Each arm once; another one begins each time."""
    names = [*arms]
    begin = number % len(names)
    order = names[begin:] + names[:begin]
    return {name: timed(arms[name], epochs, monitor) for name in order}


def timed(arm: Arm, epochs: int, monitor: Mapping[str, Any]) -> Timed:
    """Trains once."""
    clock = Clock(arm, epochs * BATCHES)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, silence():
        os.environ |= {
            "WANDB_DATA_DIR": folder,
            "WANDB_FINISH_TIMEOUT": str(FINISH_S if arm.fails else 0),
        }
        if arm.server is not None:
            arm.server.say("well")
            os.environ |= variables(arm.server.url)
        wandb.teardown()
        L.seed_everything(0)
        logger = TimedLogger(project="benchmark", save_dir=folder, offline=arm.server is None)
        module = LitClassifier(small_cnn(WIDTH), OmegaConf.create({"lr": 2e-3}), None)
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=logger,
            callbacks=[AdamMonitor(**monitor), clock],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        train, _ = mnist_loaders(BATCH_SIZE)
        trainer.fit(module, train)
        begin = time.perf_counter()
        wandb.finish()
        finish = time.perf_counter() - begin
    steps = [later - sooner for sooner, later in zip(clock.times, clock.times[1:], strict=False)]
    return Timed(steps, logger.seconds, finish)


def table(names: Sequence[str], rounds: Sequence[dict[str, Timed]]) -> str:
    """The arms with their ratios to the offline training of the same turn."""
    lines = [
        f"{'':22}{'step, ms':>10}{'median step':>26}{'all steps':>26}{'logging':>10}"
        f"{'slower':>10}"
        f"{'longest, s':>12}{'finish, s':>11}"
    ]
    for name in names:
        here = [each[name] for each in rounds]
        offline = [each[OFFLINE] for each in rounds]
        medians = [one.median / other.median for one, other in zip(here, offline, strict=True)]
        totals = [one.total / other.total for one, other in zip(here, offline, strict=True)]
        slower = [
            (one.logging_of_a_step - other.logging_of_a_step) / other.median
            for one, other in zip(here, offline, strict=True)
        ]
        lines.append(
            f"{name:22}{1e3 * median(one.median for one in here):10.2f}"
            f"{spread(medians):>26}{spread(totals):>26}"
            f"{median(one.logging / one.total for one in here):10.2%}{median(slower):10.2%}"
            f"{max(max(one.steps) for one in here):12.2f}"
            f"{median(one.finish for one in here):11.2f}"
        )
    return "\n".join(lines)


def spread(ratios: Sequence[float]) -> str:
    """The median of the turns, the least and the greatest."""
    return f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


if __name__ == "__main__":
    main()
