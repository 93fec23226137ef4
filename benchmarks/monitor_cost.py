"""What does it cost to look inside Adam: one measurement, a step in between, a whole training?

python -m benchmarks.monitor_cost
python -m benchmarks.monitor_cost --part step --sizes resnet18 small --rounds 11
python -m benchmarks.monitor_cost --part training --trainings mnist
python -m benchmarks.monitor_cost --sizes tiny --trainings tiny --rounds 2 --training-rounds 2
python -m benchmarks.monitor_cost --save benchmarks

The part `step` takes the tensors of a model, without the model, and divides what each arm takes by
torch's fused AdamW step of the same round. The part `training` trains with a real Trainer, and
divides each segment by that of the same round that was not monitored. In both, the arms take turns
in one process, in another order each round, so that what else the machine does falls on all alike;
what is reported is the median of the ratios. An arm that is there twice shows the noise: what is
smaller than its spread is not known.

With `--save FOLDER` the numbers are kept in `monitor_cost.json`, beside those that an earlier call
has left there of other parts and devices; a picture is drawn of them, and the tables are put into
the folder's README.md, between its markers.
"""

import argparse
import ctypes
import gc
import json
import logging
import math
import os
import platform
import random
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise, product
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypedDict, TypeVar

import lightning as L
import numpy as np
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from benchmarks.small_gpt import LitGPT, SmallGPT, text_loader
from lightning_adam import AdamMonitor, AdamStatistics
from recipes.mnist import LitClassifier, mnist_loaders, small_cnn

Shape = tuple[int, ...]
Work = Callable[[], object]
Named = Sequence[tuple[str, Tensor]]
Item = TypeVar("Item")

STEP = "fused step"
STEP_AGAIN = "fused step again"
READ = "plain read"
READ_AGAIN = "plain read again"
HEADLINE = "headline"
ALL = "all"
HISTOGRAMS = "all + histograms"
EAGER = "all, eager"
COMPOSER = "Composer"
OLMO = "OLMo"
WATCH = "wandb.watch"
STEPS = (STEP, STEP_AGAIN)
OURS = (HEADLINE, ALL, HISTOGRAMS, EAGER)
MATRICES = "matrix products"

NONE = "none"
NONE_AGAIN = "none again"
INTERVALS: dict[str, int | None] = {
    NONE: None,
    NONE_AGAIN: None,
    "every 50": 50,
    "every 10": 10,
    "every step": 1,
}

TARGET = 1.3
"""A measurement should cost no more than so many fused steps."""
TARGET_US = 5.0
"""A step that is not measured should cost no more than so many microseconds."""

LONG_S = 1.0
"""An arm that takes so long takes part in every second round only, one that takes twice as long in
every third, and so on."""
LEAST_ROUNDS = 3
"""But in so many, if there are as many."""

BEGIN, END = "<!-- results -->", "<!-- /results -->"


class Arm(TypedDict):
    milliseconds: list[float]
    ratios: list[float]
    """To the fused step of the same round."""
    extra_mb: float | None
    """How far one call makes the peak of memory rise; None where the system does not tell."""
    launches: int | None
    """Kernels on the device; None on the CPU."""


class Size(TypedDict):
    elements: int
    tensors: int
    arms: dict[str, Arm]
    after: dict[str, dict[str, list[float]]]
    """What follows, by what was before: its ratio to the same after a plain read."""


class StepPart(TypedDict):
    command: str
    machine: str
    in_between: dict[str, list[float]]
    """Microseconds that a step gets longer by."""
    sizes: dict[str, Size]


class Segments(TypedDict):
    milliseconds: list[float]
    """The median batch."""
    medians: list[float]
    totals: list[float]
    """Ratios to the segment of the same round that was not monitored."""
    measurement_ms: list[float]
    """What all batches got longer by, for each measurement; of no rounds where none was taken."""


class TrainingPart(TypedDict):
    command: str
    machine: str
    batches: int
    logger: str
    trainings: dict[str, dict[str, Segments]]


class Results(TypedDict):
    """By device."""

    step: dict[str, StepPart]
    training: dict[str, TrainingPart]


def main() -> None:
    typed = arguments()
    if typed.threads:
        torch.set_num_threads(typed.threads)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("error", message="AdamMonitor has failed")
    os.environ |= {"WANDB_SILENT": "true", "WANDB_MODE": "offline"}
    command = shlex.join(["python", "-m", "benchmarks.monitor_cost", *sys.argv[1:]])
    results = Results(step={}, training={})
    here = machine(typed.device)
    print(f"{command}\n{here}", file=sys.stderr)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ |= {"WANDB_DATA_DIR": folder, "WANDB_DIR": folder}
        if "step" in typed.part:
            results["step"][typed.device] = StepPart(
                command=command,
                machine=here,
                in_between=in_between(typed.rounds, folder),
                sizes={
                    size: measure_size(size, typed.device, typed.rounds) for size in typed.sizes
                },
            )
            # A training takes long, and may be broken off.
            keep(results, typed.save)
        if "training" in typed.part:
            logger = logger_of(typed.logger, folder)
            results["training"][typed.device] = TrainingPart(
                command=command,
                machine=here,
                batches=typed.batches,
                logger=typed.logger,
                trainings={
                    name: train(name, typed.device, typed.training_rounds, typed.batches, logger)
                    for name in typed.trainings
                },
            )
        wandb.finish()
    keep(results, typed.save)
    print(report(results))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.monitor_cost",
        description=str(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--part",
        nargs="+",
        choices=["step", "training"],
        default=["step", "training"],
        help="what is measured (default: both)",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=SHAPES,
        help="whose tensors, in the part `step`; tiny only tries the benchmark itself"
        " (default: resnet18 gpt2 small, on CUDA 1B too)",
    )
    parser.add_argument("--rounds", type=int, default=21, help="of the part `step` (default: 21)")
    parser.add_argument(
        "--trainings",
        nargs="+",
        choices=TRAININGS,
        default=["mnist", "gpt"],
        help="what is trained; tiny only tries the benchmark itself (default: mnist gpt)",
    )
    parser.add_argument(
        "--training-rounds", type=int, default=8, help="of the part `training` (default: 8)"
    )
    parser.add_argument(
        "--batches",
        type=int,
        default=50,
        help="of a segment; a multiple of 50, or `every 50` is measured too seldom (default: 50)",
    )
    parser.add_argument(
        "--logger",
        choices=["wandb", "csv"],
        default="wandb",
        help="of the trainings; wandb is offline (default: wandb)",
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="what it runs on (default: cpu)"
    )
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own choice)")
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FOLDER",
        help="keep the numbers, a picture and the tables there, as in `--save benchmarks`"
        " (default: they are only printed)",
    )
    typed = parser.parse_args()
    if min(typed.rounds, typed.training_rounds, typed.batches) < 1:
        parser.error("expected at least one round and one batch")
    if typed.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; leave it out")
    if typed.sizes is None:
        typed.sizes = ["resnet18", "gpt2", "small"] + ["1B"] * (typed.device == "cuda")
    return typed


def machine(device: str) -> str:
    """What the numbers were taken with."""
    packages = ["torch", "numba", "triton", "lightning", "wandb", "numpy"]
    versions = [f"{name} {found}" for name in packages if (found := installed(name))]
    parts = [
        *([torch.cuda.get_device_name()] if device == "cuda" else []),
        f"{processor()}, cores: {os.cpu_count()}, threads of torch: {torch.get_num_threads()}",
        *versions,
        f"Python {platform.python_version()}",
    ]
    return "; ".join(parts)


def processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def resnet18() -> list[Shape]:
    """torchvision's, in its order."""

    def convolution(channels_in: int, channels_out: int, kernel: int) -> list[Shape]:
        # A batch norm's weight and bias follow.
        return [(channels_out, channels_in, kernel, kernel), (channels_out,), (channels_out,)]

    shapes = convolution(3, 64, 7)
    for channels_in, channels in [(64, 64), (64, 128), (128, 256), (256, 512)]:
        shapes += convolution(channels_in, channels, 3) + convolution(channels, channels, 3)
        if channels_in != channels:
            shapes += convolution(channels_in, channels, 1)
        shapes += 2 * convolution(channels, channels, 3)
    return [*shapes, (1000, 512), (1000,)]


def gpt(layers: int, width: int) -> list[Shape]:
    """GPT-2's layout; its output layer is the embedding again."""
    norm: list[Shape] = [(width,), (width,)]
    attention: list[Shape] = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    feed_forward: list[Shape] = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    embeddings: list[Shape] = [(50257, width), (1024, width)]
    return embeddings + layers * [*norm, *attention, *norm, *feed_forward] + norm


SHAPES: dict[str, Callable[[], list[Shape]]] = {
    "resnet18": resnet18,
    "gpt2": lambda: gpt(12, 768),
    "small": lambda: [(1000,) if each % 2 else (20, 50) for each in range(2000)],
    "1B": lambda: gpt(32, 1536),
    "tiny": lambda: [(8, 16), (16,), (3, 5, 7), (40,)],
}


class Given(torch.autograd.Function):
    """A model that takes no time: its gradients are there before its backward pass."""

    @staticmethod
    def forward(context: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        context.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *context.gradients


class Weights(nn.Module):
    """Parameters in the memory of others, without their hooks."""

    def __init__(self, others: Iterable[Tensor]) -> None:
        super().__init__()
        others = [*others]
        self.parameters_ = nn.ParameterList([nn.Parameter(each.detach()) for each in others])
        self.gradients = [each.grad for each in others]

    def forward(self) -> Tensor:
        return Given.apply(self.gradients, *self.parameters_)  # type: ignore[no-any-return, no-untyped-call]

    def train_once(self) -> None:
        """A forward and a backward pass; `grad` calls the hooks, and adds up nothing."""
        torch.autograd.grad(self(), [*self.parameters_])
        wandb.log({})


def build(shapes: Sequence[Shape], device: str) -> tuple[Named, torch.optim.AdamW]:
    """Parameters in two groups, as AdamMixin makes them, after some steps with unlike gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape: Shape) -> Tensor:
        return torch.empty(shape, device=device).normal_(0, 0.02, generator=generator)

    named = [(f"{index}.weight", nn.Parameter(normal(shape))) for index, shape in enumerate(shapes)]
    matrices = [each for each in named if each[1].ndim > 1]
    vectors = [each for each in named if each[1].ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1, "name": "decay"},
        {"params": vectors, "weight_decay": 0.0, "name": "no_decay"},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=True)
    for _, parameter in named:
        parameter.grad = torch.empty_like(parameter)
    for _ in range(3):
        for _, parameter in named:
            assert parameter.grad is not None
            parameter.grad.normal_(0, 0.01, generator=generator)
        optimizer.step()
    return named, optimizer


def plain_read(optimizer: torch.optim.Optimizer) -> Work:
    """Reads p, g, m and v of every tensor once, and nothing else: what no measurement goes below.

    On the CPU a loop in numba adds them up in float32, in vectors, the memory shared out evenly
    over torch's number of threads. One call reads all tensors, at addresses found beforehand:
    torch's own reductions are as fast on large tensors, but with thousands of small ones most of
    their time goes into the calls. On CUDA torch's norms of a list of tensors come closest.
    """
    tensors = [tensor for four in read_tensors(optimizer) for tensor in four]
    if tensors[0].is_cuda:
        return lambda: torch._foreach_norm(tensors)
    add_up = compiled_read()
    piece = 1 << 16
    pieces = np.array(
        [
            (tensor.data_ptr() + 4 * begin, min(piece, tensor.numel() - begin))
            for tensor in tensors
            for begin in range(0, tensor.numel(), piece)
        ],
        dtype=np.int64,
    )
    threads = torch.get_num_threads()
    behind = np.cumsum(pieces[:, 1])
    shares = np.split(pieces, np.searchsorted(behind, behind[-1] * np.arange(1, threads) / threads))
    others = ThreadPoolExecutor(max(1, threads - 1))

    def read() -> float:
        waited = [others.submit(add_up, share) for share in shares[1:]]
        return float(add_up(shares[0]) + sum(each.result() for each in waited))

    return read


def compiled_read() -> Callable[[np.ndarray[Any, Any]], float]:
    """The sum of pieces of memory, given by address and number of float32."""
    numba: Any = import_module("numba")
    void_pointer = import_module("numba.core.cgutils").voidptr_t

    def pointer(_: Any, address: Any) -> Any:
        def generate(_: Any, builder: Any, __: Any, values: Any) -> Any:
            return builder.inttoptr(values[0], void_pointer)

        return numba.types.voidptr(address), generate

    as_pointer: Any = import_module("numba.extending").intrinsic(pointer)

    def add_up(pieces: Any) -> Any:
        total = np.float32(0)
        for index in range(len(pieces)):
            address, elements = pieces[index]
            for value in numba.carray(as_pointer(address), elements, np.float32):
                total += value
        return total

    # Without leave to reorder the additions they would wait for each other.
    return numba.njit(add_up, nogil=True, fastmath={"reassoc"})  # type: ignore[no-any-return]


def read_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, ...]]:
    """p, g, m and v of each parameter."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            yield parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"]


@torch.no_grad()
def composer(named: Named, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What Composer's OptimizerMonitor tells of its DecoupledAdamW at the end of a batch.

    The L2 norms of each parameter, gradient, first moment and update, of which the update is made
    anew from the state, then the norm of all gradients; one `.item()` for each number. As there,
    the hyperparameters of the first group stand for all, and the decay, which is not scaled by lr,
    has the sign that it has there.
    (mosaicml/composer: composer/callbacks/optimizer_monitor.py, report_per_parameter_metrics in
    composer/optim/decoupled_weight_decay.py)
    """
    group = optimizer.param_groups[0]
    beta1, beta2 = group["betas"]
    norms: dict[str, Tensor] = {}
    for name, parameter in named:
        state = optimizer.state[parameter]
        step = state["step"].item()
        denominator = state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2**step)
        denominator.add_(group["eps"])
        update = group["lr"] / (1 - beta1**step) * state["exp_avg"].div(denominator)
        update.add_(parameter, alpha=-group["weight_decay"])
        assert parameter.grad is not None
        of = {
            "moment": state["exp_avg"],
            "param": parameter,
            "update": update,
            "grad": parameter.grad,
        }
        for what, tensor in of.items():
            norms[f"l2_norm/{what}/{name}"] = torch.linalg.vector_norm(tensor)
    squares = [norm**2 for key, norm in norms.items() if key.startswith("l2_norm/grad/")]
    norms["l2_norm/grad/global"] = torch.stack(squares).sum().sqrt()
    return {key: norm.item() for key, norm in norms.items()}


@torch.no_grad()
def olmo(named: Named, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What OLMo's clip_grads_and_collect_metrics collects, and its trainer logs, in one process.

    The least and the greatest magnitude, the mean and the norm of each gradient, first moment,
    parameter and second moment. Each number goes to the host by itself; only the reductions over
    ranks, which one process has none of, are coalesced. (allenai/OLMo: olmo/optim.py, train.py)
    """
    numbers: dict[str, Tensor] = {}
    for name, parameter in named:
        state = optimizer.state[parameter]
        assert parameter.grad is not None
        of = {
            "grad": parameter.grad,
            "exp_avg": state["exp_avg"],
            "param": parameter,
            "exp_avg_sq": state["exp_avg_sq"],
        }
        for what, tensor in of.items():
            magnitudes = tensor.abs()
            own = {
                "min": magnitudes.min(),
                "max": magnitudes.max(),
                "avg": tensor.sum(),
                "norm": torch.linalg.vector_norm(tensor, 2.0, dtype=torch.float32),
            }
            on_host = {key: each.to("cpu", torch.float32) for key, each in own.items()}
            on_host["avg"] /= torch.tensor(tensor.numel(), dtype=torch.float32)
            numbers |= {f"{what}/{name}.{key}": each for key, each in on_host.items()}
    return {key: number.item() for key, number in numbers.items()}


@dataclass
class Timed:
    """Something to time."""

    work: Work
    without: Work | None = None
    """What is taken off: the same without what the arm is about."""


def arms_of(named: Named, optimizer: torch.optim.AdamW) -> dict[str, Timed]:
    statistics = {
        HEADLINE: AdamStatistics("headline"),
        ALL: AdamStatistics("all"),
        HISTOGRAMS: AdamStatistics("all"),
        EAGER: AdamStatistics("all", kernel="eager"),
    }

    def measure(name: str) -> Work:
        def work() -> None:
            statistics[name].update(optimizer, histograms=name == HISTOGRAMS)
            statistics[name].compute()
            if name == HISTOGRAMS:
                statistics[name].compute_exponents()

        return work

    watched, plain = (Weights(parameter for _, parameter in named) for _ in range(2))
    wandb.watch(watched, log="all", log_freq=1)
    return {
        READ: Timed(plain_read(optimizer)),
        STEP: Timed(optimizer.step),
        STEP_AGAIN: Timed(optimizer.step),
        **{name: Timed(measure(name)) for name in OURS},
        COMPOSER: Timed(lambda: composer(named, optimizer)),
        OLMO: Timed(lambda: olmo(named, optimizer)),
        WATCH: Timed(watched.train_once, plain.train_once),
    }


def seconds(work: Work, device: str) -> float:
    """What one call takes, until the device is done."""
    if device == "cuda":
        begin, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def seconds_of(arm: Timed, device: str) -> float:
    taken = seconds(arm.work, device)
    if arm.without is None:
        return taken
    # wandb's process goes on with what the hooks have handed over, on a core that the next needs.
    time.sleep(taken)
    return taken - seconds(arm.without, device)


def measure_size(size: str, device: str, rounds: int) -> Size:
    named, optimizer = build(SHAPES[size](), device)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, silence():
        wandb.init(dir=folder, project="benchmark")
        arms = arms_of(named, optimizer)
        compared = compare(size, arms, device, rounds)
        wandb.finish()
    return Size(
        elements=sum(parameter.numel() for _, parameter in named),
        tensors=len(named),
        arms=compared,
        after=following(size, arms, device, rounds),
    )


def compare(size: str, arms: Mapping[str, Timed], device: str, rounds: int) -> dict[str, Arm]:
    """Each arm once in a round, in another order each time."""
    chance = random.Random(0)
    every = {}
    for name, arm in progress(arms.items(), f"{size}: compiling, warming up"):
        # The first call compiles.
        seconds_of(arm, device)
        interval = 1 + int(seconds_of(arm, device) / LONG_S)
        every[name] = max(1, min(interval, rounds // LEAST_ROUNDS))
    taken: dict[str, list[float]] = {name: [] for name in arms}
    ratios: dict[str, list[float]] = {name: [] for name in arms}
    for number in progress(range(rounds), f"{size}: rounds"):
        order = [name for name in arms if number % every[name] == 0]
        chance.shuffle(order)
        here = {name: seconds_of(arms[name], device) for name in order}
        for name, value in here.items():
            taken[name].append(1e3 * value)
            ratios[name].append(value / here[STEP])
    gc.collect()
    return {
        name: Arm(
            milliseconds=taken[name],
            ratios=ratios[name],
            extra_mb=extra_mb(arm.work, device),
            launches=launches(arm.work) if device == "cuda" else None,
        )
        for name, arm in progress(arms.items(), f"{size}: memory")
    }


def following(
    size: str, arms: Mapping[str, Timed], device: str, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Whether a measurement makes what follows it slower than a plain read of the same memory does.

    That read leaves the caches alike; threads that a measurement has left waiting would show.
    """
    side = 16 if size == "tiny" else 1024
    inputs, weights = (torch.randn(side, side, device=device, requires_grad=True) for _ in range(2))

    def multiply() -> None:
        torch.autograd.grad((inputs @ weights).sum(), [inputs, weights])

    before = {READ: arms[READ], READ_AGAIN: arms[READ], ALL: arms[ALL]}
    after = {STEP: arms[STEP].work, MATRICES: multiply}
    chance = random.Random(0)
    ratios: dict[str, dict[str, list[float]]] = {name: {READ_AGAIN: [], ALL: []} for name in after}
    for _ in progress(range(rounds), f"{size}: the step after"):
        order = [*product(before, after)]
        chance.shuffle(order)
        here = {}
        for first, second in order:
            before[first].work()
            here[first, second] = seconds(after[second], device)
        for name, of in ratios.items():
            for first, values in of.items():
                values.append(here[first, name] / here[READ, name])
    return ratios


def extra_mb(work: Work, device: str) -> float | None:
    """How far one call makes the peak of memory rise, in 10^6 bytes."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        # Else what earlier calls have freed would be taken from there, and cost nothing.
        ctypes.CDLL(None).malloc_trim(0)
        # 5 sets the peak back to what is in use (Linux, proc_pid_clear_refs).
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_bytes()
        work()
        return (peak_bytes() - before) / 1e6
    except (OSError, AttributeError):
        return None


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def launches(work: Work) -> int:
    """How many kernels one call starts."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    return sum(each.count for each in profile.key_averages() if "LaunchKernel" in each.key)


class Still(torch.optim.AdamW):
    """Its steps change nothing: what they take is what the hooks take."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            closure()


class LitStill(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).sum()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Still(self.parameters())


@dataclass
class InBetween(L.Callback):
    """Takes many steps, with and without an AdamMonitor that is not due."""

    monitor: AdamMonitor
    rounds: int
    steps: int = 1000
    microseconds: dict[str, list[float]] = field(default_factory=dict)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, *others: Any
    ) -> None:
        # The first step is measured.
        if not trainer.fit_loop.epoch_loop.batch_idx:
            return
        (watched,) = trainer.optimizers
        bare = Still(module.parameters())

        def with_callback() -> None:
            self.monitor.on_before_optimizer_step(trainer, module, watched)
            watched.step()
            self.monitor.on_train_batch_end(trainer, module, *others)

        kinds: dict[str, Work] = {
            "without a monitor": bare.step,
            "without a monitor, again": bare.step,
            "the optimizer's hooks": watched.step,
            "and the callback's": with_callback,
        }
        for _ in progress(range(self.rounds), "in between"):
            here = {name: self._one_of(work) for name, work in kinds.items()}
            least, *rest = here
            for name in rest:
                self.microseconds.setdefault(name, []).append(here[name] - here[least])

    def _one_of(self, work: Work) -> float:
        begin = time.perf_counter()
        for _ in range(self.steps):
            work()
        return 1e6 * (time.perf_counter() - begin) / self.steps


def in_between(rounds: int, folder: str) -> dict[str, list[float]]:
    monitor = AdamMonitor(every_n_steps=10**9)
    taken = InBetween(monitor, rounds)
    with silence():
        trainer(CSVLogger(folder), [monitor, taken], steps=2, device="cpu").fit(
            LitStill(),
            DataLoader([torch.ones(4) for _ in range(2)]),  # type: ignore[arg-type]
        )
    return taken.microseconds


def fused(lr: float) -> Any:
    return OmegaConf.create({"lr": lr, "fused": True})


@dataclass
class Training:
    """What is trained: a new module for each segment, on the same data."""

    module: Callable[[], L.LightningModule]
    loader: DataLoader[Any]


def cnn(width: int) -> L.LightningModule:
    return LitClassifier(small_cnn(width), fused(2e-3), None)


def noise_loader() -> DataLoader[Any]:
    """In the place of MNIST, which takes seconds to be read."""
    images, labels = torch.rand(64, 1, 28, 28), torch.randint(10, (64,))
    return DataLoader(TensorDataset(images, labels), batch_size=8)


TRAININGS: dict[str, Callable[[], Training]] = {
    "mnist": lambda: Training(lambda: cnn(32), mnist_loaders(batch_size=64)[0]),
    "gpt": lambda: Training(lambda: LitGPT(SmallGPT(), fused(3e-4)), text_loader(batch_size=8)),
    "tiny": lambda: Training(lambda: cnn(1), noise_loader()),
}


class Clock(L.Callback):
    """Takes the time at the beginning of each batch."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *others: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def train(name: str, device: str, rounds: int, batches: int, logger: Logger) -> dict[str, Segments]:
    """Segments with and without the monitor, in turns; each begins anew, with the same weights."""
    chance, training = random.Random(0), TRAININGS[name]()
    for arm in progress(INTERVALS, f"{name}: compiling, warming up"):
        segment(training, arm, device, 2, logger)
    segments = {
        arm: Segments(milliseconds=[], medians=[], totals=[], measurement_ms=[])
        for arm in INTERVALS
    }
    for _ in progress(range(rounds), f"{name}: rounds"):
        order = [*INTERVALS]
        chance.shuffle(order)
        here = {arm: segment(training, arm, device, batches, logger) for arm in order}
        for arm, steps in here.items():
            into, bare = segments[arm], here[NONE]
            into["milliseconds"].append(1e3 * median(steps))
            into["medians"].append(median(steps) / median(bare))
            into["totals"].append(sum(steps) / sum(bare))
            interval = INTERVALS[arm]
            # The first of these batches is the second step.
            measured = 0 if interval is None else (batches + 1) // interval - 1 // interval
            if measured:
                into["measurement_ms"].append(1e3 * (sum(steps) - sum(bare)) / measured)
    return segments


def segment(training: Training, arm: str, device: str, batches: int, logger: Logger) -> list[float]:
    """Seconds of each batch, without the first, which is always measured, and the last."""
    clock, interval = Clock(), INTERVALS[arm]
    monitors = [] if interval is None else [AdamMonitor(every_n_steps=interval)]
    with silence():
        L.seed_everything(0)
        fit = trainer(logger, [clock, *monitors], batches + 2, device).fit
        fit(training.module(), training.loader)
    return [later - sooner for sooner, later in pairwise(clock.times)][1:]


def trainer(logger: Logger, callbacks: list[L.Callback], steps: int, device: str) -> L.Trainer:
    return L.Trainer(
        max_steps=steps,
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        logger=logger,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )


def logger_of(kind: str, folder: str) -> Logger:
    """One logger for all segments: to begin a run takes longer than a segment."""
    if kind == "csv":
        return CSVLogger(folder)
    return WandbLogger(project="benchmark", save_dir=folder, offline=True)


@contextmanager
def silence() -> Iterator[None]:
    """Nothing is printed but the tables and the progress."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def progress(items: Iterable[Item], what: str) -> Iterator[Item]:
    """A line on the real standard error, whatever is silenced."""
    yield from tqdm([*items], desc=what, file=sys.__stderr__, mininterval=1)


def report(results: Results) -> str:
    """All tables, in Markdown."""
    parts = []
    for step in results["step"].values():
        parts += ["### One measurement", source(step["command"], step["machine"])]
        parts += [size_table(name, size) for name, size in step["sizes"].items()]
        parts += ["### The step after", after_table(step["sizes"])]
        parts += ["### A step in between", in_between_table(step["in_between"])]
    for training in results["training"].values():
        parts += ["### A training", source(training["command"], training["machine"])]
        parts += [training_table(training)]
    return "\n\n".join(parts)


def source(command: str, where: str) -> str:
    return f"`{command}`\n\n{where}"


def size_table(name: str, size: Size) -> str:
    arms = sorted(size["arms"].items(), key=lambda item: median(item[1]["ratios"]))
    on_device = any(arm["launches"] is not None for _, arm in arms)
    head = ["", "ratio to the fused step", "10th to 90th percentile", "ms", "extra MB", "rounds"]
    rows = [
        [
            arm_name,
            f"{median(arm['ratios']):.2f}",
            spread(arm["ratios"]) if arm_name != STEP else "",
            f"{median(arm['milliseconds']):.4g}",
            "not known" if arm["extra_mb"] is None else f"{arm['extra_mb']:.1f}",
            str(len(arm["ratios"])),
            *([str(arm["launches"])] if on_device else []),
        ]
        for arm_name, arm in arms
    ]
    return f"**{title(name, size)}**\n\n" + table(
        [*head, *(["kernel launches"] if on_device else [])], rows
    )


def after_table(sizes: Mapping[str, Size]) -> str:
    names = {READ_AGAIN: "another plain read", ALL: "a measurement of `all`"}
    rows = [
        [size, what, names[before], f"{median(ratios):.3f}", spread(ratios, 3)]
        for size, of in sizes.items()
        for what, befores in of["after"].items()
        for before, ratios in befores.items()
    ]
    head = ["", "what follows", "after", "ratio to that after a plain read"]
    return table([*head, "10th to 90th percentile"], rows)


def in_between_table(in_between: Mapping[str, list[float]]) -> str:
    rows = [[name, f"{median(values):.2f}", spread(values)] for name, values in in_between.items()]
    return (
        "Microseconds that a step takes longer with an AdamMonitor that is not due; the target is"
        f" {TARGET_US:g}.\n\n" + table(["", "µs", "10th to 90th percentile"], rows)
    )


def training_table(part: TrainingPart) -> str:
    rows = [
        [
            f"{name}: {arm}",
            f"{median(own['milliseconds']):.2f}",
            f"{median(own['totals']):.3f}",
            spread(own["totals"], 3) if arm != NONE else "",
            f"{median(own['medians']):.3f}",
            spread(own["medians"], 3) if arm != NONE else "",
            f"{median(own['measurement_ms']):.2f}" if own["measurement_ms"] else "",
        ]
        for name, arms in part["trainings"].items()
        for arm, own in arms.items()
    ]
    head = ["", "median batch, ms", "all batches", "10th to 90th percentile", "median batch"]
    head += ["10th to 90th percentile", "ms for a measurement"]
    rounds = {len(own["totals"]) for arms in part["trainings"].values() for own in arms.values()}
    return (
        f"Ratios to the segment without a monitor of the same round; {max(rounds)} rounds of"
        f" {part['batches']} batches, logged to {part['logger']}.\n\n" + table(head, rows)
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The 10th and the 90th."""
    if len(values) == 1:
        return values[0], values[0]
    first, *_, last = quantiles(values, n=10, method="inclusive")
    return first, last


def spread(values: Sequence[float], digits: int = 2) -> str:
    low, high = percentiles(values)
    return f"{low:.{digits}f} to {high:.{digits}f}"


def keep(results: Results, folder: Path | None) -> None:
    """Keeps the numbers beside what is there, and renders all of them anew; None: nowhere."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "monitor_cost.json"
    if kept.exists():
        earlier = json.loads(kept.read_text())
        results = Results(
            step={**earlier["step"], **results["step"]},
            training={**earlier["training"], **results["training"]},
        )
    kept.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    for device, part in results["step"].items():
        suffix = "" if device == "cpu" else f"_{device}"
        draw(part["sizes"], folder / f"monitor_cost{suffix}.png")
    readme = folder / "README.md"
    text = readme.read_text() if readme.exists() else ""
    if BEGIN in text and END in text:
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        readme.write_text(f"{before}{BEGIN}\n\n{report(results)}\n\n{END}{after}")


def draw(sizes: Mapping[str, Size], path: Path) -> None:
    """A panel for each size, with a bar for each arm."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    arms = {
        name: {key: arm["ratios"] for key, arm in size["arms"].items() if key not in STEPS}
        for name, size in sizes.items()
    }
    heights = [0.27 * len(each) + 0.3 for each in arms.values()]
    figure = Figure(figsize=(9, sum(heights) + 0.55 * len(arms) + 0.4), layout="constrained")
    axes = figure.subplots(len(arms), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (name, ratios) in zip(axes, arms.items(), strict=True):
        order = sorted(ratios, key=lambda key: median(ratios[key]), reverse=True)
        middles = [median(ratios[key]) for key in order]
        lows, highs = zip(*(percentiles(ratios[key]) for key in order), strict=True)
        panel.barh(order, middles, color=[color(key) for key in order], height=0.72)
        panel.hlines(order, lows, highs, color="#222222", linewidth=1.1)
        for key, middle, high in zip(order, middles, highs, strict=True):
            panel.annotate(
                f"{middle:.2f}" if middle < 10 else f"{middle:.0f}",
                (max(middle, high), key),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                bbox={"color": "white", "pad": 0.6},
            )
        is_one = panel.axvline(1, color="#222222", linewidth=1.2)
        is_target = panel.axvline(TARGET, color="#c03030", linewidth=1, linestyle=":", alpha=0.7)
        panel.set_title(title(name, sizes[name]), loc="left", fontsize=10)
        panel.set_xscale("log")
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
        panel.tick_params(axis="x", labelbottom=True)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
    reached = [
        value for each in arms.values() for own in each.values() for value in percentiles(own)
    ]
    # A bar on a logarithmic axis begins somewhere: left of the shortest, with room for numbers.
    axes[-1].set_xlim(min(1.0, *reached) / 1.6, max(TARGET, *reached) * 1.6)
    axes[0].legend(
        [*(Patch(color=color(key)) for key in (ALL, COMPOSER, READ)), is_one, is_target],
        ["lightning_adam", "others", "plain read", "fused step = 1", f"target {TARGET:g}"],
        loc="upper right",
        fontsize=8.5,
        framealpha=1,
    )
    axes[-1].set_xlabel(
        "time of one measurement / time of torch's fused AdamW step"
        " (median; 10th to 90th percentile)",
        fontsize=9,
    )
    figure.savefig(path, dpi=140)


def color(arm: str) -> str:
    if arm in OURS:
        return "#1f6fb4"
    return "#d4d4d4" if arm == READ else "#949494"


def title(name: str, size: Size) -> str:
    step = median(size["arms"][STEP]["milliseconds"])
    return (
        f"{name}: {size['elements'] / 1e6:,.4g} million elements in {size['tensors']:,} tensors,"
        f" fused step {step:.3g} ms"
    )


if __name__ == "__main__":
    main()
