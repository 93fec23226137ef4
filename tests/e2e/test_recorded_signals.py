"""A process that is terminated by a signal writes the steps in its flight recorder."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.recorded_training import READY, READY_AT
from tests.support import forkserver
from tests.support.commands import REPOSITORY, environment
from tests.support.exploding import files_of, read, steps_of

PATIENCE = 60
"""Seconds."""
EXCEPTIONS = {signal.SIGTERM: "SIGTERMException", signal.SIGINT: "KeyboardInterrupt"}


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("training", signal.SIGTERM),
        pytest.param("training", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("validation", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("validation", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_signal_is_recorded_as_an_exception_with_the_steps_before_it(
    place: str, number: signal.Signals, tmp_path: Path
) -> None:
    output = tmp_path / "output.txt"
    process = forkserver.start(
        "tests.e2e.recorded_training",
        [place],
        tmp_path,
        environment(PYTHONPATH=str(REPOSITORY)),
        output,
    )
    try:
        while not output.exists() or READY not in output.read_text(encoding="utf-8"):
            assert process.is_alive(), output.read_text(encoding="utf-8")
            time.sleep(0.02)
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(PATIENCE)
        assert process.exitcode is not None, "it goes on"
    finally:
        process.kill()
    printed = output.read_text(encoding="utf-8")
    assert "came to its end" not in printed
    (file,) = files_of(tmp_path / "lightning_logs" / "version_0")
    steps = steps_of(read(file))
    assert steps == list(range(steps[-1] - 19, steps[-1] + 1))
    # A batch is finished after SIGTERM, which Lightning looks for at its end.
    assert READY_AT <= steps[-1] <= READY_AT + 1
    assert file.name == f"step_{steps[-1]}_exception.csv"
    assert f"AdamMonitor: exception ({EXCEPTIONS[number]}) at step {steps[-1]};" in printed
