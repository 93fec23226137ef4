"""The config of `hydra/sweeper=adam_tune`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from lightning_adam.config.errors import ConfigPath
from lightning_adam.config.parsing import (
    Count,
    Example,
    Integer,
    Parsed,
    Positive,
    Validated,
    Word,
    to_dict,
    validate,
)

PATH = ConfigPath("hydra.sweeper")


class Direction(Word):
    """Whether the metric that the app returns improves by falling or rising."""

    minimize = "minimize"
    """Lower is better."""
    maximize = "maximize"
    """Higher is better."""


class When(Word):
    """The condition under which a stage runs."""

    always = "always"
    """In every search."""
    low_precision = "low_precision"
    """In 16-bit training, or after a finding about eps."""


@dataclass
class StageConfig(Validated):
    """One stage of `hydra/sweeper=adam_tune`.

    Example:
        >>> StageConfig(space={"lr": {"low": 1e-4, "high": 1e-2}}).share
        1.0
    """

    trials_from: Integer = 1
    """Smallest `n_trials` for which the stage runs (default: 1; Godbole et al. 2023, Deep Learning
    Tuning Playbook, "How should Adam's hyperparameters be tuned?")."""
    share: Annotated[Positive, Example(1)] = 1.0
    """Part of the remaining trials, relative to those of the stages behind it, above 0 (default: 1;
    lightning_adam)."""
    when: When = When.always
    """When the stage runs: `always` or `low_precision` (default: always; lightning_adam)."""
    space: dict[str, Any] = field(default_factory=dict)
    """Search space: a range, `{lr: {low: 1e-4, high: 1e-2}}`, or a list of values,
    `{amsgrad: [false, true]}`; of `lr`, `beta1`, `beta2`, `eps`, `weight_decay`, `decay_per_step`
    (lr times weight_decay), `decay_timescale` (one over that, in steps), `warmup_ratio`, `amsgrad`
    (default: {}, the stage does not run; lightning_adam)."""
    try_first: list[dict[str, Any]] = field(default_factory=list)
    """Points to evaluate first, `[{lr: 1e-3}]`; `{beta2: beta1}` ties the two (default: [];
    lightning_adam)."""


@dataclass
class TuneConfig(Validated):
    """The arguments of `hydra/sweeper=adam_tune`.

    Example:
        >>> TuneConfig(direction=Direction.minimize).n_trials
        40
    """

    _target_: str = "hydra_plugins.lightning_adam.AdamTune"
    """The class (default: hydra_plugins.lightning_adam.AdamTune; Hydra's plugins)."""
    direction: Direction | None = None
    """Whether to minimize or maximize the number that the app returns: `minimize` or `maximize`
    (required; optuna.create_study)."""
    n_trials: Count = 40
    """Maximum number of training runs in the search, at least 1 (default: 40; lightning_adam)."""
    n_seeds: Count = 2
    """Number of seeds that confirm a setting before it replaces the incumbent, at least 1; with
    more than one, it must be better by more than the spread (default: 2; Bouthillier et al. 2021,
    arXiv 2103.03098)."""
    n_jobs: Count = 1
    """Number of trials that the launcher runs at once, at least 1 (default: 1;
    hydra-optuna-sweeper)."""
    study_name: str = "${hydra.job.name}"
    """Name of the search and of its W&B group; a search with this name is continued (default: the
    job's name; optuna.create_study)."""
    storage: str | None = None
    """URL of the database for the trials, `sqlite:///tune.db`, `postgresql://...`; machines that
    share it share the search (default: null, a journal file in the search's folder;
    optuna.create_study)."""
    monitor: str | None = None
    """Metric that the module logs in validation, such as `val/loss`, by which underperforming
    trials are pruned (default: null, no pruning; Optuna's pruners)."""
    optimizer: str | None = None
    """Path of the optimizer's config to tune, such as `generator.optimizer` (default: null, the
    only one; lightning_adam)."""
    seed_key: str = "seed"
    """Key of the app's config that seeds a run, if there is one (default: seed; lightning_adam)."""
    sampler_seed: int = 0
    """Seed of the search (default: 0; optuna.samplers)."""
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """The stages by name, in order (default: those of `lightning_adam/tune=default`; Godbole et al.
    2023, Deep Learning Tuning Playbook)."""


def parse_tune(values: Mapping[str, Any]) -> Parsed[TuneConfig]:
    """Parses the sweeper's config: names, types and ranges.

    Args:
        values: The arguments that Hydra passes to the sweeper.

    Raises:
        ConfigError: If a key is unknown, a value is out of range, or there is no direction.

    Example:
        >>> parse_tune({"direction": "minimize", "study_name": "mnist"}).config.n_trials
        40
    """
    config = validate(TuneConfig, to_dict(values, PATH), PATH)
    if config.direction is None:
        path = PATH / "direction"
        choices = " or ".join(path.override(each) for each in Direction)
        raise path.error("is required and is not guessed", f"Set {choices}")
    if not config.study_name.strip():
        raise (PATH / "study_name").invalid(config.study_name, "must not be empty", "tune")
    return Parsed(config, PATH)
