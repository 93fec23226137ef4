"""Each of Hydra's launchers runs the same search, and failed trials do not end it."""

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_adam.tune.archive import Archive, Record
from lightning_adam.tune.story import Outcome
from tests.support.commands import Finished, environment, run, write_files

APP = """
import math, os, signal, time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    folder = Path(HydraConfig.get().runtime.output_dir)
    fault = cfg.faults.get(str(cfg.optimizer.lr))
    if fault == "raises":
        raise ValueError("no such data")
    if fault == "diverges":
        return math.nan
    if cfg.meet == folder.parent.name:
        # Two trials of the stage get past here only if they run at the same time.
        (folder / "has_begun").touch()
        until = time.monotonic() + 120
        while len(list(folder.parent.glob("*/has_begun"))) < 2:
            assert time.monotonic() < until, "the other trial of the batch does not begin"
            time.sleep(0.05)
    if fault == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "outlives it":
        time.sleep(2)
    betas = cfg.optimizer.betas
    return (math.log10(cfg.optimizer.lr) + 2.3) ** 2 + (betas[0] - 0.8) ** 2 + cfg.seed / 100

if __name__ == "__main__":
    main()
"""
CONFIG = """
defaults:
  - lightning_adam/optimizer: adamw
  - _self_
seed: 1
meet: nowhere
faults: {'1.0': raises, '2.0': diverges, '3.0': is killed, '0.002': outlives it}
"""
TUNE = ["python", "train.py", "-m", "hydra/sweeper=adam_tune", "hydra.sweeper.direction=minimize"]
# Two at a time through every launcher: what is proposed depends on the trials that have ended.
TUNE += ["hydra.sweeper.n_jobs=2"]
N_TRIALS = "hydra.sweeper.n_trials=8"
BEST = 0.005
RAISES, DIVERGES, KILLED = 1.0, 2.0, 3.0


LAUNCHERS = [
    pytest.param([], id="basic", marks=pytest.mark.slow),
    pytest.param(["hydra/launcher=joblib"], id="joblib", marks=pytest.mark.slow),
    pytest.param(["hydra/launcher=submitit_local"], id="submitit", marks=pytest.mark.slow),
    pytest.param(
        [
            "hydra/launcher=ray",
            "+hydra.launcher.ray.init.num_cpus=2",
            "+hydra.launcher.ray.init.include_dashboard=false",
            # Ray would restart a killed trial three times; the search restarts it once.
            "+hydra.launcher.ray.remote.max_retries=0",
        ],
        id="ray",
        marks=[
            pytest.mark.nightly,
            pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray"),
        ],
    ),
]


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder for the sockets of Ray, whose paths must be short."""
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def write_app(folder: Path, learning_rates: list[float]) -> Path:
    stage = f"lr: {{space: {{lr: {learning_rates}}}}}\n"
    files = {"train.py": APP, "conf/config.yaml": CONFIG}
    write_files(folder, {**files, "conf/lightning_adam/tune/faults.yaml": stage})
    return folder


def tune(folder: Path, words: list[str], short_folder: Path) -> Finished:
    variables = environment(
        RAY_TMPDIR=str(short_folder),
        # Without it Ray writes one into the home folder.
        RAY_AUTH_TOKEN=64 * "0",
        RAY_USAGE_STATS_ENABLED="0",
    )
    # At its end a forked process would wait for the workers of joblib before it stops them.
    is_parallel = any(word.startswith("hydra/launcher=") for word in words)
    return run([*TUNE, *words], folder, variables, cold=is_parallel)


def records(folder: Path) -> list[Record]:
    journal = folder / "multirun/adam_tune_train/trials.journal"
    archive = Archive(f"journal:{journal}", "train", "minimize")
    return [each for stage in ("start", "lr") for each in archive.records(stage)]


@pytest.mark.slow
def test_parallel_launcher_runs_the_same_search(tmp_path: Path) -> None:
    """submitit and Ray run theirs in test_cluster.py."""
    found, lines = [], []
    for name, words in {"basic": [], "joblib": ["meet=start", "hydra/launcher=joblib"]}.items():
        folder = write_app(tmp_path / name, [])
        tuned = tune(folder, [N_TRIALS, *words], tmp_path)
        assert tuned.returncode == 0, tuned.output
        found.append(
            [
                (each.trial.stage, each.trial.point, each.turn, each.trial.value)
                for each in records(folder)
            ]
        )
        lines.append(tuned.after("type: "))
    assert len(found[0]) == 8
    assert found[1] == found[0]
    assert lines[1] == f"meet=start {lines[0]}"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_failed_trials_are_reported_and_the_search_continues(
    launcher: list[str], tmp_path: Path, short_folder: Path
) -> None:
    # With the basic launcher a kill would end the search.
    killed = [KILLED] if launcher else []
    # Two at once: one raises beside one that diverges, one is killed beside one that is good.
    folder = write_app(tmp_path, [RAISES, DIVERGES, *killed, 0.002, BEST])
    words = ["lightning_adam/tune@hydra.sweeper.stages=faults", "hydra.sweeper.n_seeds=1"]
    words += ["meet=lr", *launcher] if launcher else []
    tuned = tune(folder, words, short_folder)
    assert tuned.returncode == 0, tuned.output
    assert tuned.after("type: ").endswith(f"optimizer.lr={BEST}")
    over = [each for each in records(folder) if not each.is_lost]
    reasons = {each.trial.point.lr: each.trial.error for each in over}
    failed = {
        RAISES: "ValueError: no such data",
        DIVERGES: "diverged: the metric is nan",
        **dict.fromkeys(killed, "its process was killed"),
    }
    assert reasons == {0.001: "", **failed, 0.002: "", BEST: ""}
    assert len(over) == len(reasons), "a trial that had ended was run again"
    outcomes = {each.trial.point.lr: each.trial.outcome for each in over}
    assert {lr for lr, outcome in outcomes.items() if outcome is Outcome.failed} == set(failed)
    # A killed trial is run once more, alone, because another may have been the cause.
    assert [each.attempt for each in over if each.trial.point.lr in killed] == [2 for _ in killed]
