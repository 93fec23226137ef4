"""A run that is logged to a server: what arrives there, also if the server is slow or fails."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import (
    BRIEFLY,
    GLOBAL_STEP,
    Command,
    Finished,
    environment,
    history,
    keys,
    our_rows,
    promised_keys,
    recipe,
    run,
    run_config,
)
from tests.support.wandb_server import HISTORY, WandbServer

HISTOGRAMS = "adam_monitor.histograms_every_n_steps={}".format
BRIEF = (*BRIEFLY, HISTOGRAMS(10))
BRIEF_KEYS = (25, 10, 10)
"""As `LONGER_KEYS`."""
LONGER = ("width=2", "trainer.max_epochs=8", HISTOGRAMS(50))
LONGER_KEYS = (8 * 63, 10, 50)
"""Its optimizer steps, `every_n_steps`, `histograms_every_n_steps`."""

SOON = {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1"}
"""Seconds; by default W&B's client sends rows every 15, which is longer than these runs."""
GIVES_UP = {"WANDB_FINISH_TIMEOUT": "3"}
"""Seconds; without it the client waits at a run's end until it has sent everything."""
OUTAGE_S = 5.0
DELAY_S = 1.0


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
    assert server.unknown == []


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def client_of(server: WandbServer, folder: Path, settings: Mapping[str, str]) -> dict[str, str]:
    own = {"WANDB_DATA_DIR": str(folder)}
    return environment() | server.variables | own | {**settings}


def train(
    server: WandbServer, folder: Path, *overrides: str, settings: Mapping[str, str] | None = None
) -> Finished:
    variables = client_of(server, folder, settings or {})
    return recipe(folder, "logger=wandb", *overrides, variables=variables)


def assert_delivered(server: WandbServer, folder: Path, measured: tuple[int, int, int]) -> None:
    """The server has all that was measured, and all that the run has on the disk."""
    local = local_run(folder)
    rows = [flat(row) for row in server.run.history]
    assert keys(our_rows(rows, GLOBAL_STEP)) == promised_keys(*measured)
    assert rows == history(local)
    assert media(server) == {
        str(path.relative_to(local / "files")): path.read_bytes()
        for path in (local / "files" / "media").rglob("*.*")
    }
    tables = {row[key] for row in rows for key in row if key.endswith(".path")}
    assert tables == media(server).keys()
    assert server.run.config["lightning_adam"] == run_config(local)


def local_run(folder: Path) -> Path:
    """The folder of the only online run."""
    (found,) = (path for path in folder.glob("wandb/run-*") if path.is_dir())
    return found


def media(server: WandbServer) -> dict[str, bytes]:
    """The tables and other files of the logged values."""
    files = server.run.files.items()
    return {name: content for name, content in files if name.startswith("media/")}


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A row as W&B's reader gives it: `key.inner` for what is inside of a key."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        inner = flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else None
        found |= {f"{prefix}{key}": value} if inner is None else inner
    return found


@pytest.mark.slow
def test_online_run_delivers_every_row_and_table(server: WandbServer, tmp_path: Path) -> None:
    training = train(server, tmp_path, *BRIEF, "adam_monitor.layer_table=true")
    assert training.returncode == 0, training.output
    assert_delivered(server, tmp_path, BRIEF_KEYS)
    assert server.run.exit_code == 0
    (layers,) = (content for name, content in media(server).items() if "adam_layers" in name)
    assert len(json.loads(layers)["data"]) == 3 * 5


@pytest.mark.nightly
def test_finding_is_sent_as_an_alert_if_alerts_are_on(server: WandbServer, tmp_path: Path) -> None:
    large_eps = ("width=2", "trainer.max_epochs=2", "optimizer.eps=0.1")
    training = train(server, tmp_path, *large_eps, "adam_monitor.alert=true")
    assert training.returncode == 0, training.output
    (alert,) = server.alerts
    assert alert["title"] == "Adam: eps_dominates"
    assert "use:     optimizer.eps=" in alert["text"]
    assert server.run.summary["adam_findings_raised/eps_dominates"] == 60
    assert any("adam_findings" in name for name in media(server))


@pytest.mark.nightly
def test_slow_server_loses_nothing(server: WandbServer, tmp_path: Path) -> None:
    server.delay_s = DELAY_S
    training = train(server, tmp_path, *BRIEF)
    assert training.returncode == 0, training.output
    assert_delivered(server, tmp_path, BRIEF_KEYS)


@pytest.mark.slow
def test_server_that_fails_for_some_seconds_loses_nothing(
    server: WandbServer, background: ThreadPoolExecutor, tmp_path: Path
) -> None:
    running = background.submit(train, server, tmp_path, *LONGER, settings=SOON)
    fail_after_rows(server, 1, running)
    server.wait_until(lambda: server.turned_away > 0)
    time.sleep(OUTAGE_S)
    arrived = len(server.run.history)
    server.unavailable = False
    training = running.result()
    assert training.returncode == 0, training.output
    assert arrived < len(server.run.history)
    assert server.run.rows == server.run.history
    assert_delivered(server, tmp_path, LONGER_KEYS)


@pytest.mark.parametrize(
    ("rows", "overrides", "measured"),
    [
        pytest.param(0, BRIEF, BRIEF_KEYS, id="from the start", marks=pytest.mark.slow),
        pytest.param(1, LONGER, LONGER_KEYS, id="from the middle", marks=pytest.mark.nightly),
    ],
)
def test_wandb_sync_recovers_what_a_server_that_failed_to_the_end_lacks(
    rows: int,
    overrides: Sequence[str],
    measured: tuple[int, int, int],
    server: WandbServer,
    background: ThreadPoolExecutor,
    tmp_path: Path,
) -> None:
    running = background.submit(train, server, tmp_path, *overrides, settings=SOON | GIVES_UP)
    fail_after_rows(server, rows, running)
    training = running.result()
    assert training.returncode == 0, training.output
    server.unavailable = False
    assert len(server.run.history) < len(history(local_run(tmp_path)))
    sync: Command = ["wandb", "sync", "--no-skip-online", local_run(tmp_path)]
    synced = run(sync, tmp_path, client_of(server, tmp_path, {}))
    assert synced.returncode == 0, synced.output
    assert_delivered(server, tmp_path, measured)


def fail_after_rows(server: WandbServer, rows: int, running: "Future[Finished]") -> None:
    """Makes the server fail as soon as it has this number of rows of a run."""
    server.wait_until(
        lambda: bool(server.runs) and len(server.run.streamed.get(HISTORY, {})) >= rows
    )
    server.unavailable = True
    assert not running.done()
