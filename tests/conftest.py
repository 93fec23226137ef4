"""The tiers of the test suite, and fixtures for all tests."""

import gc
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig

from tests.support.browser import Visits, chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Two test processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# The client reads its mode once per process, whichever test comes first.
os.environ["WANDB_MODE"] = "offline"

TIERS = {"nightly": "make test-nightly", "slow": "make test-ci"}
"""The marks of tests that `make test` skips, and the commands that run them."""

_deselected: Counter[str] = Counter()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        tier = next((mark for mark in TIERS if item.get_closest_marker(mark)), None)
        if tier:
            _deselected[tier] += 1


def pytest_collection_finish() -> None:
    # Each training run ends with a garbage collection. Freezing speeds it up.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()
    # With pytest-xdist, the workers collect and the controller prints.
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["deselected"] = dict(_deselected)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    global _deselected
    # Every worker collects all tests, so all counts are equal.
    _deselected |= Counter(getattr(node, "workeroutput", {}).get("deselected", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for tier, command in reversed(TIERS.items()):
        if _deselected[tier]:
            terminalreporter.write_line(f"not run: {_deselected[tier]} {tier} tests ({command})")


@pytest.fixture(autouse=True)
def _own_folder_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Isolates tests: a separate working folder, a fixed seed, and no global state of Hydra."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_ADAM_MONITOR", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    # An app in this process leaves its Hydra config, which would change error messages.
    hydra_config = HydraConfig.instance()
    monkeypatch.setattr(hydra_config, "cfg", hydra_config.cfg)
    # Hydra's logging config closes all handlers; absl's would close the stderr of pytest.
    monkeypatch.setattr(logging, "shutdown", lambda *handlers: None)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Chromium."""
    with chromium() as opened:
        yield opened


@pytest.fixture
def visit(browser: "Browser") -> Iterator[Visits]:
    """Opens pages. Fails if a page logs to the console, has an error or uses the network."""
    visits = Visits(browser)
    yield visits
    visits.leave()
