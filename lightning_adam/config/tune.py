"""The config of `hydra/sweeper=adam_tune`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lightning_adam.config.errors import ConfigPath
from lightning_adam.config.parsing import (
    BaseConfig,
    Choice,
    Count,
    NotNegative,
    ParsedConfig,
    to_dict,
    validate,
)

PATH = ConfigPath("hydra.sweeper")


class Direction(Choice):
    """Whether the metric that the app returns improves by falling or rising."""

    minimize = "minimize"
    """Lower is better."""
    maximize = "maximize"
    """Higher is better."""


@dataclass
class Range(BaseConfig):
    """The range of a hyperparameter, both ends included."""

    low: NotNegative
    """Lower end (required; optuna.distributions)."""
    high: NotNegative
    """Upper end, above `low` (required; optuna.distributions)."""


@dataclass
class SpaceConfig(BaseConfig):
    """The search space of `hydra/sweeper=adam_tune`. `null` keeps a value as configured."""

    lr: Range | None = field(default_factory=lambda: Range(1e-5, 0.2))
    """Learning rate, logarithmic (default: 1e-5 to 0.2; lightning_adam)."""
    beta1: Range | None = field(default_factory=lambda: Range(0.5, 0.99))
    """First of `betas`, by 1 - beta1 (default: 0.5 to 0.99; lightning_adam)."""
    beta2: Range | None = field(default_factory=lambda: Range(0.9, 0.9997))
    """Second of `betas`, by 1 - beta2 (default: 0.9 to 0.9997; lightning_adam)."""
    eps: Range | None = field(default_factory=lambda: Range(1e-12, 1e-3))
    """eps, if the optimizer's states are of 16 bits or a finding is about eps (default: 1e-12 to
    1e-3; lightning_adam)."""
    decay_timescale: Range | None = field(default_factory=lambda: Range(0.1, 1000))
    """1 / (lr * weight_decay), in lengths of the run, for decoupled weight decay; at the upper end
    there is none (default: 0.1 to 1000; Wang & Aitchison 2024, arXiv 2405.13698)."""
    weight_decay: Range | None = field(default_factory=lambda: Range(1e-7, 0.1))
    """Weight decay of an optimizer that adds it to the gradient; at the lower end there is none
    (default: 1e-7 to 0.1; lightning_adam)."""
    warmup_ratio: Range | None = field(default_factory=lambda: Range(0.0, 0.5))
    """Warm-up as a fraction of the run (default: 0 to 0.5; lightning_adam)."""
    amsgrad: bool = True
    """Whether the best configuration is also tried with the other value of `amsgrad`, from
    `n_trials=30` on (default: true; lightning_adam)."""


UPPER_LIMITS = {"beta1": 1.0, "beta2": 1.0, "warmup_ratio": 1.0}
"""Exclusive limits of the upper ends."""


@dataclass
class TuneConfig(BaseConfig):
    """The arguments of `hydra/sweeper=adam_tune`.

    Example:
        >>> TuneConfig(direction=Direction.minimize).n_trials
        20
    """

    _target_: str = "hydra_plugins.lightning_adam.AdamTune"
    """The class (default: hydra_plugins.lightning_adam.AdamTune; Hydra's plugins)."""
    direction: Direction | None = None
    """Whether to minimize or maximize the number that the app returns: `minimize` or `maximize`
    (required; optuna.create_study)."""
    n_trials: Count = 20
    """Budget in full training runs, at least 1; a run of an eighth of the steps counts as an eighth
    (default: 20; lightning_adam)."""
    n_jobs: Count = 1
    """Number of runs that the launcher starts at once, at least 1 (default: 1;
    hydra-optuna-sweeper)."""
    study_name: str = "${hydra.job.name}"
    """Name of the Optuna study and of its W&B group; a study with this name is continued (default:
    the job's name; optuna.create_study)."""
    storage: str | None = None
    """URL of the study's database, `sqlite:///tune.db`, `postgresql://...`; machines that share it
    share the search (default: null, a journal file in the search's folder; optuna.create_study)."""
    optimizer: str | None = None
    """Path of the optimizer's config to tune, such as `generator.optimizer` (default: null, the
    only one; lightning_adam)."""
    seed_key: str = "seed"
    """Key of the app's config that seeds a run, if there is one (default: seed; lightning_adam)."""
    sampler_seed: int = 0
    """Seed of the search (default: 0; optuna.samplers)."""
    space: SpaceConfig = field(default_factory=SpaceConfig)
    """The search space (default: the ranges of `hydra.sweeper.space`, below; lightning_adam)."""


def parse_tune(values: Mapping[str, Any]) -> ParsedConfig[TuneConfig]:
    """Parses the sweeper's config: names, types and ranges.

    Args:
        values: The arguments that Hydra passes to the sweeper.

    Raises:
        ConfigError: If a key is unknown, a value is out of range, or the direction is missing.

    Example:
        >>> parse_tune({"direction": "minimize", "study_name": "mnist"}).config.n_trials
        20
    """
    config = validate(TuneConfig, to_dict(values, PATH), PATH)
    if config.direction is None:
        path = PATH / "direction"
        choices = " or ".join(path.override(each) for each in Direction)
        raise path.error("is required", f"Set {choices}")
    if not config.study_name.strip():
        raise (PATH / "study_name").invalid(config.study_name, "must not be empty", "tune")
    defaults = SpaceConfig()
    for name in (each.name for each in fields(SpaceConfig)):
        given, default = getattr(config.space, name), getattr(defaults, name)
        if isinstance(given, Range):
            _check_range(PATH / "space" / name, name, given, default)
    return ParsedConfig(config, PATH)


def _check_range(path: ConfigPath, name: str, given: Range, default: Range) -> None:
    if given.low == 0 and default.low > 0:
        raise (path / "low").invalid(given.low, "must be above 0", default.low)
    limit = UPPER_LIMITS.get(name)
    if limit is not None and given.high >= limit:
        raise (path / "high").invalid(given.high, f"must be below {limit:g}", default.high)
    if not given.low < given.high:
        raise (path / "low").invalid(given.low, "must be less than high", given.high / 10)
