"""The source distribution and the wheel: contents, metadata, the quick start once installed.

In CI the dependencies are linked from the environment of the tests. The nightly tests install the
wheel and the repository with pip. `make release-check` runs all but the latter.
"""

import json
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from email.parser import BytesParser
from pathlib import Path

import pytest
import yaml

from lightning_adam import __version__
from tests.support.commands import (
    BIN,
    PROJECT_KEYS,
    REPOSITORY,
    Command,
    environment,
    follow_the_readme,
    keys,
    logged_rows,
    promised_keys,
    run,
    run_text,
    succeed,
)
from tests.support.documentation import shell_lines
from tests.support.linked_packages import link_packages
from tests.support.tuning_app import MINIMIZE, TUNE, trained_settings, write_app

pytestmark = pytest.mark.timeout(1800)

WHEEL, EDITABLE = "wheel", "editable"
NOT_NEEDED = ("hypothesis", "mlxtend", "optuna", "pytest", "scipy", "tensorboard")
HEAVY = ("lightning", "numpy", "pydantic", "pydantic_core", "pytorch_lightning", "torch")
LOADED_BY_EVERY_HYDRA_APP = (
    "hydra_plugins.lightning_adam",
    "lightning_adam",
    "lightning_adam.config.hydra_plugin",
)
SURVEY = f"""
import importlib, importlib.util, json, sys

not_needed = [name for name in {NOT_NEEDED} if importlib.util.find_spec(name)]
for name in {LOADED_BY_EVERY_HYDRA_APP}:
    importlib.import_module(name)
heavy = [name for name in {HEAVY} if name in sys.modules]
import lightning_adam
missing = [name for name in lightning_adam.__all__ if not hasattr(lightning_adam, name)]
print(json.dumps([lightning_adam.__file__, not_needed, heavy, missing]))
"""
"""Prints the path of the package, the optional packages that are installed, the heavy ones that a
Hydra app has loaded, and the public names that cannot be imported."""


def test_version_agrees_in_the_changelog_and_the_citation() -> None:
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    version, date = re.findall(r"(?m)^## (\S+) - (\S+)$", changelog)[0]
    assert version == citation["version"] == __version__
    assert date == str(citation.get("date-released", "unreleased"))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of all files that git tracks or would add, in a folder with a space."""
    copy = tmp_path_factory.mktemp("installed") / "a copy"
    listed = succeed(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"])
    for name in filter(None, listed.split("\0")):
        # git lists a deleted file until the deletion is committed.
        if (REPOSITORY / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(repository: Path) -> Path:
    """The wheel, built from the source distribution, which lies beside it."""
    return build(repository)


def build(repository: Path, *arguments: str) -> Path:
    """The wheel that `python -m build` makes."""
    target = repository.parent / "-".join(["dist", *arguments])
    succeed([BIN / "python", "-m", "build", *arguments, "--outdir", target, repository])
    (built,) = target.glob("*.whl")
    return built


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel, without RECORD."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith(".dist-info/RECORD")]
        return {name: archive.read(name) for name in names}


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The commands of an environment with the wheel and linked packages; its path has a space."""
    folder = tmp_path_factory.mktemp("environment") / "a venv"
    succeed([sys.executable, "-m", "venv", "--without-pip", folder])
    pip: Command = [BIN / "python", "-m", "pip", "--python", folder / "bin" / "python"]
    succeed([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel])
    link_packages(folder, requires=requirements(wheel))
    succeed([*pip, "check"])
    return folder / "bin"


def requirements(wheel: Path) -> list[str]:
    """The requirements in the metadata of a wheel."""
    (metadata,) = (text for name, text in contents(wheel).items() if name.endswith("/METADATA"))
    return BytesParser().parsebytes(metadata).get_all("Requires-Dist") or []


def survey(commands: Path, folder: Path) -> tuple[Path, list[list[str]]]:
    """The path of the package, and the lists that have to be empty."""
    path, *lists = json.loads(succeed([commands / "python", "-c", SURVEY], folder))
    return Path(path), lists


@pytest.mark.slow
def test_metadata_and_readme_are_accepted_by_an_index(wheel: Path) -> None:
    source, built = sorted(wheel.parent.iterdir(), key=lambda path: path.suffix)
    assert (source.name, built) == (f"lightning_adam-{__version__}.tar.gz", wheel)
    succeed([BIN / "python", "-m", "twine", "check", "--strict", source, built])


@pytest.mark.slow
def test_wheel_contains_only_the_package_and_its_presets(wheel: Path, repository: Path) -> None:
    built = contents(wheel)
    metadata = {name for name in built if ".dist-info/" in name}
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)
    assert {name: built[name] for name in built.keys() - metadata} == dict(packaged(repository))


def packaged(repository: Path) -> Iterator[tuple[str, bytes]]:
    """The files of the repository that a wheel contains, by their paths in it."""
    package = repository / "lightning_adam"
    discovery = package / "tune" / "hydra_discovery.py"
    for path in [*package.rglob("*.py"), *package.glob("*/page/*"), package / "py.typed"]:
        # Hydra looks for this file in its own package of plugins.
        is_discovery = path == discovery
        name = path.relative_to(repository).as_posix()
        yield "hydra_plugins/lightning_adam.py" if is_discovery else name, path.read_bytes()
    for group in ("lightning_adam", "hydra"):
        for path in (repository / "conf" / group).rglob("*.yaml"):
            name = path.relative_to(repository).as_posix()
            yield f"lightning_adam/{name}", path.read_bytes()


@pytest.mark.slow
def test_linked_environment_runs_the_wheel_with_core_dependencies_only(
    linked: Path, tmp_path: Path
) -> None:
    path, lists = survey(linked, tmp_path)
    assert path.is_relative_to(linked.parent)
    assert lists == [[], [], []]


@pytest.mark.slow
def test_project_of_the_readme_runs_cold_and_errors_name_the_extras(
    linked: Path, wheel: Path, tmp_path: Path
) -> None:
    _, offline_run = follow_the_readme(tmp_path / "my project", linked)
    assert keys(logged_rows(offline_run)) == promised_keys(*PROJECT_KEYS)
    command = linked / "lightning-adam"
    printed = succeed([command, "report", offline_run], tmp_path)
    assert printed.endswith("\nreport: report.html\n")
    assert (tmp_path / "report.html").stat().st_size > 3e5
    workspace: Command = [command, "dashboard", "team/project", "--json"]
    failed = run(workspace, tmp_path, environment(linked))
    assert failed.returncode == 1
    (message,) = failed.lines
    assert message.endswith("pip install 'lightning-adam[dashboard]'")
    search: Command = [linked / "python", *TUNE[1:], MINIMIZE]
    failed = run(search, write_app(tmp_path / "my app"), environment(linked))
    assert failed.returncode == 1
    assert "pip install 'lightning-adam[tune]'" in failed.output
    assert "Traceback" not in failed.output
    link_packages(linked.parent, "dashboard", requirements(wheel))
    assert json.loads(succeed(workspace, tmp_path))["section"]


@pytest.mark.slow
def test_untouched_script_is_measured_by_the_entry_point_of_the_wheel(
    linked: Path, tmp_path: Path
) -> None:
    assert_script_is_measured(linked, tmp_path)


def assert_script_is_measured(commands: Path, folder: Path) -> None:
    """Runs a script with the environment variable of the guide."""
    script = REPOSITORY / "tests/e2e/plain_classifier.py"
    shutil.copy(script, folder / "any_lightning_script.py")
    line = shell_lines("LIGHTNING_ADAM_MONITOR=")[-1]
    training = run_text(line, folder, environment(commands), cold=True)
    assert training.returncode == 0, training.output
    (metrics,) = folder.rglob("metrics.csv")
    header = metrics.read_text(encoding="utf-8").partition("\n")[0].split(",")
    assert "adam_underflow/layer/net.1/idle_fraction" in header


@pytest.mark.nightly
def test_repository_and_source_distribution_build_the_same_wheel(
    wheel: Path, repository: Path
) -> None:
    assert contents(build(repository, "--wheel")) == contents(wheel)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", [WHEEL, EDITABLE])
def test_package_is_installed_by_pip_with_its_extras(
    kind: str, wheel: Path, repository: Path, tmp_path: Path
) -> None:
    succeed([sys.executable, "-m", "venv", tmp_path / "a venv"])
    commands = tmp_path / "a venv" / "bin"
    pip: Command = [commands / "python", "-m", "pip"]
    install: Command = [*pip, "install", "--quiet", "-c", repository / "constraints.txt"]
    what: Command = [wheel] if kind == WHEEL else ["-e", repository]
    succeed([*install, *what])
    succeed([*pip, "check"])
    path, lists = survey(commands, tmp_path)
    assert path.is_relative_to(repository) == (kind == EDITABLE)
    assert lists == [[], [], []]
    _, offline_run = follow_the_readme(tmp_path / "my project", commands)
    assert keys(logged_rows(offline_run)) == promised_keys(*PROJECT_KEYS)
    assert_script_is_measured(commands, tmp_path / "my project")

    assert succeed([commands / "lightning-adam", "report", offline_run], tmp_path)
    extras = f"{wheel if kind == WHEEL else repository}[dashboard,tune]"
    succeed([*install, *([extras] if kind == WHEEL else ["-e", extras])])
    workspace: Command = [commands / "lightning-adam", "dashboard", "team/project", "--json"]
    assert json.loads(succeed(workspace, tmp_path))["section"]
    app = write_app(tmp_path / "my app")
    words = [MINIMIZE, "hydra.sweeper.n_trials=4"]
    variables = environment(commands, TRAINED=str(app / "trained.txt"))
    tuned = run([commands / "python", *TUNE[1:], *words], app, variables)
    assert tuned.returncode == 0, tuned.output
    assert len(trained_settings(app)) == 4
    summary = (app / "multirun/adam_tune_train/tune.md").read_text(encoding="utf-8")
    assert tuned.after("overrides: ") == summary.splitlines()[-1]
