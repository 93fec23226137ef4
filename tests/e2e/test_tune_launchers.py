"""Each of Hydra's launchers runs the same search, also where runs fail or are killed."""

import importlib.util
import tempfile
from pathlib import Path

import pytest

from lightning_adam.tune.runs import Outcome
from tests.support.commands import environment, run, write_files
from tests.support.tuning_app import CONFIG, MINIMIZE, TUNE, runs

APP = """
import math, os, signal, time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    folder = Path(HydraConfig.get().runtime.output_dir)
    lr, beta1 = cfg.optimizer.lr, cfg.optimizer.betas[0]
    if cfg.is_parallel and folder.parent.name == "ladder":
        # Two runs of the ladder get past here only if they run at the same time.
        (folder / "has_begun").touch()
        until = time.monotonic() + 120
        while len(list(folder.parent.glob("*/has_begun"))) < 2:
            assert time.monotonic() < until, "the other run of the batch does not begin"
            time.sleep(0.05)
        was_killed = folder.parent / "was_killed"
        if lr == 0.0001 or (lr == 0.01 and not was_killed.exists()):
            was_killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        # It outlives the one that is killed beside it.
        time.sleep(1)
    if lr == 0.0001:
        raise ValueError("no such data")
    return (math.log10(lr) + 2.3) ** 2 + (beta1 - 0.8) ** 2 + cfg.seed / 100

if __name__ == "__main__":
    main()
"""
LAUNCHERS = [
    pytest.param(["joblib"], id="joblib", marks=pytest.mark.slow),
    pytest.param(["submitit_local"], id="submitit", marks=pytest.mark.slow),
    pytest.param(
        [
            "ray",
            "+hydra.launcher.ray.init.num_cpus=2",
            "+hydra.launcher.ray.init.include_dashboard=false",
            # Ray would restart a killed run three times; the search restarts it once.
            "+hydra.launcher.ray.remote.max_retries=0",
        ],
        id="ray",
        marks=[
            pytest.mark.nightly,
            pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray"),
        ],
    ),
]


Results = dict[object, tuple[Outcome, float | None]]
"""How each run of a search ended, and its metric."""


def tune(folder: Path, *words: str) -> tuple[Results, str]:
    """The results of a search and its last line."""
    write_files(folder, {"train.py": APP, "conf/config.yaml": CONFIG.format(package="")})
    words = ("hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=7", *words)
    words = (*words, "optimizer.lr=0.0003", "+is_parallel=" + str(len(words) > 2).lower())
    # The paths of Ray's sockets must be short, and its token would be left in the home folder.
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as short:
        variables = environment(
            RAY_TMPDIR=short, RAY_AUTH_TOKEN=64 * "0", RAY_USAGE_STATS_ENABLED="0"
        )
        # At its end a forked process would wait for the workers of joblib before it stops them.
        tuned = run([*TUNE, MINIMIZE, *words], folder, variables, cold=True)
    assert tuned.returncode == 0, tuned.output
    over = [each for each in runs(folder) if not each.is_retried]
    failed = [each.request.configuration.lr for each in over if each.outcome is Outcome.failed]
    assert failed == [0.0001]
    return {each.request.key: (each.outcome, each.value) for each in over}, tuned.after(
        "overrides: "
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, str]:
    """The search of the basic launcher, one run after the other."""
    return tune(tmp_path_factory.mktemp("basic"))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_parallel_launcher_runs_the_same_search_and_killed_runs_again(
    launcher: list[str], expected: tuple[Results, str], tmp_path: Path
) -> None:
    found, line = tune(tmp_path, f"hydra/launcher={launcher[0]}", *launcher[1:])
    assert found == expected[0]
    assert line == expected[1].replace("false", "true")
    # Joblib also ends the run beside one that is killed.
    killed = [each.request for each in runs(tmp_path) if each.is_lost]
    attempts = {(each.configuration.lr, each.attempt) for each in killed}
    assert attempts >= {(0.01, 1), (0.0001, 1), (0.0001, 2)}
    assert (0.01, 2) not in attempts
