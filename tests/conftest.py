import os
from pathlib import Path

import pytest
import torch

# Two test processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_folder_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing a test leaves behind is found by another: logs go to its own folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_ADAM_MONITOR", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    torch.manual_seed(0)
