"""The typed configs: what can be set, what it means, its default, and where it comes from.

Hydra composes the dataclasses of this file (`conf/lightning_adam/`), so an unknown key or a value
of the wrong type is refused before the job starts. What a type cannot say (a length, a range) is
checked by `lightning_adam.config.reading`. `lightning-adam explain` prints the docstrings of the
fields.

Imports neither torch nor lightning: this file is loaded by every Hydra app of the environment.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class _Word(str, Enum):
    """One of several words; shown as the word alone."""

    def __str__(self) -> str:
        return str(self.value)


class WeightDecayOn(_Word):
    """Which parameters weight decay pulls on."""

    matrices = "matrices"
    """Parameters of two or more dimensions that are neither embeddings nor normalisation."""
    all = "all"
    """Every parameter that is trained."""


class Scope(_Word):
    """A set of tensors that a statistic is given for."""

    model = "model"
    """All tensors of the optimizer together."""
    group = "group"
    """The tensors of one of `optimizer.param_groups`."""
    layer = "layer"
    """The tensors that one module owns."""
    tensor = "tensor"
    """One parameter."""


class Kernel(_Word):
    """What reads the tensors of a measurement."""

    auto = "auto"
    """The fast one of each device, if it is installed."""
    eager = "eager"
    """Plain torch operations in float64, on any device: the reference, at many times the cost."""
    numba = "numba"
    """Compiled for the CPU; `pip install 'lightning-adam[cpu]'`."""
    triton = "triton"
    """Compiled for CUDA; comes with torch there."""


class Decay(_Word):
    """How the learning rate goes down at the end of `wsd`."""

    cosine = "cosine"
    """Half a cosine."""
    linear = "linear"
    """A straight line."""
    sqrt = "sqrt"
    """One minus the square root of the progress (Hägele et al. 2024, arXiv 2405.18392)."""


class Mode(_Word):
    """Which way a metric gets better."""

    min = "min"
    """Less is better."""
    max = "max"
    """More is better."""


class ThresholdMode(_Word):
    """What the threshold of `plateau` is measured in."""

    rel = "rel"
    """A share of the best value."""
    abs = "abs"
    """The metric's own units."""


class Resume(_Word):
    """Whose settings a training goes on with that is resumed from a checkpoint."""

    checkpoint = "checkpoint"
    """Those that the checkpoint was trained with."""
    config = "config"
    """Those that are configured now."""


class Severity(_Word):
    """What becomes of a finding."""

    off = "off"
    """It is not looked for."""
    info = "info"
    """It is recorded, not printed."""
    warning = "warning"
    """Something costs performance, or is about to."""
    error = "error"
    """Adam does not do what it is there for."""


class Interval(_Word):
    """What a scheduler counts."""

    step = "step"
    """Batches that end in an optimizer step."""
    epoch = "epoch"
    """Epochs."""


class Direction(_Word):
    """Which way the number gets better that is tuned for."""

    minimize = "minimize"
    """Less is better."""
    maximize = "maximize"
    """More is better."""


class When(_Word):
    """What calls for a stage of the tuning."""

    always = "always"
    """Nothing need."""
    low_precision = "low_precision"
    """A training in 16 bits, or a finding about eps."""


@dataclass
class GroupConfig:
    """Parameters that are trained with settings of their own, found by exactly one matcher.

    Example:
        >>> GroupConfig(name="head", match="net.head.*", lr_scale=10).lr_scale
        10
    """

    name: str = MISSING
    """What the group is called in tables and keys: letters, digits, `_` and `.`; those of its
    parameters that do not decay stand in `<name>_no_decay` (no default; torch.optim, param_groups).
    """
    match: str | None = None
    """Glob over parameter names, as in `net.head.*`; `*` matches dots too (default: null; Python
    fnmatch)."""
    regex: str | None = None
    """Regular expression, searched for anywhere in a parameter's name (default: null; Python
    re.search)."""
    module_class: str | None = None
    """Class of the modules whose parameters are meant, at any depth: `LayerNorm`, or with its path
    `my_project.layers.Router` (default: null; Python isinstance)."""
    lr_scale: float = 1.0
    """Factor on the learning rate, above 0 (default: 1; Howard & Ruder 2018, arXiv 1801.06146,
    section 3.2)."""
    weight_decay: float | None = None
    """Instead of the optimizer's weight_decay, for those that decay (default: null, the same;
    torch.optim, per-parameter options)."""
    betas: list[float] | None = None
    """Instead of the optimizer's betas (default: null, the same; torch.optim, per-parameter
    options)."""
    eps: float | None = None
    """Instead of the optimizer's eps (default: null, the same; torch.optim, per-parameter options).
    """


@dataclass
class LayerDecayConfig:
    """Learning rates that fall geometrically from the output to the input, for fine-tuning.

    The last layer trains with `rate` times the learning rate, the one below with `rate**2` times,
    and so on; what the module registers before its first layer counts as one layer below it, all
    the rest as the head, which trains with the full rate.

    Example:
        >>> LayerDecayConfig(pattern="net.blocks.*", rate=0.75).rate
        0.75
    """

    pattern: str | None = None
    """Path of the layers, `*` standing for their number: `net.blocks.*` (default: null, off; Bao et
    al. 2022, arXiv 2106.08254)."""
    rate: float | None = None
    """Factor from a layer to the one below it, above 0 and at most 1 (default: null, off;
    Clark et al. 2020, arXiv 2003.10555, appendix B; Bao et al. 2022, arXiv 2106.08254)."""


@dataclass
class AdamConfig:
    """Adam and AdamW, in torch's own words; the presets `adam` and `adamw` differ in the decay.

    Example:
        >>> AdamConfig(lr=3e-4, betas=[0.9, 0.95]).eps
        1e-08
    """

    lr: float = 1e-3
    """Peak learning rate, above 0 (default: 1e-3; Kingma & Ba 2015, arXiv 1412.6980, alg. 1)."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay rates of the first and the second moment, each in [0, 1) (default: [0.9, 0.999];
    Kingma & Ba 2015, arXiv 1412.6980, alg. 1)."""
    eps: float = 1e-8
    """Added to the denominator, above 0, and not 0 in the parameters' dtype (default: 1e-8;
    Kingma & Ba 2015, arXiv 1412.6980, alg. 1)."""
    weight_decay: float = 0.0
    """Strength of weight decay, at least 0 (default: 0 for `adam`, 0.01 for `adamw`; Loshchilov &
    Hutter 2019, arXiv 1711.05101, section 2)."""
    amsgrad: bool = False
    """Divide by the largest second moment so far (default: false; Reddi et al. 2018,
    arXiv 1904.09237, alg. 2)."""
    maximize: bool = False
    """Ascend instead of descend (default: false; torch.optim.Adam)."""
    decoupled_weight_decay: bool = False
    """Shrink the weights (AdamW) instead of adding to the gradient (Adam with L2) (default: false
    for `adam`, true for `adamw`; Loshchilov & Hutter 2019, arXiv 1711.05101, alg. 2)."""
    fused: bool | None = None
    """One kernel for the whole step; null takes it wherever it works (default: null;
    torch.optim.Adam)."""
    foreach: bool | None = None
    """One call over all tensors; null leaves the choice to us (default: null;
    torch.optim.Adam)."""
    capturable: bool = False
    """Safe to capture in a CUDA graph (default: false; torch.optim.Adam)."""
    weight_decay_on: WeightDecayOn = WeightDecayOn.matrices
    """Which parameters decay: `matrices`, that is neither biases nor norms nor embeddings, or
    `all` (default: matrices; Radford et al. 2018, section 4.1, and every GPT since)."""
    groups: list[GroupConfig] = field(default_factory=list)
    """Parameters with settings of their own, `[{name: head, match: net.head.*, lr_scale: 10}]`; the
    first that matches a parameter takes it (default: []; torch.optim, per-parameter options)."""
    layer_decay: LayerDecayConfig = field(default_factory=LayerDecayConfig)
    """Learning rates that fall from the output to the input (default: off; Clark et al. 2020,
    arXiv 2003.10555, appendix B)."""
    resume: Resume = Resume.checkpoint
    """Who decides on the settings and the schedule when training is resumed, if they differ:
    `checkpoint` or `config` (default: checkpoint, as in Lightning; lightning_adam)."""


@dataclass
class SchedulerConfig:
    """What every schedule has: the name of its shape.

    Example:
        >>> SchedulerConfig("cosine").name
        'cosine'
    """

    name: str = MISSING
    """The shape (default: that of the preset; lightning_adam)."""


@dataclass
class StepwiseConfig(SchedulerConfig):
    """A function of the optimizer step: a linear warm-up from 0, then the shape.

    Example:
        >>> StepwiseConfig("constant", warmup_steps=100).warmup_steps
        100
    """

    warmup_steps: int | None = None
    """Optimizer steps of linear warm-up, which starts at 0 (default: null, none; Goyal et al.
    2017, arXiv 1706.02677, section 2.2)."""
    warmup_ratio: float | None = None
    """The warm-up as a share of all steps, in [0, 1]; instead of `warmup_steps` (default: null;
    transformers.TrainingArguments)."""
    total_steps: int | None = None
    """Optimizer steps of the whole schedule (default: null, the steps the trainer will take;
    torch.optim.lr_scheduler.OneCycleLR)."""
    count_skipped_steps: bool = False
    """Whether the schedule goes on at steps that were skipped, for an inf under a GradScaler or for
    want of a gradient. A fused step under a GradScaler costs a wait for the device at each step if
    they do not count, as any other implementation does there (default: false; lightning_adam)."""


@dataclass
class ConstantConfig(StepwiseConfig):
    """The peak learning rate throughout, after the warm-up.

    Example:
        >>> ConstantConfig(warmup_steps=100).name
        'constant'
    """

    name: str = "constant"


@dataclass
class LinearConfig(StepwiseConfig):
    """A straight line from the peak to `min_lr_ratio` of it.

    Example:
        >>> LinearConfig().min_lr_ratio
        0.0
    """

    name: str = "linear"
    min_lr_ratio: float = 0.0
    """The learning rate at the end as a share of the peak, in [0, 1] (default: 0; Bergsma et al.
    2025, arXiv 2502.15938)."""


@dataclass
class CosineConfig(StepwiseConfig):
    """Half a cosine from the peak to `min_lr_ratio` of it, without restarts.

    Example:
        >>> CosineConfig(warmup_ratio=0.05).warmup_ratio
        0.05
    """

    name: str = "cosine"
    min_lr_ratio: float = 0.0
    """The learning rate at the end as a share of the peak, in [0, 1] (default: 0; Loshchilov &
    Hutter 2017, arXiv 1608.03983, eq. 5)."""


@dataclass
class PolynomialConfig(StepwiseConfig):
    """What is left of the way to the end, to a power.

    Example:
        >>> PolynomialConfig(power=2.0).power
        2.0
    """

    name: str = "polynomial"
    power: float = 1.0
    """The exponent, above 0; 1 is a straight line (default: 1;
    torch.optim.lr_scheduler.PolynomialLR)."""
    min_lr_ratio: float = 0.0
    """The learning rate at the end as a share of the peak, in [0, 1] (default: 0;
    transformers.get_polynomial_decay_schedule_with_warmup)."""


@dataclass
class InverseSqrtConfig(StepwiseConfig):
    """The peak over the square root of the step, which needs no end.

    Example:
        >>> InverseSqrtConfig(warmup_steps=4000).name
        'inverse_sqrt'
    """

    name: str = "inverse_sqrt"
    timescale: int | None = None
    """Optimizer steps in which the rate falls to 1/sqrt(2), at least 1 (default: null, as long as
    the warm-up, or 10,000 without one; Vaswani et al. 2017, arXiv 1706.03762, section 5.3)."""


@dataclass
class WSDConfig(StepwiseConfig):
    """Warm-up, stable, decay: the peak, and a way down at the end.

    Example:
        >>> WSDConfig(decay_ratio=0.2).decay
        <Decay.cosine: 'cosine'>
    """

    name: str = "wsd"
    decay_steps: int | None = None
    """Optimizer steps of the way down (default: null, `decay_ratio` of all; Hu et al. 2024,
    arXiv 2404.06395, section 4.2)."""
    decay_ratio: float | None = None
    """The way down as a share of all steps, in (0, 1]; instead of `decay_steps` (default: null,
    which is 0.1 if `decay_steps` is null too; Hu et al. 2024, arXiv 2404.06395, section 4.3)."""
    decay: Decay = Decay.cosine
    """The form of the way down: `cosine`, `linear` or `sqrt` (default: cosine;
    transformers.get_wsd_schedule)."""
    min_lr_ratio: float = 0.0
    """The learning rate at the end as a share of the peak, in [0, 1] (default: 0;
    transformers.get_wsd_schedule)."""


@dataclass
class PlateauConfig(SchedulerConfig):
    """A lower learning rate each time a metric has stopped improving, judged after validation.

    Example:
        >>> PlateauConfig(monitor="val/acc", mode=Mode.max).patience
        10
    """

    name: str = "plateau"
    monitor: str = "val/loss"
    """The metric, as the module logs it in validation (default: val/loss; Lightning's
    lr_scheduler config)."""
    mode: Mode = Mode.min
    """Which way it gets better: `min` or `max` (default: min; torch ReduceLROnPlateau)."""
    factor: float = 0.1
    """What the learning rate is multiplied by, above 0 and below 1 (default: 0.1; torch
    ReduceLROnPlateau)."""
    patience: int = 10
    """Validations without improvement that are tolerated (default: 10; torch ReduceLROnPlateau)."""
    threshold: float = 1e-4
    """What counts as an improvement, at least 0 (default: 1e-4; torch ReduceLROnPlateau)."""
    threshold_mode: ThresholdMode = ThresholdMode.rel
    """Whether the threshold is a share of the best value or absolute: `rel` or `abs` (default: rel;
    torch ReduceLROnPlateau)."""
    cooldown: int = 0
    """Validations after a reduction that are not judged (default: 0; torch ReduceLROnPlateau)."""
    min_lr_ratio: float = 0.0
    """The lowest learning rate as a share of the peak, in [0, 1] (default: 0; torch
    ReduceLROnPlateau)."""


@dataclass
class CustomSchedulerConfig(SchedulerConfig):
    """Any scheduler by its `_target_`; all other keys go to it.

    Where the value of an argument is the word `total_steps`, the scheduler gets the number of
    optimizer steps that the trainer will take: `scheduler.T_max=total_steps`.

    Example:
        >>> CustomSchedulerConfig(interval=Interval.step).frequency
        1
    """

    name: str = "custom"
    interval: Interval | None = None
    """What the scheduler counts: `step` or `epoch` (default: null, which is `step` if an argument
    is `total_steps`, after each validation for ReduceLROnPlateau, and else `epoch`; Lightning's
    lr_scheduler config)."""
    frequency: int = 1
    """Intervals between its steps, at least 1 (default: 1; Lightning's lr_scheduler config)."""
    monitor: str = "val/loss"
    """The metric that ReduceLROnPlateau is given (default: val/loss; Lightning's lr_scheduler
    config)."""
    count_skipped_steps: bool = False
    """Whether a scheduler that counts steps goes on at those that were skipped, for an inf under a
    GradScaler or for want of a gradient (default: false; lightning_adam)."""


@dataclass
class MonitorConfig:
    """The arguments of `lightning_adam.AdamMonitor`.

    Example:
        >>> [scope.value for scope in MonitorConfig().scopes]
        ['model', 'group']
    """

    _target_: str = "lightning_adam.AdamMonitor"
    """The class (default: lightning_adam.AdamMonitor; Hydra's instantiate)."""
    every_n_steps: int | None = None
    """Measure the first optimizer step and every n-th (default: null, the trainer's
    `log_every_n_steps`; lightning_adam)."""
    scopes: list[Scope] = field(default_factory=lambda: [Scope.model, Scope.group])
    """What the statistics are given for: `model`, `group`, `layer`, `tensor` (default: [model,
    group]; lightning_adam)."""
    statistics: Any = "headline"
    """What is measured: `headline`, `all`, or names and globs, `[headline,eps_*,update/*]`
    (default: headline; `lightning-adam explain statistics`)."""
    layer_depth: int | None = None
    """Parts of a module's path that make a layer, as 2 in `net.blocks` of `net.blocks.3.fc`, at
    least 1 (default: null, all; lightning_adam)."""
    worst: dict[str, int] = field(default_factory=dict)
    """How many tensors to show of those with a statistic's largest values, whatever the scopes:
    `{eps_energy_loss:5}` (default: {}; lightning_adam)."""
    histograms_every_n_steps: int | None = None
    """Count gradients, moments, denominators and directions by binary exponent at the first
    optimizer step and every n-th; W&B and TensorBoard draw them (default: null, never;
    lightning_adam)."""
    layer_table: bool = False
    """Keep the statistics of every layer in the W&B table `adam_layers` too (default: false;
    lightning_adam)."""
    findings: dict[str, Any] | None = field(default_factory=dict)
    """What is said of Adam's pathologies, rule by rule: thresholds, `persistence` in measurements
    and `severity` (off, info, warning or error), as in `eps_dominates.threshold=0.2`; null looks
    for none (default: {}, all rules as they are; `lightning-adam explain findings`)."""
    stop_on: list[str] = field(default_factory=list)
    """Findings that end the training when they are raised: `[not_finite]` (default: [];
    lightning_adam)."""
    alert: bool = False
    """Send a W&B alert for each finding above info, if the run is online (default: false;
    wandb.alert)."""
    flight_recorder: int | None = None
    """How many of the last optimizer steps are kept in memory with all statistics of every layer,
    to be written to a file if the training blows up: a loss that jumps or is not finite, anything
    measured that is not finite, an exception, SIGTERM (default: null, off; lightning_adam)."""
    kernel: Kernel = Kernel.auto
    """What reads the tensors: `numba` on the CPU, `triton` on CUDA, `eager` anywhere, at many times
    the cost (default: auto, the fast one if it is installed; lightning_adam)."""


@dataclass
class StageConfig:
    """One stage of `hydra/sweeper=adam_tune`.

    Example:
        >>> StageConfig(space={"lr": {"low": 1e-4, "high": 1e-2}}).share
        1.0
    """

    trials_from: int = 1
    """The smallest `n_trials` that the stage takes part in (default: 1; Godbole et al. 2023, Deep
    Learning Tuning Playbook, "How should Adam's hyperparameters be tuned?")."""
    share: float = 1.0
    """Its part of the trials that are left, relative to those of the stages behind it, above 0
    (default: 1; lightning_adam)."""
    when: When = When.always
    """`always`, or `low_precision`, if something calls for it (default: always; lightning_adam)."""
    space: dict[str, Any] = field(default_factory=dict)
    """What is searched: `{lr: {low: 1e-4, high: 1e-2}}`, or a list of values,
    `{amsgrad: [false, true]}`; of `lr`, `beta1`, `beta2`, `eps`, `weight_decay`, `decay_per_step`
    (lr times weight_decay), `decay_timescale` (one over that, in steps), `warmup_ratio`, `amsgrad`
    (default: {}, the stage is left out; lightning_adam)."""
    try_first: list[dict[str, Any]] = field(default_factory=list)
    """Points to begin with, `[{lr: 1e-3}]`; `{beta2: beta1}` ties the two (default: [];
    lightning_adam)."""


@dataclass
class TuneConfig:
    """The arguments of `hydra/sweeper=adam_tune`.

    Example:
        >>> TuneConfig(direction=Direction.minimize).n_trials
        40
    """

    _target_: str = "hydra_plugins.lightning_adam.AdamTune"
    """The class (default: hydra_plugins.lightning_adam.AdamTune; Hydra's plugins)."""
    direction: Direction | None = None
    """Which way the number gets better that the app returns: `minimize` or `maximize` (no default;
    optuna.create_study)."""
    n_trials: int = 40
    """How many trainings the search may take, at least 1 (default: 40; lightning_adam)."""
    n_seeds: int = 2
    """With how many seeds a setting is trained before it takes the incumbent's place, at least 1;
    with more than one it has to be better by more than the spread (default: 2; Bouthillier et al.
    2021, arXiv 2103.03098)."""
    n_jobs: int = 1
    """How many trainings the launcher is handed at once, at least 1 (default: 1;
    hydra-optuna-sweeper)."""
    study_name: str = "${hydra.job.name}"
    """What the search is called, and its W&B group: what is found under this name is continued
    (default: the job's name; optuna.create_study)."""
    storage: str | None = None
    """URL of the database that keeps the trials, `sqlite:///tune.db`, `postgresql://...`; machines
    that share it share the search (default: null, a journal file in the search's folder;
    optuna.create_study)."""
    monitor: str | None = None
    """The metric as the module logs it in validation, `val/loss`, by which hopeless trainings are
    stopped early (default: null, none is; Optuna's pruners)."""
    optimizer: str | None = None
    """Where the config of the optimizer stands that is tuned, `generator.optimizer` (default: null,
    the only one there is; lightning_adam)."""
    seed_key: str = "seed"
    """The key of the app's config that seeds a training, if there is one (default: seed;
    lightning_adam)."""
    sampler_seed: int = 0
    """Seed of the search itself (default: 0; optuna.samplers)."""
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """The stages by name, in their order (default: those of `lightning_adam/tune=default`; Godbole
    et al. 2023, Deep Learning Tuning Playbook)."""


SCHEDULERS: dict[str, type[SchedulerConfig]] = {
    config.name: config
    for config in (
        ConstantConfig,
        LinearConfig,
        CosineConfig,
        PolynomialConfig,
        InverseSqrtConfig,
        WSDConfig,
        PlateauConfig,
        CustomSchedulerConfig,
    )
}
