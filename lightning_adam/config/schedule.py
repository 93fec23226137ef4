"""The learning-rate schedule's config: the built-in schedules, or any class with `_target_`."""

import functools
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from omegaconf import MISSING, DictConfig, OmegaConf

from lightning_adam.config.errors import ConfigPath, nearest
from lightning_adam.config.parsing import (
    BaseConfig,
    Choice,
    Count,
    CountOrZero,
    Example,
    Fraction,
    Limits,
    NotNegative,
    ParsedConfig,
    Positive,
    PositiveFraction,
    check_arguments,
    locate,
    merged_with_preset,
    preset_override,
    split_target,
    target_name,
    to_dict,
    to_plain,
    validate,
)

PRESET = "lightning_adam/scheduler"
"""The config group of the presets."""
TOTAL_STEPS = "total_steps"
"""As an argument of a custom scheduler: the number of optimizer steps in the run."""


class Decay(Choice):
    """Shape of the final decay of `wsd`."""

    cosine = "cosine"
    """Half a cosine."""
    linear = "linear"
    """A straight line."""
    sqrt = "sqrt"
    """One minus the square root of the progress (Hägele et al. 2024, arXiv 2405.18392)."""


class Anneal(Choice):
    """Shape of the rise and the fall of `one_cycle`."""

    cosine = "cosine"
    """Half a cosine."""
    linear = "linear"
    """A straight line."""


class Mode(Choice):
    """Whether a metric improves by falling or by rising."""

    min = "min"
    """Lower is better."""
    max = "max"
    """Higher is better."""


class ThresholdMode(Choice):
    """Unit of the threshold of `plateau`."""

    rel = "rel"
    """A fraction of the best value."""
    abs = "abs"
    """The metric's own unit."""


class SchedulerInterval(Choice):
    """Unit of a scheduler's steps."""

    step = "step"
    """Optimizer steps."""
    epoch = "epoch"
    """Epochs."""


@dataclass
class ScheduleConfig(BaseConfig):
    """The field that every schedule has."""

    name: str = MISSING
    """The schedule (default: the preset's name; lightning_adam)."""


@dataclass
class StepScheduleConfig(ScheduleConfig):
    """A learning rate that is a function of the optimizer step."""

    total_steps: Annotated[Count, Example(1000)] | None = None
    """Optimizer steps of the whole schedule (default: null, the steps of the run;
    torch.optim.lr_scheduler.OneCycleLR)."""
    count_skipped_steps: bool = False
    """Whether skipped steps advance the schedule. A step is skipped if a GradScaler finds an inf or
    if there is no gradient (default: false; lightning_adam)."""


@dataclass
class WarmupScheduleConfig(StepScheduleConfig):
    """Linear warm-up, then the schedule's shape.

    With `w` steps of warm-up the first step trains with `1/(w + 1)` of the peak, and the step after
    the warm-up with the peak. A warm-up that is longer than the run ends with it.
    """

    warmup_steps: Annotated[CountOrZero, Example(100)] | None = None
    """Optimizer steps of linear warm-up (default: null, none; Goyal et al. 2017, arXiv 1706.02677,
    section 2.2)."""
    warmup_ratio: Annotated[Fraction, Example(0.05)] | None = None
    """Warm-up as a fraction of all steps, in [0, 1]; excludes `warmup_steps` (default: null;
    transformers.TrainingArguments)."""
    warmup_epochs: Annotated[NotNegative, Example(5)] | None = None
    """Warm-up in epochs, at least 0; excludes `warmup_steps` (default: null; timm.scheduler)."""


@dataclass
class DecayScheduleConfig(WarmupScheduleConfig):
    """Warm-up, then a decay towards a final learning rate."""

    min_lr_ratio: Annotated[Fraction, Example(0.1)] = 0.0
    """Final learning rate as a fraction of the peak, in [0, 1] (default: 0; Bergsma et al. 2025,
    arXiv 2502.15938)."""
    min_lr: Annotated[NotNegative, Example(1e-6)] | None = None
    """Final learning rate, at least 0; groups with an `lr_scale` have it scaled. Excludes
    `min_lr_ratio` (default: null; torch.optim.lr_scheduler.CosineAnnealingLR, eta_min)."""


@dataclass
class ConstantConfig(WarmupScheduleConfig):
    """The peak learning rate after the warm-up."""

    name: str = "constant"


@dataclass
class LinearConfig(DecayScheduleConfig):
    """Linear decay."""

    name: str = "linear"


@dataclass
class CosineConfig(DecayScheduleConfig):
    """Half a cosine, without restarts (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5)."""

    name: str = "cosine"


@dataclass
class CosineRestartsConfig(DecayScheduleConfig):
    """Half a cosine, several times (Loshchilov & Hutter 2017, arXiv 1608.03983)."""

    name: str = "cosine_restarts"
    num_cycles: Annotated[Count, Example(4)] = 4
    """Number of times that the learning rate falls, at least 1 (default: 4;
    transformers.get_cosine_with_hard_restarts_schedule_with_warmup)."""
    cycle_mult: Annotated[Positive, Example(2.0)] = 1.0
    """Length of a cycle in units of the one before, above 0 (default: 1;
    torch.optim.lr_scheduler.CosineAnnealingWarmRestarts, T_mult)."""


@dataclass
class PolynomialConfig(DecayScheduleConfig):
    """A power of the remaining fraction of the steps."""

    name: str = "polynomial"
    power: Annotated[Positive, Example(2.0)] = 1.0
    """Exponent, above 0; 1 is linear (default: 1; torch.optim.lr_scheduler.PolynomialLR)."""


@dataclass
class InverseSqrtConfig(WarmupScheduleConfig):
    """Decay with the inverse square root of the step, which needs no total number of steps."""

    name: str = "inverse_sqrt"
    timescale: Annotated[Count, Example(10_000)] | None = None
    """Optimizer steps after which the learning rate is 1/sqrt(2) of the peak, at least 1 (default:
    null, `warmup_steps`, or 10,000 without a warm-up; Vaswani et al. 2017, arXiv 1706.03762,
    section 5.3)."""


@dataclass
class ExponentialConfig(DecayScheduleConfig):
    """A constant factor on the learning rate for each epoch, applied at each step."""

    name: str = "exponential"
    gamma: Annotated[PositiveFraction, Example(0.95)] = 0.95
    """Factor per `decay_steps`, above 0 and at most 1 (default: 0.95;
    torch.optim.lr_scheduler.ExponentialLR)."""
    decay_steps: Annotated[Count, Example(1000)] | None = None
    """Optimizer steps in which the learning rate falls by `gamma`, at least 1 (default: null, one
    epoch; optax.exponential_decay, transition_steps)."""


@dataclass
class MultiStepConfig(WarmupScheduleConfig):
    """A drop of the learning rate at each milestone."""

    name: str = "multistep"
    milestones: Annotated[list[Positive], Example([0.5, 0.75])] = field(
        default_factory=lambda: [0.5, 0.75]
    )
    """Where the learning rate drops: fractions of all steps where below 1, else optimizer steps
    (default: [0.5, 0.75]; He et al. 2016, arXiv 1512.03385, section 4.2)."""
    gamma: Annotated[PositiveFraction, Example(0.1)] = 0.1
    """Factor of each drop, above 0 and at most 1 (default: 0.1;
    torch.optim.lr_scheduler.MultiStepLR)."""


@dataclass
class OneCycleConfig(StepScheduleConfig):
    """A rise to the peak, then a fall far below the start. The betas are left alone.

    The learning rate is that of `torch.optim.lr_scheduler.OneCycleLR` (Smith & Topin 2017,
    arXiv 1708.07120).
    """

    name: str = "one_cycle"
    pct_start: Annotated[float, Limits(gt=0, lt=1), Example(0.3)] = 0.3
    """Fraction of all steps in which the learning rate rises, above 0 and below 1 (default: 0.3;
    torch OneCycleLR)."""
    div_factor: Annotated[float, Limits(ge=1), Example(25.0)] = 25.0
    """Peak divided by the first learning rate, at least 1 (default: 25; torch OneCycleLR)."""
    final_div_factor: Annotated[float, Limits(ge=1), Example(1e4)] = 1e4
    """First learning rate divided by the last, at least 1 (default: 1e4; torch OneCycleLR)."""
    anneal: Anneal = Anneal.cosine
    """Shape of the rise and of the fall: `cosine` or `linear` (default: cosine; torch
    OneCycleLR)."""


@dataclass
class WSDConfig(DecayScheduleConfig):
    """Warmup-stable-decay: the peak learning rate, then a decay at the end."""

    name: str = "wsd"
    decay_steps: Annotated[Count, Example(100)] | None = None
    """Optimizer steps of the decay (default: null, `decay_ratio` of all steps; Hu et al. 2024,
    arXiv 2404.06395, section 4.2)."""
    decay_ratio: Annotated[PositiveFraction, Example(0.1)] | None = None
    """The decay as a fraction of all steps, in (0, 1]; excludes `decay_steps` (default: null, which
    means 0.1 unless `decay_steps` is set; Hu et al. 2024, arXiv 2404.06395, section 4.3)."""
    decay: Decay = Decay.cosine
    """Shape of the decay: `cosine`, `linear` or `sqrt` (default: cosine;
    transformers.get_wsd_schedule)."""


@dataclass
class PlateauConfig(DecayScheduleConfig):
    """Warm-up, then a reduction whenever a metric has stopped improving.

    The metric is compared after each validation, whenever the Trainer validates, or, if training
    logs it, after each epoch. Nothing is compared during the warm-up.
    """

    name: str = "plateau"
    monitor: str = "val/loss"
    """Metric that the module logs (default: val/loss; Lightning's lr_scheduler config)."""
    strict: bool = True
    """Whether a metric that is not logged is an error; false: it is ignored (default: true;
    Lightning's lr_scheduler config)."""
    mode: Mode = Mode.min
    """Whether the metric improves by falling or rising: `min` or `max` (default: min; torch
    ReduceLROnPlateau)."""
    factor: Annotated[float, Limits(gt=0, lt=1)] = 0.1
    """Factor of each reduction, above 0 and below 1 (default: 0.1; torch ReduceLROnPlateau)."""
    patience: CountOrZero = 10
    """Validations without improvement before a reduction (default: 10; torch
    ReduceLROnPlateau)."""
    threshold: NotNegative = 1e-4
    """Smallest change that counts as an improvement, at least 0 (default: 1e-4; torch
    ReduceLROnPlateau)."""
    threshold_mode: ThresholdMode = ThresholdMode.rel
    """Whether the threshold is a fraction of the best value or absolute: `rel` or `abs` (default:
    rel; torch ReduceLROnPlateau)."""
    cooldown: CountOrZero = 0
    """Validations to ignore after a reduction (default: 0; torch ReduceLROnPlateau)."""


@dataclass
class CustomSchedulerConfig(ScheduleConfig):
    """Any scheduler by its `_target_`, which receives all other keys.

    The value `total_steps` stands for the number of optimizer steps in the run:
    `scheduler.T_max=total_steps`.
    """

    name: str = "custom"
    interval: SchedulerInterval | None = None
    """Unit of the scheduler's steps: `step` or `epoch` (default: null, which means `step` if an
    argument is `total_steps`, each validation for ReduceLROnPlateau, and `epoch` otherwise;
    Lightning's lr_scheduler config)."""
    frequency: Count = 1
    """Number of intervals between two steps of the scheduler, at least 1 (default: 1; Lightning's
    lr_scheduler config)."""
    monitor: str = "val/loss"
    """Metric for ReduceLROnPlateau (default: val/loss; Lightning's lr_scheduler config)."""
    strict: bool = True
    """Whether a metric that is not logged is an error (default: true; Lightning's lr_scheduler
    config)."""
    count_skipped_steps: bool = False
    """Whether skipped optimizer steps advance a scheduler that counts steps (default: false;
    lightning_adam)."""
    factory: functools.partial[Any] = field(init=False)


SCHEDULES: dict[str, type[ScheduleConfig]] = {
    config.name: config
    for config in (
        ConstantConfig,
        LinearConfig,
        CosineConfig,
        CosineRestartsConfig,
        PolynomialConfig,
        InverseSqrtConfig,
        ExponentialConfig,
        MultiStepConfig,
        OneCycleConfig,
        WSDConfig,
        PlateauConfig,
        CustomSchedulerConfig,
    )
}
"""The schedules by name."""
ALTERNATIVES = (
    ("warmup_steps", "warmup_ratio", "warmup_epochs"),
    ("decay_steps", "decay_ratio"),
    ("min_lr_ratio", "min_lr"),
)
"""Fields that exclude each other."""


def parse_schedule(node: Any, path: ConfigPath | None = None) -> ParsedConfig[ScheduleConfig]:
    """Parses a scheduler config in any form; `name` selects the schedule.

    Args:
        node: A composed Hydra node, a dict, one of the dataclasses or a `functools.partial`. A
            parsed config is returned as it is.
        path: Its path (default: None, where the node is in its config, or `scheduler`).

    Raises:
        ConfigError: If the name or a key is unknown, or a value is out of range.

    Example:
        >>> parse_schedule({"name": "cosine", "warmup_steps": 10}).config.warmup_steps
        10
    """
    if isinstance(node, ParsedConfig):
        return node
    path = path or locate(node, "scheduler")
    _check_children(to_plain(node), path)
    own_fields = [entry.name for entry in fields(CustomSchedulerConfig) if entry.init]
    split = split_target(node, path, own_fields)
    if split is not None:
        return ParsedConfig(_parse_custom(*split, path), path)
    values = to_dict(node, path)
    config = validate(_schema(node, values, path), values, path)
    for alternatives in ALTERNATIVES:
        given = {name: getattr(config, name, None) for name in alternatives}
        # A ratio of 0 is the default.
        names = [
            name
            for name, value in given.items()
            if value is not None and (name, value) != ("min_lr_ratio", 0)
        ]
        if len(names) > 1:
            raise (path / names[1]).invalid(
                given[names[1]], f"cannot be combined with {names[0]}", None
            )
    return ParsedConfig(config, path)


def uses_total_steps(value: Any) -> bool:
    """Returns whether an argument of a target, or of one of its children, is `total_steps`.

    Example:
        >>> uses_total_steps(functools.partial(dict, T_max="total_steps"))
        True
        >>> uses_total_steps(functools.partial(dict, schedulers=[functools.partial(dict, T_max=9)]))
        False
    """
    if isinstance(value, functools.partial):
        return any(map(uses_total_steps, value.keywords.values()))
    if isinstance(value, list | tuple):
        return any(map(uses_total_steps, value))
    return isinstance(value, str) and value == TOTAL_STEPS


def _schema(node: Any, values: dict[str, Any], path: ConfigPath) -> type[ScheduleConfig]:
    """Returns the dataclass of a schedule by its name, and checks that the settings fit it."""
    name, key = values.get("name"), path / "name"
    if name is None:
        problem = f"is required, one of {', '.join(SCHEDULES)}"
        raise key.error(problem, key.suggest("cosine"))
    if str(name) not in SCHEDULES:
        close = nearest(str(name), SCHEDULES, 1)
        problem = f"must be one of {', '.join(SCHEDULES)}"
        raise key.invalid(name, problem, close[0] if close else "cosine")
    given = OmegaConf.get_type(node) if isinstance(node, DictConfig) else type(node)
    preset = next((each for each, schema in SCHEDULES.items() if schema is given), name)
    if name != preset:
        problem = f"does not belong to the fields of {preset}"
        suggestion = f"Use {preset_override(path, PRESET, str(name))}"
        raise key.error(problem, suggestion, value=name)
    if name == CustomSchedulerConfig.name:
        problem, example = "is required", "torch.optim.lr_scheduler.OneCycleLR"
        raise (path / "_target_").invalid(None, problem, example)
    schema = SCHEDULES[str(name)]
    names = [entry.name for entry in fields(schema)]
    settings = {entry.name for kind in SCHEDULES.values() for entry in fields(kind)}
    for other, value in values.items():
        # The setting of another schedule is not a typo, so the nearest name would mislead.
        if other in settings and other not in names:
            problem = f"is not a setting of {name}"
            raise (path / other).error(problem, f"Use one of {', '.join(names)}", value)
    return schema


def _parse_custom(
    target: functools.partial[Any], own: dict[str, Any], path: ConfigPath
) -> CustomSchedulerConfig:
    name = own.get("name", CustomSchedulerConfig.name)
    if str(name) in SCHEDULES.keys() - {CustomSchedulerConfig.name}:
        raise merged_with_preset(path, target_name(target), PRESET)
    if name != CustomSchedulerConfig.name:
        problem = "cannot be combined with a _target_"
        raise (path / "name").invalid(name, problem, CustomSchedulerConfig.name)
    _check_arguments(target, path)
    config = validate(CustomSchedulerConfig, own, path)
    config.factory = target
    if uses_total_steps(target):
        if config.interval is SchedulerInterval.epoch:
            problem = f"cannot be combined with the argument {TOTAL_STEPS}"
            raise (path / "interval").invalid(config.interval, problem, SchedulerInterval.step)
        config.interval = SchedulerInterval.step
    return config


def _check_children(node: Any, path: ConfigPath) -> None:
    """Checks that the schedulers in a node are partials, because they need the optimizer."""
    children = node.get("schedulers") if isinstance(node, dict) else None
    for index, child in enumerate(children if isinstance(children, list) else ()):
        child_path = path / "schedulers" / index
        if isinstance(child, dict) and child.get("_partial_") is not True:
            problem = "must be true for a scheduler within another"
            raise (child_path / "_partial_").invalid(child.get("_partial_", False), problem, True)
        _check_children(child, child_path)


def _check_arguments(target: functools.partial[Any], path: ConfigPath) -> None:
    """Checks the arguments of a scheduler, and those of its children."""
    keywords = dict(target.keywords)
    # ChainedScheduler takes the children before the optimizer.
    children = keywords.pop("schedulers", [])
    if not isinstance(children, list | tuple):
        example = [{"_target_": "torch.optim.lr_scheduler.LinearLR", "_partial_": True}]
        raise (path / "schedulers").invalid(children, "must be a list of schedulers", example)
    for index, child in enumerate(children):
        if isinstance(child, functools.partial):
            _check_arguments(child, path / "schedulers" / index)
    check_arguments(functools.partial(target.func, **keywords), path)
