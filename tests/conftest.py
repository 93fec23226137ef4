"""The tiers of the suite, and what every test starts from."""

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
"""The marks of the tests that `make test` leaves out, and the command that runs them."""

_deselected: Counter[str] = Counter()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        tier = next((mark for mark in TIERS if item.get_closest_marker(mark)), None)
        if tier:
            _deselected[tier] += 1


def pytest_collection_finish() -> None:
    # Each training run ends in a garbage collection, which need not visit what is imported.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()
    # Under pytest-xdist the workers collect, and the controller prints.
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["deselected"] = dict(_deselected)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    global _deselected
    # Every worker collects all tests: the counts are the same, not parts of a sum.
    _deselected |= Counter(getattr(node, "workeroutput", {}).get("deselected", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for tier, command in reversed(TIERS.items()):
        if _deselected[tier]:
            terminalreporter.write_line(f"not run: {_deselected[tier]} {tier} tests ({command})")


@pytest.fixture(autouse=True)
def _own_folder_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing a test leaves behind is found by another: logs go to its own folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_ADAM_MONITOR", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    # An app that runs in this process leaves its config behind, and errors would name overrides.
    hydra_config = HydraConfig.instance()
    monkeypatch.setattr(hydra_config, "cfg", hydra_config.cfg)
    # Hydra's logging config closes all handlers, and absl's would close pytest's own stderr.
    monkeypatch.setattr(logging, "shutdown", lambda *handlers: None)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Chromium."""
    with chromium() as opened:
        yield opened


@pytest.fixture
def visit(browser: "Browser") -> Iterator[Visits]:
    """Opens pages. A page that logs to the console, fails or uses the network fails the test."""
    visits = Visits(browser)
    yield visits
    visits.leave()
