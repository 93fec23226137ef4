"""The flight recorder's file of a run that is logged to a server."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger

from tests.support.exploding import Exploding, files_of, recorded
from tests.support.wandb_server import WandbServer

DELAY_S = 1.0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as server:
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        yield server
        wandb.finish()
    assert server.unknown == []


@pytest.mark.slow
def test_the_server_gets_it_while_the_training_goes_on_which_does_not_wait(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: list[float] = []
    save = wandb.Run.save

    def timed(*arguments: object, **keywords: object) -> object:
        server.delay_s = DELAY_S
        begin = time.perf_counter()
        saved = save(*arguments, **keywords)  # type: ignore[arg-type]
        seconds.append(time.perf_counter() - begin)
        return saved

    monkeypatch.setattr(wandb.Run, "save", timed)
    logger = WandbLogger(project="tests", save_dir=tmp_path)
    folder = Path(logger.experiment.dir)
    recorded(Exploding(12, "inf in a weight"), batches=15, logger=logger)
    (file,) = files_of(folder)
    name = f"adam_flight_recorder/{file.name}"
    server.wait_until(lambda: name in server.run.files)
    assert server.run.files[name] == file.read_bytes()
    assert len(seconds) == 1
    assert seconds[0] < DELAY_S / 2
