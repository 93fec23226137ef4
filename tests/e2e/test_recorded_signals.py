"""A process that is told to end leaves what its flight recorder holds."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.recorded_training import READY_AT
from tests.support.commands import REPOSITORY, environment
from tests.support.exploding import files_of, read, steps_of

PATIENCE = 60
"""Seconds."""
SAID = {signal.SIGTERM: "SIGTERMException", signal.SIGINT: "KeyboardInterrupt"}


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("training", signal.SIGTERM),
        pytest.param("training", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("validation", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("validation", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_is_an_exception_and_the_steps_before_it_are_written(
    place: str, number: signal.Signals, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.recorded_training", place],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(REPOSITORY)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        before = list(iter(process.stdout.readline, "ready\n"))
        process.send_signal(number)
        output = "".join(before) + process.communicate(timeout=PATIENCE)[0]
    finally:
        process.kill()
        process.wait()
    assert "came to its end" not in output
    (file,) = files_of(tmp_path / "lightning_logs" / "version_0")
    steps = steps_of(read(file))
    assert steps == list(range(steps[-1] - 19, steps[-1] + 1))
    # A batch is finished after SIGTERM, which Lightning looks for at its end.
    assert READY_AT <= steps[-1] <= READY_AT + 1
    assert file.name == f"step_{steps[-1]}_exception.csv"
    assert f"AdamMonitor: exception ({SAID[number]}) at step {steps[-1]};" in output
