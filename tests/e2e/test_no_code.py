"""LIGHTNING_ADAM_MONITOR before scripts that know nothing of it, as they are typed in a shell."""

import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from csv import DictReader
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lightning_adam.environment import VARIABLE
from tests.support.commands import Command, Finished, environment, our_rows, run

SCRIPTS = Path(__file__).parent
SETTINGS = "every_n_steps=10 statistics=all scopes=[model,layer]"
UPDATE = "adam_update/update_norm"


class Script(NamedTuple):
    """A script, what it logs with the variable, and what is said then."""

    name: str
    keys: list[str]
    said: str


TRAINED = [
    Script("classifier", [UPDATE, f"{UPDATE}/layer/net.1"], "EnvironmentMonitor"),
    Script("sgd", [], f"{VARIABLE}: nothing to measure"),
    Script(
        "gan",
        [
            f"{UPDATE}/optimizer/generator",
            f"{UPDATE}/optimizer/discriminator/layer/discriminator.2",
        ],
        "EnvironmentMonitor",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("script", TRAINED, ids=[each.name for each in TRAINED])
def test_a_script_is_measured_and_trains_bit_identically(script: Script, tmp_path: Path) -> None:
    without, with_it = tmp_path / "without", tmp_path / "with it"
    unset = trained(script, without, environment())
    assert VARIABLE not in unset.output
    assert "EnvironmentMonitor" not in unset.output
    assert script.said in trained(script, with_it, environment() | {VARIABLE: SETTINGS}).output

    before, after = (torch.load(folder / "parameters.pt") for folder in (without, with_it))
    assert all(torch.equal(before[name], after[name]) for name in before)

    rows = our_rows(logged(with_it), "step")
    assert sorted(rows) == ([0, 9, 19, 29] if script.keys else [])
    assert all(key in row for row in rows.values() for key in script.keys)
    assert [row for row in map(of_the_script, logged(with_it)) if row] == logged(without)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_processes_measure_together_or_none_of_them_does(tmp_path: Path) -> None:
    """One that measures alone would wait for the others, as where a node has not the variable."""
    alone, both, one = tmp_path / "none", tmp_path / "both", tmp_path / "one"
    train_sharded(alone, [None, None])
    train_sharded(both, ["every_n_steps=5", "every_n_steps=5"])
    said = train_sharded(one, ["every_n_steps=5", None])
    assert f"{VARIABLE} is ignored: 1 of 2 processes have this value" in said
    rows = [our_rows(logged(folder), "step") for folder in (alone, both, one)]
    assert [sorted(each) for each in rows] == [[], [0, 4], []]
    expected, *others = (torch.load(each / "parameters.pt") for each in (alone, both, one))
    for parameters in others:
        assert all(torch.equal(expected[name], parameters[name]) for name in expected)


def train_sharded(folder: Path, given: Sequence[str | None]) -> str:
    """What a process for each value of the variable says, all together."""
    folder.mkdir()
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        port = str(unused.getsockname()[1])
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(len(given))}
    processes = []
    for rank, value in enumerate(given):
        variables = environment() | meeting | {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}
        variables |= {} if value is None else {VARIABLE: value}
        command: Command = [sys.executable, SCRIPTS / "plain_sharded.py"]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
        processes.append(subprocess.Popen(command, cwd=folder, env=variables, **pipes))
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(given), outputs
    return "\n".join(outputs)


def trained(script: Script, folder: Path, variables: Mapping[str, str]) -> Finished:
    folder.mkdir()
    command: Command = [sys.executable, SCRIPTS / f"plain_{script.name}.py"]
    finished = run(command, folder, variables)
    assert finished.returncode == 0, finished.output
    return finished


def logged(folder: Path) -> list[dict[str, str]]:
    """The rows of Lightning's CSVLogger, without what they leave empty."""
    rows: list[dict[str, str]] = []
    # There is none if nothing was logged.
    for path in folder.rglob("metrics.csv"):
        with path.open(encoding="utf-8") as file:
            rows += (
                {key: value for key, value in row.items() if value} for row in DictReader(file)
            )
    return rows


def of_the_script(row: Mapping[str, str]) -> dict[str, str]:
    """What a row holds without us; nothing if that is only the step."""
    kept = {key: value for key, value in row.items() if not key.startswith("adam_")}
    return kept if set(kept) != {"step"} else {}
