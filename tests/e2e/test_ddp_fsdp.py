"""The recipe on many processes, whole and sharded, by each way to start them."""

import functools
import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.support.commands import (
    REPOSITORY,
    Finished,
    environment,
    logged_rows,
    offline_runs,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BRIEFLY = (
    "layers=1",
    "width=32",
    "heads=2",
    "batch_size=4",
    "trainer.limit_train_batches=6",
    "trainer.limit_val_batches=1",
    "scheduler.warmup_steps=0",
    "optimizer.eps=1e-6",
    "adam_monitor.every_n_steps=3",
    "adam_monitor.histograms_every_n_steps=3",
)
LIGHTNING = "python -m recipes.ddp_fsdp"
TORCHRUN = "torchrun --nproc-per-node 2 -m recipes.ddp_fsdp"
TORCHRUN_FILE = "recipes/ddp_fsdp_torchrun.sh"
SLURM_FILE = "bash recipes/ddp_fsdp.slurm"

SRUN = """#!/usr/bin/env bash
# What SLURM's srun does on one node, as far as Lightning looks at it.
processes=()
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 SLURM_STEP_ID=0 "$@" &
  processes+=($!)
done
for process in "${processes[@]}"; do wait "$process"; done
"""
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "ddp_fsdp",
    "SLURM_NNODES": "1",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NODELIST": "localhost",
}
"""What SLURM says to a job of two processes."""
SECONDS = 240
"""More than any of these trainings takes: it hangs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "bin").mkdir()
    (folder / "bin" / "srun").write_text(SRUN, encoding="utf-8")
    (folder / "bin" / "srun").chmod(0o755)
    return folder


@functools.cache
def trained(folder: Path, launcher: str, *overrides: str) -> Path:
    """The only W&B run of a training that is started so."""
    jobs = folder / str(len(list(folder.iterdir())))
    variables = environment()
    if launcher == SLURM_FILE:
        variables |= SLURM | {"PATH": f"{folder}/bin{os.pathsep}{variables['PATH']}"}
        # It asks for GPUs.
        overrides = (*overrides, "trainer.accelerator=cpu")
    where = f"hydra.run.dir={jobs}/${{started:}}"
    finished = run_in_time([*shlex.split(launcher), *BRIEFLY, *overrides, where], variables)
    assert finished.returncode == 0, finished.output
    assert "AdamMonitor has failed" not in finished.output
    assert finished.output.count("bits a byte") == 1
    assert len(list(jobs.rglob(".hydra"))) == 1, "all processes have one folder"
    (report,) = jobs.rglob("report.html")
    assert report.parent == next(jobs.rglob(".hydra")).parent
    (offline_run,) = offline_runs(jobs)
    return offline_run


def run_in_time(command: Sequence[str], variables: dict[str, str]) -> Finished:
    """Runs a command from the repository's root; what hangs is ended, with all its processes."""
    with subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        start_new_session=True,
    ) as started:
        try:
            output, _ = started.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            output, _ = started.communicate()
            raise AssertionError(f"{shlex.join(command)} hangs\n{output}") from None
        return Finished(started.returncode, output)


def assert_equal(row: Mapping[str, float], expected: Mapping[str, float]) -> None:
    """To 1e-5; a mean of both signs, to 1e-5 of what it is a mean of."""
    assert row.keys() == expected.keys()
    for key, value in expected.items():
        size = expected[key.replace("exp_avg_mean", "exp_avg_rms")]
        assert row[key] == pytest.approx(value, rel=1e-5, abs=1e-5 * abs(size)), key


@pytest.mark.parametrize(
    ("launcher", "strategy"),
    [(TORCHRUN, "ddp"), (TORCHRUN_FILE, "fsdp"), (SLURM_FILE, "ddp")],
)
def test_it_trains_alike_however_its_processes_are_started(
    launcher: str, strategy: str, folder: Path
) -> None:
    expected = logged_rows(trained(folder, LIGHTNING, "strategy=ddp"))
    rows = logged_rows(trained(folder, launcher, f"strategy={strategy}"))
    assert sorted(rows) == sorted(expected) == [0, 2, 5]
    assert_equal(rows[0], expected[0])


@pytest.mark.parametrize(
    "overrides",
    [("strategy=fsdp",), ("strategy=fsdp", "adam_monitor.kernel=eager")],
    ids=" ".join,
)
def test_what_is_sharded_is_measured_as_the_whole(overrides: tuple[str, ...], folder: Path) -> None:
    whole = logged_rows(trained(folder, LIGHTNING, "strategy=ddp"))
    sharded = logged_rows(trained(folder, LIGHTNING, *overrides))
    assert_equal(sharded[0], whole[0])
    assert any(key.endswith("/layer/net.blocks.0") for key in whole[0])


def test_groups_of_processes_that_hold_it_whole_are_measured_once(folder: Path) -> None:
    four = ("trainer.devices=4", "batch_size=2")
    whole = logged_rows(trained(folder, LIGHTNING, "strategy=ddp", *four))
    sharded = logged_rows(trained(folder, LIGHTNING, "strategy=fsdp", "replicas=2", *four))
    assert_equal(sharded[0], whole[0])


def test_a_sweep_that_would_start_itself_in_each_process_is_refused(tmp_path: Path) -> None:
    command = [*shlex.split(LIGHTNING), "-m", "optimizer.lr=1e-3,1e-4"]
    refused = run_in_time([*command, f"hydra.sweep.dir={tmp_path}"], environment())
    assert refused.returncode == 1
    assert "-m: expected a launcher that starts all processes of each job" in refused.output
