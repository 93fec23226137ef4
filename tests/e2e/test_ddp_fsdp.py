"""The recipe on many processes, replicated and sharded, by Lightning, torchrun and SLURM."""

import functools
import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate

from lightning_adam import build_adam
from recipes.ddp_fsdp import gpt2
from tests.support.commands import (
    REPOSITORY,
    Finished,
    environment,
    logged_rows,
    offline_runs,
    run,
)

pytestmark = pytest.mark.timeout(600)

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
"""The variables that SLURM sets for a job of two processes."""
SECONDS = 240
"""More than any of these runs takes; a run that takes longer hangs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "bin").mkdir()
    (folder / "bin" / "srun").write_text(SRUN, encoding="utf-8")
    (folder / "bin" / "srun").chmod(0o755)
    return folder


@functools.cache
def train(folder: Path, launcher: str, *overrides: str) -> dict[int, dict[str, float]]:
    """Runs the recipe, and returns the rows of its only W&B run."""
    jobs = folder / str(len(list(folder.iterdir())))
    variables = environment()
    if launcher == SLURM_FILE:
        variables |= SLURM | {"PATH": f"{folder}/bin{os.pathsep}{variables['PATH']}"}
        # It asks for GPUs.
        overrides = (*overrides, "trainer.accelerator=cpu")
    where = f"hydra.run.dir={jobs}/${{started:}}"
    finished = run_in_time([*shlex.split(launcher), *BRIEFLY, *overrides, where], variables)
    assert finished.returncode == 0, finished.output
    assert "AdamMonitor failed" not in finished.output
    assert finished.output.count("validation loss: ") == 1
    assert len(list(jobs.rglob(".hydra"))) == 1, "all processes have one folder"
    (report,) = jobs.rglob("report.html")
    assert report.parent == next(jobs.rglob(".hydra")).parent
    (offline_run,) = offline_runs(jobs)
    return logged_rows(offline_run)


def run_in_time(command: Sequence[str], variables: dict[str, str]) -> Finished:
    """Runs a command from the repository's root, and kills all its processes if it hangs."""
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
    """To 1e-5; a mean of values with both signs, to 1e-5 of their size."""
    assert row.keys() == expected.keys()
    for key, value in expected.items():
        size = expected[key.replace("exp_avg_mean", "exp_avg_rms")]
        assert row[key] == pytest.approx(value, rel=1e-5, abs=1e-5 * abs(size)), key


@pytest.mark.slow
def test_ddp_and_fsdp_by_torchrun_log_the_same(folder: Path) -> None:
    replicated = train(folder, TORCHRUN, "strategy=ddp")
    sharded = train(folder, TORCHRUN_FILE, "strategy=fsdp")
    assert sorted(replicated) == sorted(sharded) == [0, 2, 5]
    assert_equal(sharded[0], replicated[0])
    assert any("/layer/net.transformer.h.0/" in key for key in replicated[0])


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("launcher", "overrides"),
    [
        (LIGHTNING, "strategy=ddp"),
        (SLURM_FILE, "strategy=ddp"),
        (LIGHTNING, "strategy=fsdp"),
        (LIGHTNING, "strategy=fsdp adam_monitor.kernel=eager"),
    ],
)
def test_other_launchers_log_the_same(launcher: str, overrides: str, folder: Path) -> None:
    expected = train(folder, TORCHRUN, "strategy=ddp")
    rows = train(folder, launcher, *overrides.split())
    assert sorted(rows) == sorted(expected)
    assert_equal(rows[0], expected[0])


@pytest.mark.nightly
def test_replicas_of_a_sharded_model_are_measured_once(folder: Path) -> None:
    four = ("trainer.devices=4", "batch_size=2")
    replicated = train(folder, LIGHTNING, "strategy=ddp", *four)
    sharded = train(folder, LIGHTNING, "strategy=fsdp", "replicas=2", *four)
    assert_equal(sharded[0], replicated[0])


@pytest.mark.slow
def test_sweep_that_would_start_itself_in_each_process_is_an_error(tmp_path: Path) -> None:
    command = [*shlex.split(LIGHTNING), "-m", "optimizer.lr=1e-3,1e-4"]
    failed = run([*command, f"hydra.sweep.dir={tmp_path}"])
    assert failed.returncode == 1
    assert "-m needs a launcher that starts all processes of a job" in failed.output


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_settings_for_eight_gpus_train_gpt2_with_half_a_million_tokens_a_step(
    strategy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    line = ["experiment=gpt2_8gpu", f"strategy={strategy}", "trainer.accelerator=cpu"]
    with initialize_config_dir(str(REPOSITORY / "recipes/conf"), version_base="1.3"):
        line.append(f"trainer.default_root_dir={tmp_path}")
        cfg = compose("ddp_fsdp", line)
    trainer = instantiate(cfg.trainer, logger=False)
    assert (trainer.num_devices, trainer.max_steps) == (8, 600_000)
    assert (trainer.precision, trainer.val_check_interval) == ("bf16-mixed", 5000)
    pieces = cfg.batch_size * trainer.num_devices * trainer.accumulate_grad_batches
    assert pieces * cfg.context == 491_520
    with torch.device("meta"):
        net = gpt2(cfg.layers, cfg.width, cfg.heads, cfg.context, cfg.vocabulary)
    # GPT-2 has 124,439,808; 47 rows of the embedding are padding.
    assert sum(each.numel() for each in net.parameters()) == 124_439_808 + 47 * cfg.width
    adam = build_adam(net, cfg.optimizer, cfg.scheduler, total_steps=trainer.max_steps)
    decay, no_decay = adam["optimizer"].param_groups
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)
    assert decay["initial_lr"] == 6e-4
