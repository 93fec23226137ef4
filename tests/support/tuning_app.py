"""A user's app that is tuned: it computes its metric from the settings, and trains nothing."""

from pathlib import Path

from tests.support.commands import environment

APP = """
import math, os, time
import hydra

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    optimizer = cfg.{place}
    with open(os.environ["TRAINED"], "a") as file:
        print(optimizer.lr, list(optimizer.betas), file=file)
    time.sleep(float(os.environ.get("SECONDS", 0)))
    return (math.log10(optimizer.lr) + 2.3) ** 2 + (optimizer.betas[0] - 0.8) ** 2

if __name__ == "__main__":
    main()
"""
CONFIG = """
defaults:
  - lightning_adam/optimizer{place}: adamw
  - _self_
"""
BEST_LR = 10**-2.3
"""Where the app's metric is lowest."""

TUNE = ["python", "train.py", "-m", "hydra/sweeper=adam_tune"]
MINIMIZE = "hydra.sweeper.direction=minimize"


def write_app(folder: Path, package: str = "", place: str = "optimizer") -> Path:
    """Writes the app, with the optimizer's config at another place if `package` says so."""
    (folder / "conf").mkdir(parents=True)
    (folder / "train.py").write_text(APP.format(place=place))
    (folder / "conf/config.yaml").write_text(CONFIG.format(place=package))
    return folder


def variables(folder: Path, **others: str) -> dict[str, str]:
    """The environment in which each job of the app writes down its settings."""
    return environment(TRAINED=str(folder / "trained.txt"), **others)


def trained_settings(folder: Path) -> list[str]:
    """The learning rate and the betas of each job that the app ran, in order."""
    return (folder / "trained.txt").read_text().splitlines()
