"""Runs commands like a user: in a shell, in the README's project, and reads the W&B runs."""

import functools
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_adam.reports.keys import PERCENTILE_KEYS
from lightning_adam.statistics.catalogue import select
from tests.support import forkserver
from tests.support.documentation import CONFIG, TRAIN, TRAIN_LINE, named_files, shell_lines
from tests.support.documentation import REPOSITORY as REPOSITORY

BIN = Path(sys.executable).parent
"""Folder of the commands in the environment of the tests."""

GLOBAL_STEP = "trainer/global_step"
MODEL = ""
DECAY = "/group/decay"
NO_DECAY = "/group/no_decay"

NON_SCALAR_PREFIXES = (
    "adam_histogram/",
    "adam_underflow/eps_curve",
    "adam_layers",
    "adam_findings",
)
"""Prefixes of the keys of histograms, curves and tables."""

BRIEFLY = ("width=2", "trainer.max_epochs=1", "trainer.limit_train_batches=25")
"""Overrides for a short run, slightly longer than the recipe's warm-up."""
PROJECT_KEYS = (10 * 3072 // 32, 10)
"""Optimizer steps and `every_n_steps` of the README's run, which determine its keys."""
DEMO_KEYS = (8 * 63, 10, 20)
"""The same for `make demo`, with `histograms_every_n_steps`."""
BRIEF_KEYS = (25, 10, 20)
"""The same for a short run."""

Command = Sequence[str | Path]
ASSIGNED = re.compile(r"[A-Za-z_]\w*=")
"""An environment variable before a command."""

TEST_VARIABLES = ("WANDB_", "HYDRA_", "PYTEST_", "PYTHONPATH", "NETRC", "LIGHTNING_ADAM_")
"""Variables of the tests that a user's environment does not have."""


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    returncode: int
    output: str
    """stdout and stderr, including text that a progress bar overwrites in a terminal."""

    @property
    def lines(self) -> list[str]:
        return [line.strip() for line in re.split(r"[\r\n]+", self.output) if line.strip()]

    def after(self, beginning: str) -> str:
        """Returns the rest of the only line with that prefix."""
        (found,) = {line for line in self.lines if line.startswith(beginning)}
        return found.removeprefix(beginning)


def environment(bin_folder: Path = BIN, /, **changes: str) -> dict[str, str]:
    """Returns a user's environment, with the commands of `bin_folder` first on the path."""
    own = os.environ.items()
    kept = {name: value for name, value in own if not name.startswith(TEST_VARIABLES)}
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    # Where W&B keeps a copy of each table of an offline run.
    staging = {"WANDB_DATA_DIR": tempfile.gettempdir()}
    return kept | {"PATH": path, "OMP_NUM_THREADS": "1"} | staging | changes


def run(
    command: Command,
    folder: Path = REPOSITORY,
    variables: Mapping[str, str] | None = None,
    *,
    cold: bool = False,
) -> Finished:
    """Runs a command in a folder, without input.

    Args:
        command: The words of the command.
        folder: The folder in which it starts.
        variables: Its whole environment; by default that of a user.
        cold: Whether Python starts as it does for a user. By default a Python program of the
            tests' own environment is forked from a process that has imported the libraries,
            which takes a fraction of the time.
    """
    words = [str(word) for word in command]
    variables = environment() if variables is None else variables
    program = None if cold else python_program(words, variables)
    with tempfile.TemporaryDirectory() as kept:
        output = Path(kept, "output.txt")
        if program:
            process = forkserver.start(*program, folder, variables, output)
            try:
                process.join()
            finally:
                process.kill()
            return Finished(process.exitcode or 0, output.read_text(encoding="utf-8"))
        with output.open("wb") as file:
            finished = subprocess.run(
                words,
                cwd=folder,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
        return Finished(finished.returncode, output.read_text(encoding="utf-8"))


def python_program(
    words: Sequence[str], variables: Mapping[str, str]
) -> tuple[str, Sequence[str]] | None:
    """Returns the program and its arguments; None if the fork server cannot start it."""
    found = shutil.which(words[0], path=variables.get("PATH", ""))
    # PYTHONPATH may contain other versions of the libraries that the server has imported.
    if found is None or Path(found).parent != BIN or "PYTHONPATH" in variables:
        return None
    if Path(found).name.startswith("python"):
        if len(words) > 2 and words[1] == "-m":
            return words[2], words[3:]
        if len(words) > 1 and words[1].endswith(".py"):
            return words[1], words[2:]
        return None
    return (words[0], words[1:]) if words[0] == "lightning-adam" else None


def run_text(
    text: str,
    folder: Path,
    variables: Mapping[str, str] | None = None,
    *,
    cold: bool = False,
) -> Finished:
    """Runs a block of shell text, as it would be pasted."""
    variables = environment() if variables is None else variables
    words = None if cold else plain_words(text)
    if words:
        names = dict(word.split("=", 1) for word in itertools.takewhile(ASSIGNED.match, words))
        command = words[len(names) :]
        if command and python_program(command, {**variables, **names}):
            return run(command, folder, {**variables, **names})
    return run(["bash", "-e", "-c", text], folder, variables)


def plain_words(text: str) -> list[str] | None:
    """Returns the words of a line without shell syntax; None for other lines."""
    unquoted = re.sub(r"'[^']*'|\"[^\"$`]*\"", "", text.strip())
    return None if re.search(r"[\n\\$`*?~#|&;<>(){}\[\]\"']", unquoted) else shlex.split(text)


def succeed(command: Command, folder: Path = REPOSITORY, *, cold: bool = False) -> str:
    """Runs a command that must succeed, and returns its output."""
    finished = run(command, folder, cold=cold)
    if finished.returncode:
        raise AssertionError(f"{shlex.join(map(str, command))}\n{finished.output}")
    return finished.output


def follow_the_readme(folder: Path, bin_folder: Path = BIN) -> tuple[Finished, Path]:
    """Follows the README's section "In your project" in a folder.

    Returns:
        The training and the only W&B run that it left.
    """
    write_the_project(folder)
    # The README shows the output without a GPU.
    variables = environment(bin_folder, CUDA_VISIBLE_DEVICES="")
    (line,) = shell_lines(re.escape(TRAIN_LINE))
    training = run_text(line, folder, variables)
    assert training.returncode == 0, training.output
    (offline_run,) = offline_runs(folder)
    return training, offline_run


def write_the_project(folder: Path) -> None:
    """Writes the files of the README to the paths in their first lines."""
    write_files(folder, named_files(TRAIN, CONFIG))


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Writes texts into a folder, by their paths."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def recipe(folder: Path, *overrides: str, variables: Mapping[str, str] | None = None) -> Finished:
    """Returns the command of a recipe from the repository's root, with its jobs in a folder."""
    command: Command = [BIN / "python", "-m", "recipes.mnist", *overrides, *jobs_in(folder)]
    return run(command, REPOSITORY, variables)


def jobs_in(folder: Path) -> list[str]:
    """Overrides that put the job, or the jobs of a sweep, in a folder."""
    return [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}"]


def offline_runs(folder: Path) -> list[Path]:
    """Returns the W&B runs that were left under a folder, the oldest first."""
    return sorted(path for path in folder.rglob("offline-run-*") if path.is_dir())


@functools.cache
def records(offline_run: Path) -> list[dict[str, Any]]:
    """Returns the records of a finished W&B run, from W&B's reader."""
    printed = succeed(["wandb", "leet", "inspect", "--json", offline_run])
    return [json.loads(line) for line in printed.splitlines()]


def run_config(offline_run: Path) -> dict[str, Any]:
    """Returns the part of a W&B run's config from this package."""
    updates = [entry["config"]["update"] for entry in records(offline_run) if "config" in entry]
    (ours,) = (update["lightning_adam"] for update in updates if "lightning_adam" in update)
    return dict(ours)


def history(offline_run: Path) -> list[dict[str, Any]]:
    """Returns the rows of a W&B run's history."""
    return [entry["history"]["item"] for entry in records(offline_run) if "history" in entry]


def logged_rows(offline_run: Path) -> dict[int, dict[str, float]]:
    """Returns this package's keys in a W&B run's history, by step."""
    return our_rows(history(offline_run), GLOBAL_STEP)


def our_rows(rows: Iterable[Mapping[str, Any]], step_key: str) -> dict[int, dict[str, float]]:
    """Returns this package's scalars in a W&B run's history, by step, without empty rows."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        ours = {
            key: float(value)
            for key, value in row.items()
            if key.startswith("adam_") and not key.startswith(NON_SCALAR_PREFIXES)
        }
        if ours:
            found.setdefault(int(row[step_key]), {}).update(ours)
    return found


def keys(rows: Mapping[int, Iterable[str]]) -> dict[int, list[str]]:
    """Returns the keys that were logged at each step."""
    return {step: sorted(row) for step, row in rows.items()}


def promised_keys(
    steps: int, every_n_steps: int, histograms_every_n_steps: int | None = None
) -> dict[int, list[str]]:
    """Returns the keys that a run without clipping has to log, by step."""
    logged: dict[int, set[str]] = {}
    for step in (1, *range(every_n_steps, steps + 1, every_n_steps)):
        undefined = {*CLIPPING, *(["grad_momentum_cosine"] if step == 1 else [])}
        logged[step - 1] = {each.key for each in select(["headline"]) if each.name not in undefined}
    every = histograms_every_n_steps
    for step in (1, *range(every, steps + 1, every)) if every else ():
        for key in itertools.chain(*PERCENTILE_KEYS.values()):
            family, _, name = key.partition("/")
            groups = {f"{family}/group/{group}/{name}" for group in ("decay", "no_decay")}
            logged.setdefault(step - 1, set()).update({key, *groups})
    return {step: sorted(found) for step, found in sorted(logged.items())}


CLIPPING = {"grad_norm_before_clip", "clip_coefficient"}
"""Statistics that are logged where the Trainer clips."""
