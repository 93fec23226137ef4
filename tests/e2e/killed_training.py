"""A training run in its own process that is killed at a moment, or resumes after one."""

import json
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from fsspec.implementations.local import LocalFileOpener  # type: ignore[import-untyped]
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_adam import AdamMonitor
from tests.support.training import ADAMW, Lit, loss_of, trainer

Batch = tuple[Tensor, Tensor]

COSINE = {"name": "cosine", "warmup_steps": 5}
EPOCHS = 3
BATCHES = 13
VALIDATION_BATCHES = 2
MEASURED_EVERY = 3
"""Optimizer steps."""
SAVED_EVERY = 4
"""Optimizer steps: never the last of an epoch, after which a resumed Lightning skips the validation
and miscounts the epochs."""

PLACES = (
    "before a step",
    "in a step",
    "after a batch",
    "in validation",
    "before a checkpoint",
    "in the middle of a checkpoint's file",
    "before a checkpoint's file is moved",
    "in the middle of moving it to another disk",
    "after a checkpoint",
)


@dataclass(frozen=True)
class Kind:
    """What is trained, and when checkpoints are written."""

    optimizer: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    is_resumable: bool = False
    """Whether the loader can go on in the middle of an epoch."""
    is_half: bool = False
    """Whether it is fp16 with a GradScaler, and some batches' losses are infinite."""


AT_STEPS = {"every_n_train_steps": SAVED_EVERY}
ACCUMULATING = {"accumulate_grad_batches": 2}
KINDS = {
    "epochs": Kind(checkpoint={"save_last": True}),
    "steps": Kind(checkpoint=AT_STEPS, flags=ACCUMULATING, is_resumable=True),
    "fp16, fused": Kind({"fused": True}, AT_STEPS, ACCUMULATING, is_resumable=True, is_half=True),
    "fp16": Kind({"fused": False}, {"save_last": True}, {"gradient_clip_val": 0.5}, is_half=True),
}


class Moment(NamedTuple):
    """A place of `PLACES`, and which time that the run comes there."""

    place: str
    occurrence: int


class Moments:
    """Counts how often a run comes to each place, and kills it at a given moment."""

    def __init__(self, last: Moment | None) -> None:
        self.last = last
        self.counts: Counter[str] = Counter()

    def reach(self, place: str) -> None:
        self.counts[place] += 1
        if self.last == (place, self.counts[place]):
            os.kill(os.getpid(), signal.SIGKILL)

    def watch_files(self) -> None:
        """Reaches the places in which Lightning writes a checkpoint, first into another file."""
        write, commit = LocalFileOpener.write, LocalFileOpener.commit

        def written_in_halves(file: Any, data: bytes) -> None:
            write(file, data[: len(data) // 2])
            file.flush()
            self.reach("in the middle of a checkpoint's file")
            write(file, data[len(data) // 2 :])

        def moved(file: Any) -> None:
            self.reach("before a checkpoint's file is moved")
            place = "in the middle of moving it to another disk"
            if self.last == (place, self.counts[place] + 1):
                data = Path(file.temp).read_bytes()
                Path(file.path).write_bytes(data[: len(data) // 2])
            self.reach(place)
            commit(file)

        LocalFileOpener.write, LocalFileOpener.commit = written_in_halves, moved


class LinesLogger(Logger):
    """Writes each row to a file as soon as it is logged."""

    def __init__(self, path: Path, moments: Moments) -> None:
        super().__init__()
        self.path, self.moments = path, moments

    @property
    def name(self) -> str:
        return "lines"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.write([step, dict(metrics)])

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.moments.reach("after a checkpoint")

    def write(self, line: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class ReachPlaces(L.Callback):
    """Reaches the places in hooks and in the optimizer's step."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        reach = self.moments.reach
        trainer.optimizers[0].register_step_post_hook(lambda *_: reach("in a step"))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        self.moments.reach("before a step")

    def on_train_batch_end(self, *arguments: Any, **keywords: Any) -> None:
        self.moments.reach("after a batch")

    def on_validation_batch_end(self, *arguments: Any, **keywords: Any) -> None:
        self.moments.reach("in validation")

    def on_save_checkpoint(self, *arguments: Any, **keywords: Any) -> None:
        self.moments.reach("before a checkpoint")


class SaveOnce(ModelCheckpoint):
    """Does not write the checkpoint again that the run was resumed from.

    Lightning's own does so at the next batch, in the middle of an accumulation whose gradients are
    then lost when the run is resumed from there.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step


class Validated(Lit):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", loss_of(self.net, batch))


def batch_of(number: int, has_infinities: bool = False) -> Batch:
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
    targets = inputs[:, :1].sin()
    return inputs, targets * float("inf") if has_infinities and number % 7 == 4 else targets


class Resumable:
    """A loader with state: batches are a function of their number, and it keeps the next one."""

    def __init__(self, has_infinities: bool) -> None:
        self.next, self.has_infinities = 0, has_infinities

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.next += 1
            yield batch_of(self.next - 1, self.has_infinities)
            if self.next % BATCHES == 0:
                return

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.next = state_dict["next"]


def loaders(kind: Kind) -> tuple[Any, Any]:
    batches: Any = [batch_of(number, kind.is_half) for number in range(BATCHES)]
    validation: Any = [batch_of(1000 + number) for number in range(VALIDATION_BATCHES)]
    training = (
        Resumable(kind.is_half) if kind.is_resumable else DataLoader(batches, batch_size=None)
    )
    return training, DataLoader(validation, batch_size=None)


def last_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """The checkpoint to resume from, and its optimizer steps."""
    last, last_steps = None, 0
    for path in folder.glob("*.ckpt"):
        try:
            steps = torch.load(path, weights_only=True)["global_step"]
        except (EOFError, OSError, RuntimeError):
            continue
        if steps > last_steps:
            last, last_steps = path, steps
    return last, last_steps


def train(name: str, folder: Path, last: Moment | None) -> None:
    """Trains from the last checkpoint of a folder to the end, or to the moment of its kill."""
    with (folder / "output.txt").open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    tempfile.tempdir = str(folder)
    kind, moments = KINDS[name], Moments(last)
    moments.watch_files()
    checkpoint, steps = last_checkpoint(folder)
    logger = LinesLogger(folder / f"{len([*folder.glob('*.rows')])}.rows", moments)
    logger.write(steps)
    monitor = AdamMonitor(MEASURED_EVERY, ["model", "group", "layer"], ["all"])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=4)
    fit = trainer(
        max_epochs=EPOCHS,
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=True,
        callbacks=[ReachPlaces(moments), monitor, SaveOnce(folder, **kind.checkpoint)],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)] if kind.is_half else [],
        **kind.flags,
    )
    module = Validated({**ADAMW, **kind.optimizer}, COSINE)
    fit.fit(module, *loaders(kind), ckpt_path=checkpoint)
    state = {
        "module": module.state_dict(),
        "optimizer": fit.optimizers[0].state_dict(),
        "schedule": fit.lr_scheduler_configs[0].scheduler.state_dict(),
        "scaler": scaler.state_dict(),
        "monitor": monitor.state_dict(),
        "progress": [fit.global_step, fit.current_epoch],
    }
    texts = {part: json.dumps(content, default=as_list) for part, content in state.items()}
    (folder / "counts.json").write_text(json.dumps(moments.counts), encoding="utf-8")
    (folder / "state.json").write_text(json.dumps(texts), encoding="utf-8")


def as_list(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype), tensor.tolist()]
