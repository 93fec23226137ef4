"""Tuning in stages, random search and TPE over all dimensions at once, for the same trainings.

python -m benchmarks.tuning
python -m benchmarks.tuning --apps mnist --seeds 0 --save benchmarks

Two apps, two settings to start from, three seeds of the search. What a search chooses is trained
anew with seeds that no search has seen: their mean validation loss is its result. Trainings are
kept in a file, so the same command goes on where it was cut.
"""

import argparse
import json
import logging
import math
import os
import platform
import statistics
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning as L
import optuna
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from tqdm import tqdm

from benchmarks.small_gpt import LitGPT, SmallGPT, text_pieces
from lightning_adam.config.tune import Direction, TuneConfig
from lightning_adam.tune.archive import Archive
from lightning_adam.tune.dimensions import DIMENSIONS
from lightning_adam.tune.plan import Plan, read_plan
from lightning_adam.tune.point import Point
from lightning_adam.tune.search import Search
from recipes.mnist import LitClassifier, mnist_loaders, small_cnn

DEFAULT = Point(
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.01,
    decoupled_weight_decay=True,
    amsgrad=False,
    warmup_ratio=0.0,
)
STARTS = {
    "default": DEFAULT,
    "bad": DEFAULT.with_values(lr=1e-5, betas=(0.99, 0.999), weight_decay=0.5),
}
PLAN = Path(__file__).parents[1] / "conf/lightning_adam/tune/default.yaml"
FRESH_SEEDS = (1000, 1001, 1002)
"""What is chosen is judged with these, which no search has."""

Training = Callable[[Point, int], float]
"""The validation loss of a point and a seed."""


Loaders = tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]


@cache
def _images() -> Loaders:
    """They are read from a text file, which takes longer than a training."""
    return mnist_loaders(128)


@cache
def _text(training: int = 4800, validation: int = 128) -> tuple[TensorDataset, TensorDataset]:
    """The sources of the standard library; the last of the pieces that are used validate."""
    pieces = text_pieces()[: training + validation]
    return TensorDataset(pieces[:-validation]), TensorDataset(pieces[-validation:])


def mnist(configs: dict[str, Any]) -> tuple[L.LightningModule, Loaders]:
    """The recipe's CNN, a quarter as wide."""
    return LitClassifier(small_cnn(8), **configs), _images()


def gpt(configs: dict[str, Any]) -> tuple[L.LightningModule, Loaders]:
    """140,000 parameters on bytes."""
    training, validation = _text()
    drawn = RandomSampler(training, num_samples=8 * APPS["gpt"][1])
    loaders = DataLoader(training, 8, sampler=drawn), DataLoader(validation, 64)
    return LitGPT(SmallGPT(layers=2, width=64, heads=2), **configs), loaders


App = Callable[[dict[str, Any]], tuple[L.LightningModule, Loaders]]
APPS: dict[str, tuple[App, int]] = {"mnist": (mnist, 124), "gpt": (gpt, 150)}
"""What is trained, and for how many steps."""


def train(app: str, point: Point, seed: int) -> float:
    """The validation loss at the end; not finite where training diverged."""
    build, steps = APPS[app]
    torch.set_num_threads(1)
    L.seed_everything(seed, verbose=False)
    settings = asdict(point)
    scheduler = {"name": "cosine"}
    scheduler |= {name: settings.pop(name) for name in ("warmup_steps", "warmup_ratio")}
    module, (training, validation) = build({"optimizer": settings, "scheduler": scheduler})
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(module, training)
    judge = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    return float(judge.validate(module, validation, verbose=False)[0]["val/loss"])


class Kept:
    """Trainings by what they depend on, in a file to which several processes add lines.

    Args:
        file: Where.
        app: Whose trainings.
        training: What is done where none is kept.
    """

    def __init__(self, file: Path, app: str, training: Training) -> None:
        self.file, self.app, self.training = file, app, training
        self.known: dict[str, float] = {}

    def __call__(self, point: Point, seed: int) -> float:
        key = json.dumps([self.app, APPS[self.app][1], asdict(point), seed])
        if key not in self.known:
            self.known |= dict(self._read())
        if key not in self.known:
            self.known[key] = self.training(point, seed)
            line = json.dumps({"training": key, "loss": self.known[key]})
            # One write of a file opened for appending is not mixed with another's.
            handle = os.open(self.file, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.write(handle, f"{line}\n".encode())
            os.close(handle)
        return self.known[key]

    def _read(self) -> Iterator[tuple[str, float]]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                # It was cut.
                continue
            yield row["training"], row["loss"]


@dataclass(frozen=True)
class Task:
    """One search.

    Attributes:
        app: What is trained.
        start: Where it begins.
        method: How it searches.
        seed: Of the search; its trainings have 10 times that, and the numbers after it.
    """

    app: str
    start: str
    method: str
    seed: int


def staged(plan: Plan, start: Point, seed: int, training: Training) -> list[tuple[Point, float]]:
    """The package's search: the incumbent and its mean after each training."""
    seeds = [10 * seed + turn for turn in range(plan.n_seeds)]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        archive = Archive(f"journal:{folder}/journal", "staged", plan.direction)
        search = Search(plan, start, archive, seeds)
        while batch := search.next_batch():
            for begun in batch:
                assert begun.seed is not None
                archive.finish(begun.stage, begun.number, training(begun.point, begun.seed))
            way, _ = search.look()
            after = way.stages[-1].step.after
            found.append((after.point, after.mean))
    return found


def jointly(
    plan: Plan, start: Point, seed: int, training: Training, sampler: optuna.samplers.BaseSampler
) -> list[tuple[Point, float]]:
    """All dimensions of all stages at once: the best so far after each training.

    What diverges is told as the worst that was seen.
    """
    every = read_plan({**_config(plan.n_trials, plan.n_seeds, seed, PLAN), "n_trials": 1000})
    spaces = [stage.space for stage in every.stages]
    # Of what two stages search the first one's range, which is the wider.
    space = {
        name: next(each[name] for each in spaces if name in each)
        for name in DIMENSIONS
        if any(name in each for each in spaces)
    }
    distributions = {
        DIMENSIONS[name].coordinate: DIMENSIONS[name].distribution(choices)
        for name, choices in space.items()
    }
    study = optuna.create_study(sampler=sampler)
    best, best_loss, worst = start, training(start, 10 * seed), -math.inf
    found = [(best, best_loss)]
    while len(found) < plan.n_trials:
        trial = study.ask(distributions)
        point = start
        for name, choices in space.items():
            dimension = DIMENSIONS[name]
            point = dimension.sampled(point, trial.params[dimension.coordinate], choices)
        loss = training(point, 10 * seed)
        worst = max(worst, loss) if math.isfinite(loss) else worst
        study.tell(trial, loss if math.isfinite(loss) else max(worst, 10.0))
        if math.isfinite(loss) and not loss >= best_loss:
            best, best_loss = point, loss
        found.append((best, best_loss))
    return found


def search(task: Task, plan_file: Path, n_trials: int, n_seeds: int, cache_file: Path) -> Any:
    """Runs a search, and judges what it chose."""
    training = Kept(cache_file, task.app, lambda point, seed: train(task.app, point, seed))
    plan = read_plan(_config(n_trials, n_seeds, task.seed, plan_file))
    start = STARTS[task.start]
    if task.method == "staged":
        found = staged(plan, start, task.seed, training)
    else:
        samplers: dict[str, optuna.samplers.BaseSampler] = {
            "random": optuna.samplers.RandomSampler(task.seed),
            "tpe": optuna.samplers.TPESampler(seed=task.seed, multivariate=True),
        }
        found = jointly(plan, start, task.seed, training, samplers[task.method])
    point = found[-1][0]
    fresh = [training(point, seed) for seed in FRESH_SEEDS]
    return {
        **asdict(task),
        "point": asdict(point),
        "trainings": len(found),
        "loss": statistics.fmean(fresh),
        "start_loss": statistics.fmean(training(start, seed) for seed in FRESH_SEEDS),
        "best_so_far": [value for _, value in found],
    }


def _config(n_trials: int, n_seeds: int, seed: int, plan_file: Path) -> dict[str, Any]:
    config = TuneConfig(
        direction=Direction.minimize,
        n_trials=n_trials,
        n_seeds=n_seeds,
        sampler_seed=100 * seed,
        study_name="staged",
    )
    return {**vars(config), "stages": OmegaConf.to_container(OmegaConf.load(plan_file))}


def _quietly() -> None:
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_adam"):
        logging.getLogger(name).setLevel(logging.ERROR)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Validation loss with fresh seeds, mean and deviation over the seeds of the search."""
    methods = list(dict.fromkeys(each["method"] for each in results))
    losses: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    starts: dict[tuple[str, str], float] = {}
    for each in results:
        losses[each["app"], each["start"]][each["method"]].append(each["loss"])
        starts[each["app"], each["start"]] = each["start_loss"]
    rows = [["app", "start", "as it is", *methods, "least"], ["---"] * (len(methods) + 4)]
    for (app, start), by_method in losses.items():
        told = []
        for method in methods:
            values = by_method[method]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            told.append(f"{statistics.fmean(values):.4f} ± {deviation:.4f}")
        least = min(methods, key=lambda method: statistics.fmean(by_method[method]))
        rows.append([app, start, f"{starts[app, start]:.4f}", *told, least])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--apps", nargs="+", default=list(APPS), choices=list(APPS))
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=list(STARTS))
    methods = ["staged", "random", "tpe"]
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the searches")
    parser.add_argument("--trials", type=int, default=20, help="trainings of a search")
    parser.add_argument("--n-seeds", type=int, default=2, help="that a staged search confirms with")
    parser.add_argument("--plan", type=Path, default=PLAN, help="the stages, a YAML file")
    parser.add_argument("--cache", type=Path, default=Path("outputs/tuning/trainings.jsonl"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", type=Path, help="a folder for tuning.json")
    given = parser.parse_args()
    given.cache.parent.mkdir(parents=True, exist_ok=True)
    tasks = [
        Task(app, start, method, seed)
        for app in given.apps
        for seed in given.seeds
        for method in given.methods
        for start in given.starts
    ]
    order = {task: place for place, task in enumerate(tasks)}
    results = {}
    context = get_context("spawn")
    with ProcessPoolExecutor(given.workers, mp_context=context, initializer=_quietly) as pool:
        futures = {
            pool.submit(search, task, given.plan, given.trials, given.n_seeds, given.cache): task
            for task in tasks
        }
        for future in tqdm(as_completed(futures), total=len(futures), unit="search"):
            results[futures[future]] = future.result()
    found = [results[task] for task in sorted(results, key=order.__getitem__)]
    print(table(found))
    for each in found:
        print(each["app"], each["start"], each["method"], each["seed"], each["point"])
    if given.save:
        machine = {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        }
        settings = {"trials": given.trials, "n_seeds": given.n_seeds, "machine": machine}
        text = json.dumps({**settings, "results": found}, indent=1)
        (given.save / "tuning.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
