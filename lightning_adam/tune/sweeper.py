"""The search as a Hydra sweeper: composes the app's config, launches batches, writes the story."""

import logging
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict
from tqdm.auto import tqdm

from lightning_adam.config.errors import ConfigError, format_value
from lightning_adam.config.tune import PATH
from lightning_adam.config.variables import TRIAL_VARIABLE
from lightning_adam.tune.alive import Heart
from lightning_adam.tune.archive import JOURNAL, Archive
from lightning_adam.tune.job import Identity, Job, NoMetricError, as_metric, in_one_line
from lightning_adam.tune.plan import Plan, read_plan
from lightning_adam.tune.point import Point, find_places, read_point
from lightning_adam.tune.report import write_story
from lightning_adam.tune.search import Begun, Search
from lightning_adam.tune.story import Outcome, Story
from lightning_adam.tune.wording import AS_CONFIGURED, line_to_type

log = logging.getLogger(__name__)


class StagedSweep:
    """What `hydra/sweeper=adam_tune` does.

    Args:
        settings: The fields of its config, a `TuneConfig`.
        hydra_context: How configs are composed.
        task_function: The app's function.
        config: The app's config, with Hydra's own.

    Raises:
        ConfigError: If a setting cannot work.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        hydra_context: HydraContext,
        task_function: Callable[[DictConfig], Any],
        config: DictConfig,
    ) -> None:
        self.plan = read_plan(settings)
        self.folder = sweep_folder(config, self.plan.study_name)
        with open_dict(config):
            # The launchers and the jobs take it from here; a job's own comes with its overrides.
            config.hydra.sweep.dir = str(self.folder)
        self._config = config
        self._loader = hydra_context.config_loader
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=Job(task_function), config=config
        )

    def sweep(self, arguments: Sequence[str]) -> Point:
        """Runs the search, or what is left of it.

        Args:
            arguments: What was typed for the app.

        Returns:
            The best settings.

        Raises:
            ConfigError: If the app has no Adam to tune, or several values were typed for a key.
        """
        _check_single(arguments)
        app = self._loader.load_sweep_config(self._config, list(arguments))
        seed_key, seeds = _seeds(app, self.plan)
        with open_dict(app):
            del app["hydra"]
        places = find_places(app, self.plan.optimizer)
        start = read_point(app, places)
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self._config, self.folder / "multirun.yaml")
        archive = Archive(self._storage(), self.plan.study_name, self.plan.direction)
        identity = {f"{PATH}.direction": self.plan.direction, **_flat(app)}
        is_known = archive.claim(identity, self._where())
        fixed = [each for each in arguments if not _is_of_hydra(each)]
        search = Search(self.plan, start, archive, seeds)
        _, trials = search.look()
        done = f"goes on after {len(trials)} trials" if is_known and trials else "begins"
        log.info(
            f"adam_tune: the search {self.plan.study_name} {done}, of {self.plan.n_trials} at most;"
            f" {self._where()}"
        )
        typed = partial(places.overrides, start)
        try:
            with Heart(archive, search.owner), _bar(self.plan.n_trials) as bar:
                story = self._tell(search, typed, fixed, bar)
                while batch := search.next_batch():
                    overrides = [
                        [
                            *arguments,
                            *typed(begun.point),
                            *([] if begun.seed is None else [f"{seed_key}={begun.seed}"]),
                            *self._job_overrides(begun),
                        ]
                        for begun in batch
                    ]
                    self._launch(search, archive, batch, overrides, len(story.trials))
                    story = self._tell(search, typed, fixed, bar)
                # Another process may have trained the last ones.
                story = self._tell(search, typed, fixed, bar)
        except KeyboardInterrupt:
            raise SystemExit("adam_tune: interrupted; the same command goes on from here") from None
        if not math.isfinite(story.incumbent.mean):
            raise ConfigError(
                f"None of {len(story.trials)} trials returned a finite metric",
                f"See {shlex.quote(self._where())}/tune.md for the reasons",
            )
        _print_end(story, self.folder)
        return story.incumbent.point

    def _launch(
        self,
        search: Search,
        archive: Archive,
        batch: Sequence[Begun],
        overrides: Sequence[Sequence[str]],
        first: int,
    ) -> None:
        """Runs a batch; what a trial raises is its failure, and the search goes on."""
        for each in overrides:
            # What cannot be composed is no trial's fault.
            self._loader.load_sweep_config(self._config, list(each))
        try:
            results: Sequence[JobReturn] = self._launcher.launch(overrides, initial_job_idx=first)
        except Exception as error:
            reason = in_one_line(error)
            log.warning(f"adam_tune: the launcher lost a batch ({reason})")
            search.lose(batch, reason)
            return
        for begun, result in zip(batch, results, strict=True):
            # Most have written down their results themselves, and then this changes nothing.
            if result.status is JobStatus.COMPLETED:
                archive.finish(begun.stage, begun.number, as_metric(result.return_value))
            else:
                raised = _raised(result)
                said = in_one_line(raised)
                archive.fail(begun.stage, begun.number, said)
                if isinstance(raised, NoMetricError):
                    raise raised
                log.warning(f"adam_tune: {begun.stage}/{begun.number} failed, {said}")

    def _job_overrides(self, begun: Begun) -> list[str]:
        """What a job needs to know: where to write, and who it is."""
        who = Identity(
            storage=self._storage(),
            study_name=self.plan.study_name,
            direction=self.plan.direction,
            stage=begun.stage,
            number=begun.number,
            monitor=self.plan.monitor if begun.may_stop else None,
        )
        return [
            f"hydra.sweep.dir={format_value(str(self.folder))}",
            f"hydra.sweep.subdir={begun.stage}/{begun.number}",
            f"hydra.job.env_set.{TRIAL_VARIABLE}={format_value(who.as_variable())}",
        ]

    def _tell(
        self,
        search: Search,
        typed: Callable[[Point], list[str]],
        fixed: Sequence[str],
        bar: "tqdm[Any]",
    ) -> Story:
        """Writes what the search has come to, to its folder and to the bar."""
        way, trials = search.look()
        steps = [each.step for each in way.stages]
        incumbent = steps[-1].after
        overrides = typed(incumbent.point)
        story = Story(
            name=self.plan.study_name,
            job=self._config.hydra.job.name,
            direction=self.plan.direction,
            n_trials=self.plan.n_trials,
            n_seeds=self.plan.n_seeds,
            steps=steps,
            trials=trials,
            skipped=way.skipped,
            overrides=overrides,
            fixed=fixed,
            is_over=way.is_over,
        )
        write_story(story, self.folder)
        bar.n = len([each for each in trials if each.outcome is not Outcome.running])
        found = " ".join(overrides) or "as configured"
        said = f"{steps[-1].stage}: {incumbent.mean:.5g}, {found}"
        bar.set_description(said, refresh=False)
        bar.refresh()
        return story

    def _storage(self) -> str:
        if self.plan.storage is None:
            return f"{JOURNAL}{self.folder / 'trials.journal'}"
        scheme, _, path = self.plan.storage.partition(":///")
        if path and scheme.startswith("sqlite") and not path.startswith("/"):
            # A trial may change its folder.
            return f"{scheme}:///{Path.cwd() / path}"
        return self.plan.storage

    def _where(self) -> str:
        return _shown(self.folder)


def sweep_folder(config: DictConfig, study_name: str) -> Path:
    """Where the search writes: `hydra.sweep.dir`, without what changes from one start to the next.

    Args:
        config: Hydra's config.
        study_name: What the folder is called in the place of a time.

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


def _check_single(arguments: Sequence[str]) -> None:
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        if override.is_sweep_override():
            key = override.get_key_element()
            raise ConfigError(
                f"{override.input_line} must be one value: adam_tune searches Adam's settings only",
                f"Use one value for {key}, or run one search for each, with another"
                f" {PATH}.study_name",
            )


def _is_of_hydra(argument: str) -> bool:
    """Whether a group was chosen for Hydra's own config, as the stages of another file."""
    (override,) = OverridesParser.create().parse_overrides([argument])
    return (override.package or "").startswith("hydra.")


def _seeds(app: DictConfig, plan: Plan) -> tuple[str, list[int | None]]:
    """The key that seeds a training, and the seed of each turn."""
    key = plan.seed_key
    base = OmegaConf.select(app, key)
    if isinstance(base, int) and not isinstance(base, bool):
        return key, [base + turn for turn in range(plan.n_seeds)]
    if key != "seed":
        raise ConfigError(
            f"{PATH}.seed_key={key} must be a key of the app's config with an integer, the seed of"
            f" a run, not {format_value(base)}"
        )
    if plan.n_seeds > 1:
        log.warning(
            f"adam_tune: the app's config has no `seed`, so {plan.n_seeds} runs of the same"
            f" settings differ only by what the app leaves to chance. Set {PATH}.seed_key=KEY if"
            f" the seed has another key, or {PATH}.n_seeds=1 if there is none"
        )
    return key, [None] * plan.n_seeds


def _flat(config: DictConfig) -> dict[str, str]:
    """The app's settings as words: trials that differ in them cannot be compared."""

    def leaves(node: object, place: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, Mapping) and node:
            for name, each in node.items():
                yield from leaves(each, f"{place}.{name}" if place else str(name))
        else:
            yield place, format_value(node)

    return dict(leaves(OmegaConf.to_container(config, resolve=False, enum_to_str=True), ""))


def _raised(result: JobReturn) -> BaseException:
    """What a job raised; Hydra prints a traceback where it is asked for its value."""
    raised = result._return_value
    return raised if isinstance(raised, BaseException) else RuntimeError("it did not end")


def _bar(total: int) -> "tqdm[Any]":
    return tqdm(total=total, unit="trial", file=sys.stderr, dynamic_ncols=True)


def _shown(path: Path) -> str:
    """A path as it is typed from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _print_end(story: Story, folder: Path) -> None:
    first, best = story.steps[0].after.mean, story.incumbent.mean
    line = line_to_type(story)
    written = [folder / name for name in ("tune.md", "tune.html") if (folder / name).is_file()]
    lines = [
        "",
        f"adam_tune: {first:.5g} -> {best:.5g} in {len(story.trials)} trials",
        *(f"story: {shlex.quote(_shown(each))}" for each in written),
        f"type: {line}" if line else AS_CONFIGURED,
    ]
    print("\n".join(lines), flush=True)  # noqa: T201
