"""Whether a process is alive, on this machine and on another."""

import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lightning_adam.tune import alive
from lightning_adam.tune.alive import BEATS_MISSED, SECONDS_BETWEEN_BEATS, Heart, Observer

NAME = "from lightning_adam.tune.alive import process_name; print(process_name(), flush=True)"


def observer(beats: dict[str, int]) -> Observer:
    return Observer(SimpleNamespace(beats=lambda: beats, beat=None))


def test_local_process_is_dead_as_soon_as_it_is_killed() -> None:
    code = f"{NAME}; import time; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    name = process.stdout.readline().strip()
    assert observer({}).is_alive(name)
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    # Dead, though nobody has asked about it yet.
    assert not observer({}).is_alive(name)
    process.communicate()
    assert not observer({}).is_alive(name)


def test_reused_process_number_is_another_process() -> None:
    host = socket.gethostname()
    assert not observer({}).is_alive(f"{host}/{os.getpid()}.1/abc")


def test_remote_process_is_alive_until_it_misses_its_heartbeats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    name = "elsewhere/1.5/abc"
    beats = {name: 0}
    watching = observer(beats)
    limit = BEATS_MISSED * SECONDS_BETWEEN_BEATS
    assert watching.is_alive(name)
    assert watching.is_alive("elsewhere/2.5/no heartbeat yet")
    for _ in range(3):
        now += limit - 1
        beats[name] += 1
        assert watching.is_alive(name)
    now += limit - 1
    assert watching.is_alive(name)
    assert not watching.is_alive("elsewhere/2.5/no heartbeat yet")
    now += 2
    assert not watching.is_alive(name)
    # A machine that was away for a while, as in sleep.
    beats[name] += 1
    assert watching.is_alive(name)


def test_heartbeats_continue_when_the_database_fails_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alive, "SECONDS_BETWEEN_BEATS", 0.01)
    heard: list[int] = []

    def beat(process: str, count: int) -> None:
        assert process == "host/1/a"
        heard.append(count)
        if count == 2:
            raise OSError("away")

    with Heart(SimpleNamespace(beat=beat, beats=dict), "host/1/a"):
        while len(heard) < 6:
            pass
    count = len(heard)
    assert heard == list(range(count))
