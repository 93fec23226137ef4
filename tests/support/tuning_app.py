"""An app to tune, which computes its metric from the settings instead of training."""

from pathlib import Path

from lightning_adam.tune.history import History
from lightning_adam.tune.runs import Run
from tests.support.commands import environment, write_files

APP = """
import math, os, time
import hydra

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    optimizer = cfg.{place}
    with open(os.environ["TRAINED"], "a") as file:
        print(optimizer.lr, *optimizer.betas, optimizer.weight_decay, cfg.seed, file=file)
    time.sleep(float(os.environ.get("SECONDS", 0)))
    loss = (math.log10(optimizer.lr) + 2.3) ** 2 + (optimizer.betas[0] - 0.8) ** 2
    return loss + cfg.seed / 1000

if __name__ == "__main__":
    main()
"""
CONFIG = """
defaults:
  - lightning_adam/optimizer{package}: adamw
  - _self_
seed: 5
width: 8
data: {{num_workers: 2}}
"""

TUNE = ["python", "train.py", "-m", "hydra/sweeper=adam_tune"]
MINIMIZE = "hydra.sweeper.direction=minimize"


def write_app(folder: Path, package: str = "", place: str = "optimizer") -> Path:
    """Writes the app; `package` is the path of the optimizer's config."""
    program, config = APP.format(place=place), CONFIG.format(package=package)
    write_files(folder, {"train.py": program, "conf/config.yaml": config})
    return folder


def variables(folder: Path, **others: str) -> dict[str, str]:
    """Returns the environment in which each job of the app records its settings."""
    return environment(TRAINED=str(folder / "trained.txt"), **others)


def trained_settings(folder: Path) -> list[tuple[float, ...]]:
    """Returns the learning rate, betas, weight decay and seed of each job, in order."""
    lines = (folder / "trained.txt").read_text().splitlines()
    return [tuple(map(float, line.split())) for line in lines]


def runs(folder: Path, storage: str | None = None) -> list[Run]:
    """Returns the runs of an app's search, those of killed processes included."""
    journal = f"journal:{folder / 'multirun/adam_tune_train/trials.journal'}"
    return History(storage or journal, "train", "minimize").runs()
