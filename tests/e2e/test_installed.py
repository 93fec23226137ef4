"""What is built installs into a fresh environment, and the README's project runs there."""

import json
import shutil
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

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
    succeed,
)
from tests.support.tuning_app import MINIMIZE, TUNE, trained_settings, write_app

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

WHEEL, EDITABLE = "wheel", "editable"
PRESETS = ("conf/lightning_adam", "conf/hydra")
DISCOVERY = "lightning_adam/hydra_plugin/discovery.py"
"""It stands where Hydra looks for it, and only there."""
NOT_NEEDED = ("hypothesis", "mlxtend", "optuna", "pytest", "scipy", "tensorboard")
HEAVY = ("lightning", "pytorch_lightning", "torch")
LOADED_BY_EVERY_HYDRA_APP = (
    "lightning_adam",
    "lightning_adam.schema",
    "lightning_adam.hydra_plugin",
    "hydra_plugins.lightning_adam",
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of all that is or can be committed, in a folder with a space."""
    copy = tmp_path_factory.mktemp("installed") / "a copy"
    listed = succeed(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"])
    for name in filter(None, listed.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(repository: Path) -> Path:
    """The wheel as it is built from the repository."""
    return build(repository, "--wheel")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an empty virtual environment, in a folder with a space."""
    folder = tmp_path_factory.mktemp("environment") / "a venv"
    succeed([sys.executable, "-m", "venv", folder])
    return folder / "bin"


@pytest.fixture(scope="module", params=[WHEEL, EDITABLE])
def installed(request: pytest.FixtureRequest, fresh: Path, wheel: Path, repository: Path) -> Path:
    """The commands of an environment that holds the package as the parameter says."""
    pip: Command = [fresh / "python", "-m", "pip"]
    what: Command = [wheel] if request.param == WHEEL else ["-e", repository]
    succeed([*pip, "uninstall", "--yes", "lightning-adam"])
    succeed([*pip, "install", "--quiet", "-c", repository / "constraints.txt", *what])
    return fresh


def build(repository: Path, *arguments: str) -> Path:
    """The wheel that `python -m build` makes."""
    target = repository.parent / "-".join(["dist", *arguments])
    succeed([BIN / "python", "-m", "build", *arguments, "--outdir", target, repository])
    (built,) = target.glob("*.whl")
    return built


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel, without the one that lists the others."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: archive.read(name)
            for name in archive.namelist()
            if not name.endswith(".dist-info/RECORD")
        }


def evaluate(installed: Path, folder: Path, expression: str, *modules: str) -> object:
    """What an expression over these modules gives in that environment."""
    lines = [f"import {', '.join(('json', *modules))}", f"print(json.dumps({expression}))"]
    printed = succeed([installed / "python", "-c", "\n".join(lines)], folder)
    value: object = json.loads(printed)
    return value


def test_the_wheel_holds_the_package_its_presets_and_nothing_else(
    wheel: Path, repository: Path
) -> None:
    presets = [path for folder in PRESETS for path in (repository / folder).rglob("*.yaml")]
    sources = (repository / "lightning_adam").rglob("*.py")
    page = (repository / "lightning_adam").glob("*/page/*")
    expected = {f"lightning_adam/{path}" for path in relative(presets, repository)}
    expected |= relative(sources, repository) - {DISCOVERY}
    expected |= relative(page, repository)
    expected |= {"hydra_plugins/lightning_adam.py", "lightning_adam/py.typed"}
    files = contents(wheel)
    assert {name for name in files if ".dist-info/" not in name} == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in files)


def relative(paths: Iterable[Path], folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in paths}


def test_the_sdist_builds_the_same_wheel(wheel: Path, repository: Path) -> None:
    assert contents(build(repository)) == contents(wheel)


def test_the_environment_is_consistent_and_holds_core_dependencies_only(
    installed: Path, tmp_path: Path
) -> None:
    succeed([installed / "python", "-m", "pip", "check"], tmp_path)
    find = f"[name for name in {NOT_NEEDED} if importlib.util.find_spec(name)]"
    assert evaluate(installed, tmp_path, find, "importlib.util") == []


def test_the_package_comes_from_where_it_was_installed(
    installed: Path, repository: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    home = evaluate(installed, tmp_path, "lightning_adam.__file__", "lightning_adam")
    editable = Path(str(home)).is_relative_to(repository)
    assert editable == (request.node.callspec.params["installed"] == EDITABLE)


@pytest.mark.parametrize("module", LOADED_BY_EVERY_HYDRA_APP)
def test_what_every_hydra_app_loads_imports_neither_torch_nor_lightning(
    module: str, installed: Path, tmp_path: Path
) -> None:
    loaded = f"[name for name in {HEAVY} if name in sys.modules]"
    assert evaluate(installed, tmp_path, loaded, "sys", module) == []


def test_every_public_name_can_be_imported(installed: Path, tmp_path: Path) -> None:
    missing = "[name for name in lightning_adam.__all__ if not hasattr(lightning_adam, name)]"
    assert evaluate(installed, tmp_path, missing, "lightning_adam") == []


def test_the_project_of_the_readme_runs_in_an_unrelated_folder(
    installed: Path, tmp_path: Path
) -> None:
    _, offline_run = follow_the_readme(tmp_path / "my project", installed)
    assert keys(logged_rows(offline_run)) == promised_keys(*PROJECT_KEYS)


def test_a_script_that_is_not_touched_is_measured(installed: Path, tmp_path: Path) -> None:
    """By an entry point, which installing has to write down."""
    script = REPOSITORY / "tests" / "e2e" / "plain_classifier.py"
    variables = environment(installed) | {"LIGHTNING_ADAM_MONITOR": "1"}
    trained = run([installed / "python", script], tmp_path, variables)
    assert trained.returncode == 0, trained.output
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert "adam_update/update_norm" in metrics.read_text(encoding="utf-8")


@pytest.mark.parametrize("installed", [WHEEL], indirect=True, scope="module")
def test_the_report_and_the_workspace_need_an_extra_and_say_so(
    installed: Path, repository: Path, tmp_path: Path
) -> None:
    _, offline_run = follow_the_readme(tmp_path / "my project", installed)
    command = installed / "lightning-adam"
    report_of: Command = [command, "report", offline_run]
    spec_of: Command = [command, "dashboard", "team/project", "--json"]
    for line in (report_of, spec_of):
        refused = run(line, tmp_path)
        assert refused.returncode == 1
        (said,) = refused.lines
        assert said.endswith("pip install 'lightning-adam[dashboard]'")
    pip: Command = [installed / "python", "-m", "pip"]
    extra = f"{repository}[dashboard]"
    succeed([*pip, "install", "--quiet", "-c", repository / "constraints.txt", extra])
    assert succeed(report_of, tmp_path) == "report: report.html\n"
    assert (tmp_path / "report.html").stat().st_size > 1e6
    assert json.loads(succeed(spec_of, tmp_path))["section"]
    succeed([*pip, "uninstall", "--quiet", "--yes", "plotly", "wandb-workspaces"])


@pytest.mark.parametrize("installed", [WHEEL], indirect=True, scope="module")
def test_tuning_needs_an_extra_and_says_so(
    installed: Path, repository: Path, tmp_path: Path
) -> None:
    folder = write_app(tmp_path / "my app")
    words = [MINIMIZE, "hydra.sweeper.n_trials=4", "hydra.sweeper.n_seeds=1"]
    command: Command = [installed / "python", *TUNE[1:], *words]
    variables = environment(installed, TRAINED=str(folder / "trained.txt"))
    refused = run(command, folder, variables)
    assert refused.returncode == 1
    assert "Traceback" not in refused.output
    assert "pip install 'lightning-adam[tune]'" in refused.output
    pip: Command = [installed / "python", "-m", "pip"]
    extra = f"{repository}[tune]"
    succeed([*pip, "install", "--quiet", "-c", repository / "constraints.txt", extra])
    tuned = run(command, folder, variables)
    assert tuned.returncode == 0, tuned.output
    assert len(trained_settings(folder)) == 4
    line = (folder / "multirun/adam_tune_train/tune.md").read_text().splitlines()[-1]
    assert tuned.after("type: ") == line
    succeed([*pip, "uninstall", "--quiet", "--yes", "optuna", "scipy"])
