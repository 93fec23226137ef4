"""Prints which test kills each mutant.

python -m tests.mutants                      all mutants, with the tests that mirror their modules
python -m tests.mutants --only 3 17          two of them
python -m tests.mutants --all                survivors are run against all default tests as well
python -m tests.mutants --control            the same tests without a mutant; all have to pass
python -m tests.mutants --project FOLDER     another checkout, with its own package and tests

Each mutant is planted in a copy of the project. Its tests run in a process forked from one that
has imported the libraries, so that a mutant costs little more than its tests. The files run in
order, the cheapest first, until the first test fails.
"""

import argparse
import contextlib
import gc
import importlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest

from tests.mutants.mutants import MUTANTS, REDUNDANT, Mutant

PRELOADED = (
    *("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"),
    *("lightning", "torchmetrics.classification", "tensorboard"),
    *("numba", "scipy.optimize", "scipy.stats", "sqlalchemy.orm", "alembic", "yaml"),
    *("hydra", "optuna", "jinja2"),
    *("hypothesis", "xdist.plugin", "anyio.pytest_plugin"),
)
"""Libraries that take long to import. Not wandb: its import makes a folder that each process
removes when it ends."""

NOT_COPIED = (".*", "__pycache__", "outputs", "multirun", "site", "wandb", "*.egg-info")
"""Patterns of files that are not copied to the trees."""

CPU_SECONDS = {"mirrors": 300, "all": 3600}
"""The limit of a process: a mutant may make a loop endless."""

MONITOR = ("test_skipped_steps", "test_monitor", "test_precision", "test_loops", "test_resume")
BUILD = ("test_mixin", "test_schedules_properties", "test_precision", "test_finetuning")
KERNELS = ("test_closed_forms", "test_rollups", "test_metric", "test_foreign_optimizers")

MIRRORS: dict[str, tuple[str, ...]] = {
    "optim/steps": (*MONITOR, "test_mixin", "test_foreign_optimizers"),
    "_compat/lightning": ("test_precision", "test_skipped_steps", "test_mixin", "test_plateau"),
    "monitor": (
        *MONITOR,
        "test_gradients",
        "test_pending",
        "test_finding_reporter",
        "test_flight_recorder",
    ),
    "optim/mixin": ("test_skipped_steps", *BUILD, "test_schedulers", "test_resume"),
    "optim/build": (*BUILD, "test_schedulers", "test_length_of_run", "test_resume"),
    "optim/custom_scheduler": (
        "test_schedulers",
        *BUILD,
        "test_plateau",
        "test_length_of_run",
        "test_skipped_steps",
        "test_resume",
    ),
    "optim/schedulers": (
        "test_schedulers",
        *BUILD,
        "test_plateau",
        "test_length_of_run",
        "test_skipped_steps",
        "test_resume",
    ),
    "optim/hyperparameters": ("test_hyperparameters",),
    "optim/shapes": ("test_schedulers", "test_schedules_properties", "test_length_of_run"),
    "optim/length": ("test_length_of_run", "test_mixin"),
    "optim/loop": (
        "test_plateau",
        "test_finetuning",
        "test_length_of_run",
        "test_callbacks",
        "test_hyperparameters",
    ),
    "optim/param_groups": ("test_param_groups", "test_optimizers", "test_finetuning", "test_mixin"),
    "optim/optimizers": (
        "test_optimizers",
        "test_finetuning",
        "test_equivalent_forms",
        "test_parsing",
        "test_loops",
    ),
    "optim/weight_decay": ("test_weight_decay", "test_param_groups"),
    "optim/console": ("test_console", "test_optimizers", "test_mixin"),
    "config/optimizer": (
        "test_parsing",
        "test_optimizers",
        "test_param_groups",
        "test_equivalent_forms",
        "test_composition",
    ),
    "config/schedule": (
        "test_parsing",
        "test_schedulers",
        "test_mixin",
        "test_equivalent_forms",
        "test_composition",
    ),
    "config/monitor": ("test_monitor_settings", "test_environment", "test_composition"),
    "config/tune": ("test_tune_settings", "test_sweeper", "test_composition"),
    "config/parsing": (
        "test_parsing",
        "test_errors",
        "test_equivalent_forms",
        "test_optimizers",
        "test_schedulers",
        "test_monitor_settings",
    ),
    "config/errors": ("test_errors", "test_parsing", "test_override_lines", "test_environment"),
    "optim/resume": ("test_resume", "test_third_party"),
    "monitor/publishing": ("test_loggers", "test_finding_reporter"),
    "monitor/layer_table": ("test_loggers", "test_layer_table"),
    "monitor/row_log": ("test_loggers",),
    "monitor/pending": ("test_pending",),
    "monitor/gradient_processing": ("test_gradients",),
    "reports/inspection": ("test_unpickling", "test_inspect"),
    "monitor/flight_recorder": ("test_flight_recorder", "test_skipped_steps"),
    "findings/rules": ("test_rules", "test_engine", "test_planted_faults"),
    "findings": ("test_rules", "test_engine", "test_finding_reporter"),
    "findings/context": ("test_rules", "test_suggestions", "test_engine"),
    "findings/describe": ("test_engine", "test_finding_reporter"),
    "findings/spikes": ("test_spikes", "test_flight_recorder"),
    "findings/suggestions": ("test_suggestions", "test_preflight", "test_planted_faults"),
    "findings/preflight": ("test_preflight", "test_suggestions", "test_finding_reporter"),
    "monitor/finding_reporter": ("test_finding_reporter", "test_engine"),
    "monitor/run_facts": ("test_preflight", "test_finding_reporter"),
    "tune/strategy": ("test_strategy",),
    "tune/space": ("test_space", "test_strategy"),
    "tune/gaussian_process": ("test_gaussian_process", "test_strategy"),
    "tune/history": ("test_history",),
    "tune/trial_callback": ("test_trial_callback",),
    "tune/sweeper": ("test_sweeper",),
    "reports": (
        *("test_keys", "test_charts", "test_downsampling", "test_comparison"),
        *("test_summary", "test_report"),
    ),
    "reports/runs": ("test_runs", "test_tensorboard_runs", "test_events", "test_report"),
    "statistics/state_reader": (
        "test_state_reader",
        "test_numba",
        *KERNELS,
        "test_shards",
        "test_generated",
    ),
    "statistics/param_states": ("test_state_reader", "test_numba", *KERNELS),
    "statistics/histograms": ("test_histograms",),
    "statistics/names": ("test_loops",),
    "statistics/measurement": (
        "test_rollups",
        "test_shell",
        "test_metric",
        "test_state_reader",
        "test_monitor",
    ),
    "statistics/catalogue": ("test_catalogue", *KERNELS),
    "statistics/columns": ("test_catalogue", "test_inspect", *KERNELS),
    "statistics/kernels/eager": (*KERNELS, "test_shell", "test_histograms", "test_generated"),
    "statistics/kernels/numba": (
        "test_closed_forms",
        "test_numba",
        "test_metric",
        "test_generated",
    ),
    "statistics/kernels/numba_loops": (
        "test_closed_forms",
        "test_numba",
        "test_metric",
        "test_generated",
    ),
    "statistics/kernels/triton": ("test_triton",),
    "statistics/kernels/triton_columns": ("test_triton",),
    "statistics/kernels/triton_elements": ("test_triton",),
    "statistics/kernels/triton_programs": ("test_triton",),
    "statistics/kernels/triton_table": ("test_triton",),
}
"""The test files that mirror a module, or all modules of a folder, the cheapest first. Files that a
project does not have are ignored."""

COMPILED = "statistics/kernels/numba_loops"
"""The module with machine code that numba caches on disk."""


class Outcome(NamedTuple):
    """The result of a mutant."""

    killer: str
    """The first test that failed, or an empty string."""
    seconds: float
    """CPU time of the process and its children."""


def main() -> int:
    """Returns the number of mutants that survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="numbers of mutants")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="instead of the mirroring files")
    parser.add_argument("--project", type=Path, default=Path(__file__).parents[2])
    parser.add_argument("--all", action="store_true", help="all default tests for what survives")
    parser.add_argument("--control", action="store_true", help="run the tests without mutants")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default: 1)")
    parser.add_argument("-m", metavar="MARKS", help="as pytest's, instead of the project's own")
    arguments = parser.parse_args()
    numbers = arguments.only or [*range(len(MUTANTS))]
    _preload()
    with tempfile.TemporaryDirectory() as folder:
        runner = _Runner(arguments.project.resolve(), Path(folder), arguments.jobs, arguments.m)
        # A process in another session outlives this one.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        try:
            if arguments.control:
                return runner.control(numbers, arguments.tests)
            return runner.report(numbers, arguments.tests, arguments.all)
        finally:
            runner.end()


def _preload() -> None:
    # Here for all processes: torch takes the number of its threads from the environment.
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # The compiler imports most of itself at its first function.
    sys.modules["numba"].njit(lambda number: number)(1)
    # The collector of a forked process need not look at all this, and copy it.
    gc.freeze()
    assert not any(each.partition(".")[0] == "lightning_adam" for each in sys.modules)


class _Runner:
    """Plants mutants in copies of a project, one copy for each process at a time."""

    def __init__(self, project: Path, folder: Path, jobs: int, marks: str | None) -> None:
        self._folder = folder
        self._marks = marks
        self._running: set[int] = set()
        self._trees = [folder / f"tree_{number}" for number in range(jobs)]
        for tree in self._trees:
            shutil.copytree(project, tree, ignore=shutil.ignore_patterns(*NOT_COPIED))
        found = sorted(self._trees[0].glob("tests/**/test_*.py"), key=lambda path: -len(path.parts))
        # Of two files with the same name, the one that is less deep.
        self._files = {path.stem: str(path.relative_to(self._trees[0])) for path in found}

    def report(self, numbers: Sequence[int], tests: Sequence[str] | None, meets_all: bool) -> int:
        survived, seconds = [], 0.0
        for number, outcome in self._outcomes(numbers, tests, meets_all):
            mutant = MUTANTS[number]
            verdict = f"killed by {outcome.killer}" if outcome.killer else "SURVIVED"
            if not outcome.killer and number in REDUNDANT:
                verdict += " (redundant)"
            line = f"{number:3} {mutant.module}: {mutant.meaning}: {verdict}"
            _say(f"{line} ({outcome.seconds:.1f} s)")
            seconds += outcome.seconds
            survived += [] if outcome.killer else [number]
        found = len(numbers) - len(survived)
        _say(f"{found} of {len(numbers)} killed in {seconds:.0f} CPU seconds")
        _say(f"survived: {survived}")
        return len({*survived} - REDUNDANT)

    def control(self, numbers: Sequence[int], tests: Sequence[str] | None) -> int:
        files = [file for number in numbers for file in self._mirrors(MUTANTS[number].module)]
        failed = 0
        for file in dict.fromkeys(tests or files):
            outcome = self._finish(*self._start(self._trees[0], None, [file]))
            verdict = f"FAILED: {outcome.killer}" if outcome.killer else "passed"
            _say(f"{file}: {verdict} ({outcome.seconds:.1f} s)")
            failed += bool(outcome.killer)
        return failed

    def _mirrors(self, module: str) -> list[str]:
        """Returns the doctests of a module and its existing mirroring test files."""
        names = MIRRORS.get(module) or MIRRORS.get(module.rpartition("/")[0], ())
        files = [self._files[name] for name in names if name in self._files]
        return [f"lightning_adam/{module}.py", *files]

    def _outcomes(
        self, numbers: Sequence[int], tests: Sequence[str] | None, meets_all: bool
    ) -> Iterator[tuple[int, Outcome]]:
        """As many at a time as there are trees, in their order."""
        for first in range(0, len(numbers), len(self._trees)):
            together = numbers[first : first + len(self._trees)]
            selections = [tests or self._mirrors(MUTANTS[each].module) for each in together]
            outcomes = self._run_together(together, selections)
            left = [
                each for each, outcome in zip(together, outcomes, strict=True) if not outcome[0]
            ]
            if meets_all and left:
                again = dict(zip(left, self._run_together(left, [[] for _ in left]), strict=True))
                outcomes = [
                    outcome._replace(
                        killer=again[each].killer, seconds=outcome.seconds + again[each].seconds
                    )
                    if each in again
                    else outcome
                    for each, outcome in zip(together, outcomes, strict=True)
                ]
            yield from zip(together, outcomes, strict=True)

    def _run_together(
        self, numbers: Sequence[int], selections: Sequence[Sequence[str]]
    ) -> list[Outcome]:
        """Runs one mutant in each tree; an empty selection means all default tests."""
        trees = self._trees[: len(numbers)]
        sources = []
        for tree, number in zip(trees, numbers, strict=True):
            mutant = MUTANTS[number]
            file = tree / "lightning_adam" / f"{mutant.module}.py"
            sources.append((file, file.read_text(encoding="utf-8"), file.stat()))
            file.write_text(planted(mutant, sources[-1][1]), encoding="utf-8")
            # Python takes bytecode for that of a source by its size and time alone.
            os.utime(file, (number + 1, number + 1))
        begun = [
            self._start(tree, MUTANTS[number], files)
            for tree, number, files in zip(trees, numbers, selections, strict=True)
        ]
        outcomes = [self._finish(*each) for each in begun]
        for file, source, stat in sources:
            file.write_text(source, encoding="utf-8")
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        return outcomes

    def _start(self, tree: Path, mutant: Mutant | None, files: Sequence[str]) -> tuple[int, Path]:
        """Forks a process that runs tests; returns its ID and its output folder."""
        scratch = Path(tempfile.mkdtemp(dir=self._folder))
        # Machine code of unchanged modules is compiled once for each tree.
        is_compiled = mutant is not None and mutant.module == COMPILED
        cache = scratch / "numba" if is_compiled else tree.with_name(f"{tree.name}_numba")
        options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", "--tb=short"]
        options += [f"--basetemp={scratch / 'tests'}", *([] if self._marks is None else ["-m"])]
        options += [] if self._marks is None else [self._marks]
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            seconds = CPU_SECONDS["mirrors" if files else "all"]
            _test(tree, scratch, cache, seconds, [*options, *files])
        self._running.add(process)
        return process, scratch

    def end(self) -> None:
        """Kills all running processes and their children."""
        for process in self._running:
            os.killpg(process, signal.SIGKILL)

    def _finish(self, process: int, scratch: Path) -> Outcome:
        _, status, usage = os.wait4(process, 0)
        self._running.remove(process)
        killer = (scratch / "killer").read_text() if (scratch / "killer").exists() else ""
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            killer = killer or f"signal {-code}"
        elif code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            killer = (
                killer or f"pytest's exit code {code}: {(scratch / 'output').read_text()[-300:]}"
            )
        shutil.rmtree(scratch, ignore_errors=True)
        return Outcome(killer, usage.ru_utime + usage.ru_stime)


def planted(mutant: Mutant, source: str) -> str:
    """Returns the module with the fault in it.

    Raises:
        ValueError: If the text does not occur once.
    """
    if source.count(mutant.text) != 1:
        occurs = f"occurs {source.count(mutant.text)} times in {mutant.module}"
        raise ValueError(f"{mutant.meaning}: its text {occurs}")
    return source.replace(mutant.text, mutant.replacement)


class _Watch:
    """Records the first test that fails, or the first file that cannot be collected."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self._file.exists():
            self._file.write_text(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self._file.exists():
            self._file.write_text(f"the collection of {report.nodeid}")


def _test(tree: Path, scratch: Path, cache: Path, seconds: int, options: list[str]) -> NoReturn:
    """Runs the tests of a copy in this process, and exits."""
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        output = os.open(scratch / "output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(tree)
        own = {
            "PYTHONPATH": str(tree),
            "NUMBA_CACHE_DIR": str(cache),
            "HYPOTHESIS_STORAGE_DIRECTORY": str(scratch / "hypothesis"),
        }
        os.environ.update(own)
        sys.modules["numba"].config.CACHE_DIR = str(cache)
        # Bytecode of the copy is cached, regardless of the environment.
        sys.dont_write_bytecode = False
        # No other tree, be it this one or one that is installed.
        sys.path[:] = [str(tree), *(each for each in sys.path if not _is_tree(Path(each)))]
        for name in [each for each in sys.modules if each.partition(".")[0] == "tests"]:
            del sys.modules[name]
        # Processes that the tests spawn import the main module.
        sys.modules["__main__"] = types.ModuleType("__main__")
        sys.argv = ["pytest", *options]
        code = pytest.main(options, plugins=[_Watch(scratch / "killer")])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _is_tree(folder: Path) -> bool:
    return (folder / "lightning_adam" / "__init__.py").exists()


if __name__ == "__main__":
    code = main()
    # Without cleanup: libraries would warn about objects that the garbage collector ignores.
    os._exit(min(code, 1))
