"""LIGHTNING_ADAM_MONITOR before scripts that do not know lightning_adam."""

import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from csv import DictReader
from pathlib import Path

import pytest
import torch

from lightning_adam.config.variables import MONITOR_VARIABLE as VARIABLE
from tests.support.commands import BIN, environment, our_rows, run
from tests.support.monitored import scoped
from tests.support.packages import PACKAGES

SCRIPTS = Path(__file__).parent
SETTINGS = "every_n_steps=10 statistics=all scopes=[model,layer]"
UPDATE = "adam_update/update_norm"


@pytest.mark.parametrize("package", PACKAGES)
def test_script_is_measured_and_trains_bit_identically(package: str, tmp_path: Path) -> None:
    script = (SCRIPTS / "plain_classifier.py").read_text(encoding="utf-8")
    if package == "pytorch_lightning":
        script = script.replace("import lightning as L", "import pytorch_lightning as L")
        script = script.replace("lightning.pytorch", package)
    (tmp_path / "plain_classifier.py").write_text(script, encoding="utf-8")
    without, measured = tmp_path / "without", tmp_path / "with it"
    unset = train("classifier", without, {}, tmp_path)
    assert VARIABLE not in unset
    assert "EnvironmentMonitor" not in unset
    assert "EnvironmentMonitor" in train("classifier", measured, {VARIABLE: SETTINGS}, tmp_path)
    assert_same_parameters(without, measured)
    rows = our_rows(logged(measured), "step")
    assert sorted(rows) == [0, 9, 19, 29]
    assert all({UPDATE, scoped("layer/net.1", UPDATE)} <= row.keys() for row in rows.values())
    own = [
        {key: value for key, value in row.items() if not key.startswith("adam_")}
        for row in logged(measured)
    ]
    assert [row for row in own if row.keys() != {"step"}] == logged(without)


@pytest.mark.slow
def test_processes_measure_together_or_none_of_them_does(tmp_path: Path) -> None:
    """A process that measures alone would wait for the others, which lack the variable."""
    both, one = tmp_path / "both", tmp_path / "one"
    train_sharded(both, ["every_n_steps=5", "every_n_steps=5"])
    printed = train_sharded(one, ["every_n_steps=5", None])
    assert f"{VARIABLE} is ignored: only 1 of 2 processes have this value" in printed
    assert [sorted(our_rows(logged(folder), "step")) for folder in (both, one)] == [[0, 4], []]
    assert_same_parameters(both, one)


def train(name: str, folder: Path, variables: Mapping[str, str], scripts: Path = SCRIPTS) -> str:
    folder.mkdir(exist_ok=True)
    script = scripts / f"plain_{name}.py"
    finished = run([BIN / "python", script], folder, environment() | dict(variables))
    assert finished.returncode == 0, finished.output
    return finished.output


def train_sharded(folder: Path, values: Sequence[str | None]) -> str:
    """What a process for each value of the variable prints, all together."""
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        port = str(unused.getsockname()[1])
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(len(values))}

    def start(rank: int) -> str:
        value = values[rank]
        own = {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}
        own |= {} if value is None else {VARIABLE: value}
        return train("sharded", folder, meeting | own)

    with ThreadPoolExecutor(len(values)) as pool:
        return "\n".join(pool.map(start, range(len(values))))


def assert_same_parameters(one: Path, other: Path) -> None:
    before, after = (torch.load(folder / "parameters.pt") for folder in (one, other))
    assert all(torch.equal(before[name], after[name]) for name in before)


def logged(folder: Path) -> list[dict[str, str]]:
    """The rows of Lightning's CSVLogger without their empty cells; none if nothing was logged."""
    rows: list[dict[str, str]] = []
    for path in folder.rglob("metrics.csv"):
        with path.open(encoding="utf-8") as file:
            rows += (
                {key: value for key, value in row.items() if value} for row in DictReader(file)
            )
    return rows
