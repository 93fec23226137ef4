"""recipes/cluster on one machine: stand-ins for SLURM's commands, a local Ray, a W&B server."""

import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.commands import REPOSITORY, Finished, environment, run_text
from tests.support.wandb_server import ENTITY, Json, WandbServer

CLUSTER = REPOSITORY / "recipes/cluster"
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", (CLUSTER / "README.md").read_text(), re.M | re.S)
SLURM, RAY, SWEEP = BLOCKS
SMALL = "logger=csv width=2 trainer.max_epochs=1 hydra.sweeper.n_trials=3"
SWEEP_NAME = "k1w2x3"

# As much of SLURM as submitit needs on one machine: each task of an array runs the script in the
# background, and submitit sees from the result files which have ended.
SBATCH = """#!/usr/bin/env bash
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$1")
export SLURM_JOB_ID=$$ SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1
export SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
# submitit moves the script as soon as it is submitted, so a copy is run, as SLURM does.
script=$(mktemp)
cp "$1" "$script"
# A batch of one run is no array.
for task in $(seq 0 "${last:-0}"); do
  [[ -n $last ]] && export SLURM_ARRAY_JOB_ID=$$ SLURM_ARRAY_TASK_ID=$task
  bash "$script" >/dev/null 2>&1 &
done
echo "Submitted batch job $$"
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
  case $1 in --output | --error) shift 2 ;; *) shift ;; esac
done
exec "$@"
"""
SACCT = """#!/usr/bin/env bash
echo "JobID|State|NodeList"
"""


def typed(block: str, folder: Path, *others: str, variables: dict[str, str]) -> Finished:
    """Runs the search of a block, made small, in a folder, without its other lines."""
    (line,) = (line for line in block.splitlines() if line.startswith("python "))
    assert "hydra.sweep.dir=/shared/mnist" in line
    line = line.replace("/shared/mnist", str(folder))
    return run_text(" ".join([line, SMALL, *others]), REPOSITORY, variables)


def assert_searched(searched: Finished, folder: Path) -> None:
    assert searched.returncode == 0, searched.output
    assert " failed" not in searched.output
    assert re.search(r"adam_tune: 0\.\d+ -> 0\.\d+ in 3 runs", searched.output)
    # The start, and then two at once, each in its own process.
    assert len(list(folder.glob("search/*/checkpoints/best.ckpt"))) == 2


@pytest.mark.slow
def test_search_runs_as_slurm_arrays(tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT}.items():
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    known = environment()
    variables = known | {"PATH": f"{commands}{os.pathsep}{known['PATH']}"}
    folder = tmp_path / "shared"
    assert_searched(typed(SLURM, folder, variables=variables), folder)
    scripts = {path.read_text() for path in (folder / ".submitit").rglob("*submission*.sh")}
    asked = [set(re.findall(r"^#SBATCH --(.*)", each, re.MULTILINE)) for each in scripts]
    assert {word for each in asked for word in each if word.startswith("array=")} == {"array=0-1%2"}
    assert set.intersection(*asked) >= {
        "cpus-per-task=8",
        "gpus-per-node=1",
        "job-name=mnist",
        "mem=32GB",
        "nodes=1",
        "ntasks-per-node=1",
        "partition=gpu",
        "requeue",
        "signal=USR2@120",
        "time=240",
    }


@pytest.mark.nightly
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray")
def test_search_runs_as_ray_tasks(tmp_path: Path) -> None:
    # One machine, which has fewer processors and no GPU.
    here = [
        "hydra.launcher.ray.init.address=null",
        "+hydra.launcher.ray.init.num_cpus=2",
        "hydra.launcher.ray.init.object_store_memory=80000000",
        "hydra.launcher.ray.remote.num_cpus=1",
        "hydra.launcher.ray.remote.num_gpus=0",
    ]
    # The paths of Ray's sockets must be short, and its token would be left in the home folder.
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as short:
        variables = environment(
            RAY_TMPDIR=short, RAY_AUTH_TOKEN=64 * "0", RAY_USAGE_STATS_ENABLED="0"
        )
        searched = typed(RAY, tmp_path, *here, variables=variables)
    assert_searched(searched, tmp_path)


class SweepServer(WandbServer):
    """Keeps one sweep, and gives its agent one run."""

    def __init__(self, run_values: Json) -> None:
        super().__init__()
        self.run_values = run_values
        self.sweep: Json = {}
        self._answers |= {
            "UpsertSweep": self._upsert_sweep,
            "SweepWithRuns": self._sweep_with_runs,
            "CreateAgent": lambda _: {"createAgent": {"agent": {"id": "agent"}}},
            "Heartbeat": self._heartbeat,
        }

    def _upsert_sweep(self, asked: Json) -> Json:
        self.sweep = yaml.safe_load(asked["config"])
        project = {"id": "project", "name": asked["projectName"], "entity": {"name": ENTITY}}
        sweep = {"name": SWEEP_NAME, "project": project}
        return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}

    def _sweep_with_runs(self, _: Json) -> Json:
        config = yaml.safe_dump(self.sweep)
        return {"project": {"sweep": {"config": config, "runs": {"edges": []}}}}

    def _heartbeat(self, asked: Json) -> Json:
        is_idle = not json.loads(asked["runState"]) and not self.runs
        args = {name: {"value": value} for name, value in self.run_values.items()}
        run = {"type": "run", "run_id": "r1", "program": self.sweep["program"], "args": args}
        commands = json.dumps([run] if is_idle else [])
        return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": commands}}


@pytest.fixture
def server() -> Iterator[SweepServer]:
    values = {
        "optimizer.lr": 3.1e-05,
        "optimizer.betas": "[0.95,0.99]",
        "optimizer.weight_decay": 0.02,
    }
    with SweepServer(values) as server:
        yield server
    assert server.unknown == []


@pytest.mark.slow
def test_wandb_agent_trains_the_app_of_a_sweep(server: SweepServer, tmp_path: Path) -> None:
    own = {"WANDB_DIR": str(tmp_path), "WANDB_DATA_DIR": str(tmp_path)}
    variables = environment() | server.variables | own
    begin, work = SWEEP.splitlines()
    begun = run_text(begin, REPOSITORY, variables)
    assert begun.returncode == 0, begun.output
    name = f"{ENTITY}/lightning_adam/{SWEEP_NAME}"
    assert f"wandb agent {name}" in begun.output
    given = server.sweep["parameters"]
    assert given.keys() == server.run_values.keys()
    assert 0 < given["optimizer.lr"]["min"] < given["optimizer.lr"]["max"] == 0.1
    assert server.run_values["optimizer.betas"] in given["optimizer.betas"]["values"]
    # The overrides that make the run small come before those that the server gives.
    small = ["width=2", "trainer.max_epochs=1", f"hydra.run.dir={tmp_path}/job"]
    server.sweep["command"][-1:-1] = small
    worked = run_text(
        work.replace("ENTITY", ENTITY).replace("SWEEP", f"{SWEEP_NAME} --count 1"),
        REPOSITORY,
        variables,
    )
    assert worked.returncode == 0, worked.output
    config = server.run.config["lightning_adam"]
    assert config["optimizer"]["lr"] == 3.1e-05, config
    assert server.sweep["metric"]["name"] in server.run.summary
    assert server.run.exit_code == 0
