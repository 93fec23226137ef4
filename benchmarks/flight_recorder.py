"""Does the flight recorder keep quiet in healthy runs, and what does it cost?

python -m benchmarks.flight_recorder alarms
python -m benchmarks.flight_recorder cost

`alarms` trains healthy networks, the losses of some with heavy-tailed noise, and counts what the
recorder takes for a jump of the loss, beside what the criterion of Wortsman et al. (2023, arXiv
2304.13013, appendix D) alone would take for one: a loss 3.2 running standard deviations above the
running mean. At the end of each it asks which layer moved first: none should. Then each of them is
made to blow up, by 100 times the learning rate in its last third.

`cost` gives the memory of 200 steps and the time of a step, beside that of its measurement.
"""

import argparse
import logging
import math
import tempfile
import time
import tracemalloc
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median, pstdev
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.small_gpt import SmallGPT, text_loader
from lightning_adam import AdamMonitor
from lightning_adam.config.monitor import MonitorConfig
from lightning_adam.monitor.failsafe import Failsafe
from lightning_adam.monitor.flight_recorder.recorder import FlightRecorder
from lightning_adam.monitor.publishing import Publisher
from lightning_adam.optim.steps import StepCounter
from recipes._common import mnist_loaders
from recipes.mnist import small_cnn

STEPS = 200
FACTOR = 100.0
"""On the learning rate, of a run that diverges."""
SHAPES = {"150 tensors": (75, 64), "2,000 tensors": (1000, 16)}
"""Linear layers, and their width."""


class Training(NamedTuple):
    net: Callable[[], nn.Module]
    data: Callable[[], DataLoader[Any]]
    loss_of: Callable[[Tensor, Tensor], Tensor]
    lr: float
    steps: int
    weight_decay: float = 0.01


class Trained(L.LightningModule):
    """Keeps its losses; from a step on it has other learning rates."""

    def __init__(self, training: Training, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.training_of = training.net(), training
        self.factor = factor
        self.losses: list[float] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        settings = self.training_of
        return torch.optim.AdamW(
            self.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if len(self.losses) == 2 * self.training_of.steps // 3:
            self.trainer.optimizers[0].param_groups[0]["lr"] *= self.factor
        if len(batch) == 1:
            (text,) = batch
            batch = (text[:, :-1], text[:, 1:].flatten())
            loss = self.training_of.loss_of(self.net(batch[0]).flatten(0, 1), batch[1])
        else:
            loss = self.training_of.loss_of(self.net(batch[0]), batch[1])
        self.losses.append(float(loss))
        if len(self.losses) == self.training_of.steps:
            raise EndedError
        return loss


class EndedError(Exception):
    """The end, as an exception, so that the recorder says what it sees."""


def mlp(inputs: int, outputs: int, width: int = 128) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, outputs),
    )


def digits(batch_size: int, is_sorted: bool = False) -> DataLoader[Any]:
    pixels, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels / 16, dtype=torch.float32)
    numbers = torch.as_tensor(labels, dtype=torch.int64)
    if is_sorted:
        order = numbers.argsort()
        images, numbers = images[order], numbers[order]
    return DataLoader(TensorDataset(images, numbers), batch_size, shuffle=not is_sorted)


def regression(noise: torch.distributions.Distribution, batch_size: int) -> DataLoader[Any]:
    inputs = torch.randn(4096, 16, generator=torch.Generator().manual_seed(1))
    targets = inputs[:, :1].sin() + noise.sample((4096, 1))
    return DataLoader(TensorDataset(inputs, targets), batch_size, shuffle=True)


def gpt() -> nn.Module:
    return SmallGPT(layers=2, width=64)


STUDENT = torch.distributions.StudentT(2.0)
CAUCHY = torch.distributions.Cauchy(0.0, 1.0)
TRAININGS = {
    "MNIST, the recipe's CNN": Training(
        lambda: small_cnn(8), lambda: mnist_loaders(64)[0], cross_entropy, 1e-3, 1260
    ),
    "digits, MLP, batches of 8": Training(
        lambda: mlp(64, 10), lambda: digits(8), cross_entropy, 1e-3, 6000
    ),
    "digits, MLP, batches of 8, at ten times the rate": Training(
        lambda: mlp(64, 10), lambda: digits(8), cross_entropy, 1e-2, 6000
    ),
    "digits sorted by class, MLP, batches of 32": Training(
        lambda: mlp(64, 10), lambda: digits(32, is_sorted=True), cross_entropy, 1e-3, 3000
    ),
    "GPT of 2 layers, batches of 8": Training(
        gpt, lambda: text_loader(8), cross_entropy, 1e-3, 1500
    ),
    "GPT of 2 layers, batches of 1": Training(
        gpt, lambda: text_loader(1), cross_entropy, 1e-3, 3000
    ),
    "regression, Student's t of 2, batches of 4": Training(
        lambda: mlp(16, 1, 32), lambda: regression(STUDENT, 4), mse_loss, 1e-3, 6000
    ),
    "regression, Cauchy, batches of 4": Training(
        lambda: mlp(16, 1, 32), lambda: regression(CAUCHY, 4), mse_loss, 1e-3, 6000
    ),
}


class Outcome(NamedTuple):
    spikes: list[int]
    plain: int
    moved: str


def trained(training: Training, factor: float = 1.0) -> Outcome:
    lines: list[str] = []
    module = Trained(training, factor)
    with tempfile.TemporaryDirectory() as folder:
        fit = L.Trainer(
            max_epochs=-1,
            accelerator="cpu",
            logger=CSVLogger(folder),
            callbacks=[AdamMonitor(10**6, flight_recorder=STEPS)],
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        try:
            with mock.patch(
                "lightning_adam.monitor.flight_recorder.event_files.log_info", lines.append
            ):
                fit.fit(module, training.data())
        except EndedError:
            pass
        files = [file.name.split("_") for file in Path(folder).rglob("step_*.csv")]
        spikes = sorted(int(step) for _, step, reason, *_ in files if "exception" not in reason)
    said = [part for line in lines for part in line.split("; ") if part.startswith("layer ")]
    return Outcome(spikes, plain_alarms(module.losses), "; ".join(said))


def plain_alarms(losses: list[float]) -> int:
    """What is 3.2 standard deviations above the mean of the 256 before it."""
    before: deque[float] = deque(maxlen=256)
    alarms = 0
    for loss in losses:
        if math.isfinite(loss):
            if len(before) >= 64 and loss > fmean(before) + 3.2 * pstdev(before):
                alarms += 1
            before.append(loss)
    return alarms


def alarms() -> None:
    columns = ["training", "steps", "jumps", "of 3.2 deviations alone", "moved first"]
    columns += ["blown up at", "jumps", "moved first"]
    print(f"| {' | '.join(columns)} |\n|{len(columns) * '---|'}")
    for name, training in TRAININGS.items():
        healthy, blown_up = trained(training), trained(training, FACTOR)
        told = [name, training.steps, healthy.spikes, healthy.plain, healthy.moved or "none"]
        told += [2 * training.steps // 3, blown_up.spikes, blown_up.moved or "none"]
        print(f"| {' | '.join(map(str, told))} |", flush=True)


def cost() -> None:
    for name, (layers, width) in SHAPES.items():
        measure_cost(name, nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))))


def measure_cost(name: str, net: nn.Module) -> None:
    adam = torch.optim.AdamW(net.parameters(), fused=True)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    adam.step()
    counter = StepCounter(adam)
    failsafe = Failsafe(lambda: None)
    failsafe.start()
    epoch_loop = SimpleNamespace(_batches_that_stepped=0)
    trainer: Any = SimpleNamespace(
        lightning_module=SimpleNamespace(automatic_optimization=True),
        accumulate_grad_batches=1,
        fit_loop=SimpleNamespace(epoch_loop=epoch_loop),
        loggers=[],
        precision_plugin=None,
        default_root_dir=tempfile.mkdtemp(),
    )
    recorder = FlightRecorder(MonitorConfig(flight_recorder=STEPS), trainer, Publisher(trainer))
    recorder.track(adam, "", net, counter)
    loss = {"loss": torch.tensor(1.0)}

    def step() -> None:
        epoch_loop._batches_that_stepped += 1
        counter.taken += 1
        recorder.after_step("", failsafe)
        recorder.after_batch(loss)

    recording = recorder._recordings[""]
    measuring = timed(lambda: recording.statistics.update(adam))
    recorder.clear()
    tracemalloc.start()
    for _ in range(STEPS):
        step()
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    with mock.patch.object(recording.statistics, "update"):
        rest = timed(step)
    begin = time.perf_counter()
    recorder.write_on_exception(KeyboardInterrupt(), 1.0)
    written = time.perf_counter() - begin
    (file,) = Path(trainer.default_root_dir).rglob("*.csv")
    print(
        f"{name}: {memory / 2**20:.1f} MiB for {STEPS} steps; {rest * 1e6:.0f} us a step beside the"
        f" {measuring * 1e6:.0f} us of its measurement; written in {written:.1f} s,"
        f" {file.stat().st_size / 2**20:.0f} MiB",
        flush=True,
    )


def timed(step: Callable[[], None], repetitions: int = 400) -> float:
    seconds = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["alarms", "cost"])
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    {"alarms": alarms, "cost": cost}[parser.parse_args().what]()


if __name__ == "__main__":
    main()
