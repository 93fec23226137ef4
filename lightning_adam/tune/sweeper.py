"""The search as a Hydra sweeper: composes the configs of the runs, launches and reports them."""

import logging
import os
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict
from tqdm.auto import tqdm

from lightning_adam.config.errors import ConfigError, format_value
from lightning_adam.config.tune import PATH, TuneConfig, parse_tune
from lightning_adam.config.variables import STORAGE_VARIABLE, TRIAL_VARIABLE
from lightning_adam.tune.configuration import (
    Configuration,
    find_paths,
    read_configuration,
)
from lightning_adam.tune.history import JOURNAL, History
from lightning_adam.tune.job import Job, NoMetricError, Trial, format_error, to_metric
from lightning_adam.tune.report import Report, write_report
from lightning_adam.tune.runs import Outcome, Request, Run
from lightning_adam.tune.strategy import Strategy

log = logging.getLogger(__name__)

MAX_FAILURES = 5
"""Number of runs after which the search stops if all of them have failed."""
POLL_SECONDS = 1.0


class AdamSweep:
    """The implementation of `hydra/sweeper=adam_tune`.

    Args:
        settings: The fields of its `TuneConfig`.
        hydra_context: Hydra's context, which composes configs.
        task_function: The app's function.
        config: The app's config, including Hydra's.

    Raises:
        ConfigError: If a setting is invalid.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        hydra_context: HydraContext,
        task_function: Callable[[DictConfig], Any],
        config: DictConfig,
    ) -> None:
        self.settings: TuneConfig = parse_tune(settings).config
        self.folder = sweep_folder(config, self.settings.study_name)
        self._storage = _storage(self.settings.storage, self.folder)
        # Not in the configs of the jobs, which are saved: it may contain a password.
        os.environ[STORAGE_VARIABLE] = self._storage
        with open_dict(config):
            # Launchers read the folder from here; the overrides of a job set its own.
            config.hydra.sweep.dir = str(self.folder)
            config.hydra.sweeper.storage = None
            config.hydra.overrides.hydra = [
                each
                for each in config.hydra.overrides.hydra
                if not each.lstrip("+").startswith(f"{PATH}.storage=")
            ]
        self._config = config
        self._loader = hydra_context.config_loader
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=Job(task_function), config=config
        )
        self._owner = uuid.uuid4().hex
        self._running: list[int] = []

    def sweep(self, arguments: Sequence[str]) -> Configuration:
        """Runs the search, or resumes it.

        Args:
            arguments: The overrides of the app.

        Returns:
            The best configuration.

        Raises:
            ConfigError: If the app has no Adam to tune, or an override sweeps over several values.
        """
        _check_single(arguments)
        app = self._loader.load_sweep_config(self._config, list(arguments))
        self._seed, self._seed_key = _seed(app, self.settings)
        with open_dict(app):
            del app["hydra"]
        self._arguments = list(arguments)
        self._paths = find_paths(app, self.settings.optimizer)
        self._start = read_configuration(app, self._paths)
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self._config, self.folder / "multirun.yaml")
        direction = str(self.settings.direction)
        self._strategy = Strategy(
            self._start,
            self.settings.n_trials,
            self.settings.space,
            sign=1.0 if direction == "minimize" else -1.0,
            seed=self.settings.sampler_seed,
        )
        self._history = History(self._storage, self.settings.study_name, direction)
        self._history.check_identity(
            {f"{PATH}.direction": direction, **_flat(app)}, _shown(self.folder)
        )
        known = len(self._history.runs())
        log.info(
            f"adam_tune: the search {self.settings.study_name}"
            f" {f'resumes after {known} runs' if known else 'starts'}, with a budget of"
            f" {self.settings.n_trials} full runs; {_shown(self.folder)}"
        )
        try:
            with self._history.keep_alive(self._owner, self._running), _bar(self.settings) as bar:
                report = self._report(bar)
                while batch := self._next_batch():
                    self._launch(batch)
                    report = self._report(bar)
                # Another process may have trained the last runs.
                report = self._report(bar)
        except KeyboardInterrupt:
            raise SystemExit("adam_tune: interrupted; run the same command to resume") from None
        if not any(each.outcome is Outcome.complete for each in report.runs):
            raise ConfigError(
                f"None of {len(report.runs)} runs returned a finite metric",
                f"See {shlex.quote(_shown(self.folder))}/tune.md for the reasons",
            )
        print("\n".join(["", *report.summary_lines(_shown(self.folder))]), flush=True)  # noqa: T201
        return report.decision.chosen

    def _next_batch(self) -> list[Run]:
        """Returns the next runs, at most `n_jobs`; empty if the search is over.

        Waits for runs of other processes if the next request depends on them.
        """
        while True:
            self._history.reap_stale()
            batch: list[Run] = []
            while len(batch) < self.settings.n_jobs:
                runs = self._history.runs()
                _check_failures(runs)
                request = self._strategy.next_request(runs)
                # A run that was lost runs alone, because another run may have been the cause.
                if request is None or (request.attempt > 1 and batch):
                    break
                run = self._start_run(request, runs)
                if run is not None:
                    batch.append(run)
                if request.attempt > 1:
                    break
            if batch or all(each.outcome is not Outcome.running for each in runs):
                return batch
            time.sleep(POLL_SECONDS)

    def _start_run(self, request: Request, runs: Sequence[Run]) -> Run | None:
        """Adds a run to the history; returns None if another process has just added it."""
        space = self._strategy.space_of(runs)
        params, distributions = space.params(request.configuration, request.length)
        seed = None if self._seed is None else self._seed + request.replicate
        number = self._history.begin(request, self._owner, seed, params, distributions)
        if number is None:
            return None
        self._running.append(number)
        return Run(request, number, Outcome.running, seed=seed)

    def _launch(self, batch: Sequence[Run]) -> None:
        """Runs a batch. An error of a run ends that run, and the search continues."""
        overrides = [self._overrides(each) for each in batch]
        for each in overrides:
            # An error of composition ends the search, because it is not specific to a run.
            self._loader.load_sweep_config(self._config, each)
        try:
            results: Sequence[JobReturn] = self._launcher.launch(
                overrides, initial_job_idx=batch[0].number
            )
        except Exception as error:
            reason = format_error(error)
            log.warning(f"adam_tune: the launcher lost a batch ({reason})")
            self._requeue([each.number for each in batch], reason)
            return
        for run, result in zip(batch, results, strict=True):
            self._running.remove(run.number)
            # Jobs usually record their own results; then this changes nothing.
            if result.status is JobStatus.COMPLETED:
                self._history.finish(run.number, to_metric(result.return_value))
                continue
            raised = result._return_value
            reason = format_error(raised) if isinstance(raised, BaseException) else "it did not end"
            self._history.fail(run.number, reason)
            if isinstance(raised, NoMetricError):
                raise raised
            log.warning(f"adam_tune: run {run.number} failed, {reason}")

    def _requeue(self, numbers: Sequence[int], reason: str) -> None:
        """Waits until runs that the launcher has lost have ended or are dead."""
        for number in numbers:
            self._running.remove(number)
        while any(self._history.is_running(each) for each in numbers):
            self._history.reap_stale(numbers, reason)
            time.sleep(POLL_SECONDS / 10)

    def _overrides(self, run: Run) -> list[str]:
        """Returns the overrides of a run: the user's, its hyperparameters, and its identity."""
        request = run.request
        hyperparameters = {
            name: getattr(request.configuration, name)
            for name in ("lr", "betas", "eps", "weight_decay")
            if getattr(request.configuration, name) is not None
        }
        seed = [] if run.seed is None else [f"{self._seed_key}={run.seed}"]
        own = [
            *self._paths.overrides(self._start, request.configuration),
            *seed,
            f"hydra.sweep.dir={format_value(str(self.folder))}",
            f"hydra.sweep.subdir={request.stage.value}/{run.number}",
            # The app's config may set the storage, and each run saves its config.
            f"{PATH}.storage=null",
        ]
        trial = Trial(
            study_name=self.settings.study_name,
            direction=str(self.settings.direction),
            stage=request.stage.value,
            number=run.number,
            length=request.length,
            hyperparameters=hyperparameters,
            overrides=own,
        )
        return [*self._arguments, *own, _variable(trial)]

    def _report(self, bar: "tqdm[Any]") -> Report:
        """Writes the report, and updates the progress bar."""
        runs = self._history.runs()
        decision = self._strategy.decide(runs)
        report = Report(
            settings=self.settings,
            runs=[each for each in runs if not each.is_retried],
            strategy=self._strategy,
            decision=decision,
            paths=self._paths,
            arguments=[each for each in self._arguments if not _is_of_hydra(each)],
            is_seeded=self._seed is not None,
        )
        write_report(report, self.folder)
        used = sum(
            each.request.length for each in report.runs if each.outcome is not Outcome.running
        )
        bar.n = round(used, 2)
        if used:
            stage = runs[-1].request.stage.value
            bar.set_description(f"{stage}: {report.best_value()}", refresh=False)
        bar.refresh()
        return report


class OtherRank:
    """`hydra/sweeper=adam_tune` in a process that Lightning starts for another rank of a run.

    Lightning starts the other ranks of a run with the command of the main process, which is that of
    the search. Such a process trains its rank of the run, and ends.

    Args:
        trial: The run.
        hydra_context: Hydra's context, which composes configs.
        task_function: The app's function.
        config: The app's config, including Hydra's.
    """

    def __init__(
        self,
        trial: Trial,
        hydra_context: HydraContext,
        task_function: Callable[[DictConfig], Any],
        config: DictConfig,
    ) -> None:
        self._trial = trial
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=Job(task_function), config=config
        )

    def sweep(self, arguments: Sequence[str]) -> None:
        """Trains the run. An error is only logged, as Lightning would kill the search for it."""
        number = self._trial.number
        overrides = [*arguments, *self._trial.overrides, _variable(self._trial)]
        (result,) = self._launcher.launch([overrides], initial_job_idx=number)
        if result.status is not JobStatus.COMPLETED:
            reason = format_error(cast(BaseException, result._return_value))
            log.warning(f"adam_tune: run {number} failed in one of its processes, {reason}")


def sweep_folder(config: DictConfig, study_name: str) -> Path:
    """Returns the folder of a search: `hydra.sweep.dir` with a name instead of a time.

    Args:
        config: Hydra's config.
        study_name: The end of the folder's name.

    Example:
        >>> config = {"hydra": {"sweep": {"dir": "multirun/${now:%Y-%m-%d}/${now:%H-%M-%S}"}}}
        >>> sweep_folder(OmegaConf.create(config), "mnist").parts[-2:]
        ('multirun', 'adam_tune_mnist')
    """
    node = config.hydra.sweep
    raw = OmegaConf.to_container(node, resolve=False)["dir"]  # type: ignore[index,call-overload]
    fixed, separator, _ = str(raw).partition("${now:")
    if not separator:
        return Path(str(node.dir)).absolute()
    # `runs/at_${now:...}` is cut before `at_`.
    parent = fixed.rpartition("/")[0] or "."
    with open_dict(config):
        node.dir = f"{parent}/adam_tune_{study_name}"
    return Path(str(node.dir)).absolute()


def _variable(trial: Trial) -> str:
    """Returns the override that passes the run to its job."""
    return f"hydra.job.env_set.{TRIAL_VARIABLE}={format_value(trial.as_variable())}"


def _storage(given: str | None, folder: Path) -> str:
    if given is None:
        return f"{JOURNAL}{folder / 'trials.journal'}"
    scheme, _, path = given.partition(":///")
    if path and scheme.startswith("sqlite") and not path.startswith("/"):
        # A job may change its working directory.
        return f"{scheme}:///{Path.cwd() / path}"
    return given


def _check_single(arguments: Sequence[str]) -> None:
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        if override.is_sweep_override():
            key = override.get_key_element()
            raise ConfigError(
                f"{override.input_line} must be one value: adam_tune searches Adam's"
                " hyperparameters only",
                f"Use one value for {key}, or run one search for each, with another"
                f" {PATH}.study_name",
            )


def _check_failures(runs: Sequence[Run]) -> None:
    over = [each for each in runs if each.outcome is not Outcome.running]
    crashed = [each for each in over if each.error and not each.error.startswith("diverged")]
    if len(over) == len(crashed) >= MAX_FAILURES:
        raise ConfigError(
            f"All of the first {len(crashed)} runs failed, the last one with"
            f" {crashed[-1].error.rstrip('.')}",
            "Run the app once without -m, then the search with hydra/launcher=basic",
        )


def _is_of_hydra(argument: str) -> bool:
    """Returns whether an override is of Hydra's own config."""
    (override,) = OverridesParser.create().parse_overrides([argument])
    return (override.package or "").startswith("hydra.")


def _seed(app: DictConfig, settings: TuneConfig) -> tuple[int | None, str]:
    """Returns the seed of the first replicate and its key; None if the app has no seed."""
    key = settings.seed_key
    base = OmegaConf.select(app, key)
    if isinstance(base, int) and not isinstance(base, bool):
        return base, key
    parent = OmegaConf.select(app, key.rpartition(".")[0]) if "." in key else app
    if base is None and isinstance(parent, DictConfig) and key.rpartition(".")[2] in parent:
        # Apps ask `if cfg.seed:`, so it is not 0.
        return 1, key
    if key != "seed":
        raise ConfigError(
            f"{PATH}.seed_key={key} must be a key of the app's config with an integer, not"
            f" {format_value(base)}",
            f"Use the key of the seed, for example {PATH}.seed_key=seed",
        )
    log.warning(
        "adam_tune: the app's config has no `seed`, so the runs are not seeded. Set"
        f" {PATH}.seed_key=KEY if the seed has another key"
    )
    return None, key


def _flat(config: DictConfig) -> dict[str, str]:
    """Returns the values of the app's config as text, by their paths."""

    def leaves(node: object, path: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, Mapping) and node:
            for name, each in node.items():
                yield from leaves(each, f"{path}.{name}" if path else str(name))
        else:
            yield path, format_value(node)

    return dict(leaves(OmegaConf.to_container(config, resolve=False, enum_to_str=True), ""))


def _bar(settings: TuneConfig) -> "tqdm[Any]":
    return tqdm(total=settings.n_trials, unit="run", file=sys.stderr, dynamic_ncols=True)


def _shown(path: Path) -> str:
    """Returns a path relative to the working directory, if it is below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
