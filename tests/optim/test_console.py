"""The logger of the package's console output."""

import logging
import sys
from pathlib import Path

import pytest
from lightning.pytorch.utilities import rank_zero_only

from lightning_adam.optim.console import log_info
from tests.support.commands import run

SCRIPT = """
import logging
import torch
{configuration}
from lightning_adam import build_optimizer

build_optimizer(torch.nn.Linear(3, 4), {{"lr": 0.1, "decoupled_weight_decay": True}})
"""
CONFIGURATIONS = {
    "no configuration": ("", "AdamW, fused: float32 on cpu\ngroup"),
    "basicConfig": (
        "logging.basicConfig(level=logging.INFO, format='%(name)s %(levelname)s %(message)s')",
        "lightning_adam INFO AdamW, fused: float32 on cpu\ngroup",
    ),
    "a level of the package": ("logging.getLogger('lightning_adam').setLevel(logging.ERROR)", ""),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_table_is_printed_once_with_any_logging_config(name: str, tmp_path: Path) -> None:
    configuration, beginning = CONFIGURATIONS[name]
    script = SCRIPT.format(configuration=configuration)
    finished = run([sys.executable, "-c", script], tmp_path)
    assert finished.output.startswith(beginning)
    assert finished.output.count("AdamW, fused") == bool(beginning)


def test_line_is_printed_unless_the_root_logger_has_a_handler(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for handlers in ([], [logging.NullHandler()]):
        monkeypatch.setattr(logging.getLogger(), "handlers", handlers)
        log_info(f"{len(handlers)} handlers")
    assert capsys.readouterr().err == "0 handlers\n"


def test_only_rank_zero_logs(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="lightning_adam")
    for rank in (1, 0):
        monkeypatch.setattr(rank_zero_only, "rank", rank, raising=False)
        log_info(f"rank {rank}")
    assert [(each.name, each.message) for each in caplog.records] == [("lightning_adam", "rank 0")]
