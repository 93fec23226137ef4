"""The flight recorder's file of a run that is logged to a server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger

from tests.support.exploding import Exploding, files_of, recorded
from tests.support.wandb_server import WandbServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as server:
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        # W&B reads the environment once a process.
        wandb.teardown()
        yield server
        wandb.finish()
        wandb.teardown()
    assert server.unknown == []


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_file_is_uploaded_during_the_run_which_does_not_wait_for_it(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = wandb.Run.save

    def save_during_an_outage(*arguments: object, **keywords: object) -> object:
        server.unavailable = True
        return save(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(wandb.Run, "save", save_during_an_outage)
    logger = WandbLogger(project="tests", save_dir=tmp_path)
    folder = Path(logger.experiment.dir)
    recorded(Exploding(12, "inf in a weight"), batches=15, logger=logger)
    assert server.unavailable, "nothing was saved"
    (file,) = files_of(folder)
    name = f"adam_flight_recorder/{file.name}"
    assert name not in server.run.files
    server.unavailable = False
    server.wait_until(lambda: name in server.run.files)
    assert server.run.files[name] == file.read_bytes()
