"""What is built installs into a fresh environment, and the README's project runs there."""

import json
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from .support import (
    BIN,
    PROJECT_KEYS,
    REPOSITORY,
    environment,
    follow_the_readme,
    keys,
    logged_rows,
    promised_keys,
    run,
    succeed,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PRESETS = Path("conf/lightning_adam")
NOT_NEEDED = {"mlxtend", "pytest", "tensorboard"}
HEAVY = {"lightning", "pytorch_lightning", "torch"}
WHEEL, EDITABLE = "wheel", "editable"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git would add, in a folder with a space."""
    copy = tmp_path_factory.mktemp("built") / "a copy"
    listed = succeed(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"])
    for name in filter(None, listed.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(repository: Path) -> Path:
    return build(repository, "--wheel")


def build(repository: Path, *arguments: str) -> Path:
    """The wheel that the repository builds, by itself or by way of the sdist."""
    target = repository.parent / "-".join(["dist", *arguments])
    succeed([BIN / "python", "-m", "build", *arguments, "--outdir", target, repository])
    (built,) = target.glob("*.whl")
    return built


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_presets_the_plugin_and_the_types(
    wheel: Path, repository: Path
) -> None:
    presets = {path.relative_to(repository).as_posix() for path in (repository / PRESETS).rglob("*.yaml")}
