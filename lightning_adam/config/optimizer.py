"""The optimizer's config: Adam, AdamW, or any class with `_target_`."""

import functools
import re
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from omegaconf import MISSING

from lightning_adam.config.errors import ConfigPath
from lightning_adam.config.parsing import (
    BaseConfig,
    Choice,
    Example,
    Limits,
    NotNegative,
    ParsedConfig,
    Positive,
    PositiveFraction,
    check_arguments,
    locate,
    merged_with_preset,
    split_target,
    target_name,
    to_dict,
    validate,
)

Betas = Annotated[
    list[Annotated[float, Limits(ge=0, lt=1)]],
    Limits(min_length=2, max_length=2),
    Example([0.9, 0.999]),
]
MATCHERS = ("match", "regex", "module_class")
POSITIONS_AND_TOKENS = (
    "*pos_emb*",
    "*pos_enc*",
    "*position*_emb*",
    "*position*_enc*",
    "*rel_pos*",
    "*relative_position*",
    "*attention_biases",
    "pos_bias_[uv]",
    "class_embedding",
    "cls_emb*",
    "*_token",
    "*_token[0-9]",
    "*_tokens",
)
"""Names of position embeddings and of class, distillation, register, mask and query tokens."""
NO_DECAY = (
    *POSITIONS_AND_TOKENS,
    "gamma",
    "gamma_*",
    "gamma[0-9]",
    "lambda_[0-9]",
    "lambda[0-9]",
    "ls[0-9]",
    "*layer_scale*",
    "*layerscale*",
    "*logit_scale*",
    "A_log",
)
"""The default of `no_decay`: also layer scales, logit scales, and rates of state-space models."""


class WeightDecayOn(Choice):
    """Which parameters decay."""

    matrices = "matrices"
    """Parameters with at least two dimensions larger than 1, and the weights of linear, convolution
    and recurrent layers; not embeddings, normalization layers, biases, what a module's
    `no_weight_decay()` names, or what matches `no_decay`."""
    all = "all"
    """Every trained parameter."""


class Resume(Choice):
    """Which settings apply when a run is resumed from a checkpoint."""

    checkpoint = "checkpoint"
    """The checkpoint's, except for settings that the config has changed since."""
    config = "config"
    """The config's."""


@dataclass
class GroupConfig(BaseConfig):
    """A parameter group with its own settings, selected by exactly one matcher.

    Example:
        >>> GroupConfig(name="head", match="net.head.*", lr_scale=10).lr_scale
        10
    """

    name: str = MISSING
    """Name of the group in tables and metric keys: letters, digits, `_` and `.`. Its parameters
    that do not decay form the group `<name>_no_decay` (required; torch.optim, param_groups)."""
    match: str | None = None
    """Glob over parameter names, such as `net.head.*`; `*` also matches dots (default: null; Python
    fnmatch)."""
    regex: Annotated[str | None, Example(r"head\.")] = None
    """Regular expression that is searched for in parameter names (default: null; Python
    re.search)."""
    module_class: str | None = None
    """Class of the modules that own the parameters, directly or through a submodule: `LayerNorm`,
    or a full path such as `my_project.layers.Router` (default: null; Python isinstance)."""
    lr_scale: Annotated[Positive, Example(0.1)] = 1.0
    """Factor on the learning rate, above 0 (default: 1; Howard & Ruder 2018, arXiv 1801.06146,
    section 3.2)."""
    weight_decay: Annotated[NotNegative, Example(0.01)] | None = None
    """Overrides the optimizer's weight_decay for the parameters of the group that decay. Biases and
    others in `<name>_no_decay` keep 0, unless `weight_decay_on=all` (default: null, not overridden;
    torch.optim, per-parameter options)."""
    weight_decay_on: WeightDecayOn | None = None
    """Overrides the optimizer's weight_decay_on: with `all`, the biases of the group decay too
    (default: null, not overridden; torch.optim, per-parameter options)."""
    betas: Betas | None = None
    """Overrides the optimizer's betas (default: null, not overridden; torch.optim, per-parameter
    options)."""
    eps: Annotated[Positive, Example(1e-8)] | None = None
    """Overrides the optimizer's eps (default: null, not overridden; torch.optim, per-parameter
    options)."""


@dataclass
class LayerDecayConfig(BaseConfig):
    """Layer-wise learning-rate decay, from the output to the input, for fine-tuning.

    The last layer trains with `rate` times the learning rate, the layer below with `rate**2` times,
    and so on. The stem counts as one layer below the first: position embeddings and tokens next to
    the layers, and modules that are registered before the layers in the module that contains them.
    All other parameters are the head, which trains with the full rate. The members of the stem and
    of the head are logged.

    Example:
        >>> LayerDecayConfig(pattern="net.blocks.*", rate=0.75).rate
        0.75
    """

    pattern: str | None = None
    """Path of the layers, with `*` for the layer's number: `net.blocks.*` (default: null, off; Bao
    et al. 2022, arXiv 2106.08254)."""
    rate: Annotated[PositiveFraction, Example(0.75)] | None = None
    """Factor from a layer to the layer below, above 0 and at most 1 (default: null, off;
    Clark et al. 2020, arXiv 2003.10555, appendix B; Bao et al. 2022, arXiv 2106.08254)."""


NoDecay = Annotated[list[str], Example(["*_token", "*pos_embed*"])]
Groups = Annotated[
    list[GroupConfig], Example([{"name": "head", "match": "net.head.*", "lr_scale": 10}])
]


@dataclass
class AdamConfig(BaseConfig):
    """Adam and AdamW, with torch's argument names. The presets `adam` and `adamw` differ in decay.

    Example:
        >>> AdamConfig(lr=3e-4, betas=[0.9, 0.95]).eps
        1e-08
    """

    lr: Positive = 1e-3
    """Peak learning rate, above 0 (default: 1e-3; Kingma & Ba 2015, arXiv 1412.6980, alg. 1)."""
    betas: Betas = field(default_factory=lambda: [0.9, 0.999])
    """Decay rates of the first and second moment, each in [0, 1) (default: [0.9, 0.999];
    Kingma & Ba 2015, arXiv 1412.6980, alg. 1)."""
    eps: Positive = 1e-8
    """Added to the denominator, above 0, and not 0 in the parameters' dtype (default: 1e-8;
    Kingma & Ba 2015, arXiv 1412.6980, alg. 1)."""
    weight_decay: Annotated[NotNegative, Example(0.01)] = 0.0
    """Weight decay coefficient, at least 0 (default: 0 for `adam`, 0.01 for `adamw`; Loshchilov &
    Hutter 2019, arXiv 1711.05101, section 2)."""
    amsgrad: bool = False
    """Divide by the largest second moment so far (default: false; Reddi et al. 2018,
    arXiv 1904.09237, alg. 2)."""
    maximize: bool = False
    """Maximize the objective (default: false; torch.optim.Adam)."""
    decoupled_weight_decay: bool = False
    """Shrink the weights (AdamW) instead of adding to the gradient (Adam with L2) (default: false
    for `adam`, true for `adamw`; Loshchilov & Hutter 2019, arXiv 1711.05101, alg. 2)."""
    fused: bool | None = None
    """Run the step in one kernel; null uses it wherever it is supported (default: null;
    torch.optim.Adam)."""
    foreach: bool | None = None
    """Run the step in one call for all tensors; null: chosen automatically (default: null;
    torch.optim.Adam)."""
    capturable: bool = False
    """Safe to capture in a CUDA graph (default: false; torch.optim.Adam)."""
    weight_decay_on: WeightDecayOn = WeightDecayOn.matrices
    """Which parameters decay: `matrices` (no biases, normalization layers, embeddings, tokens or
    scales) or `all` (default: matrices; Radford et al. 2018, section 4.1, and every GPT since)."""
    no_decay: NoDecay = field(default_factory=lambda: list(NO_DECAY))
    """Globs over the names of parameters that do not decay under `matrices`. A pattern without a
    dot is compared with the last part of a name, and one with a dot with all of it (default: the
    usual names of position embeddings, tokens, layer scales and logit scales; timm,
    no_weight_decay)."""
    groups: Groups = field(default_factory=list)
    """Parameter groups with their own settings, `[{name: head, match: net.head.*, lr_scale: 10}]`;
    the first match wins (default: []; torch.optim, per-parameter options)."""
    layer_decay: LayerDecayConfig = field(default_factory=LayerDecayConfig)
    """Layer-wise learning-rate decay (default: off; Clark et al. 2020, arXiv 2003.10555, appendix
    B)."""
    resume: Resume = Resume.checkpoint
    """Which settings a resumed run uses: `checkpoint`, the checkpoint's except for those that the
    config has changed since, or `config`, the config's (default: checkpoint; lightning_adam)."""


@dataclass
class CustomOptimizerConfig(BaseConfig):
    """Any Adam-like class by its `_target_`, which receives all other keys.

    `weight_decay_on` is `all` by default, as in torch. `matrices`, `no_decay`, `groups`,
    `layer_decay` and `resume` work as they do for Adam.
    """

    factory: functools.partial[Any] = field(init=False)
    weight_decay_on: WeightDecayOn = WeightDecayOn.all
    no_decay: NoDecay = field(default_factory=lambda: list(NO_DECAY))
    groups: Groups = field(default_factory=list)
    layer_decay: LayerDecayConfig = field(default_factory=LayerDecayConfig)
    resume: Resume = Resume.checkpoint


PLUGIN_KEYS = tuple(entry.name for entry in fields(CustomOptimizerConfig) if entry.init)
"""The keys of an optimizer's config that are not arguments of the optimizer."""

OptimizerConfig = AdamConfig | CustomOptimizerConfig


def parse_optimizer(node: Any, path: ConfigPath | None = None) -> ParsedConfig[OptimizerConfig]:
    """Parses an optimizer config in any form.

    Args:
        node: A composed Hydra node, a dict, an `AdamConfig` or a `functools.partial`. A parsed
            config is returned as it is.
        path: Its path (default: None, where the node is in its config, or `optimizer`).

    Raises:
        ConfigError: If a key is unknown or a value is out of range.

    Example:
        >>> parse_optimizer({"lr": 0.01, "betas": [0.9, 0.95]}).config.betas
        [0.9, 0.95]
        >>> parse_optimizer({"lrr": 1})
        Traceback (most recent call last):
        lightning_adam.config.errors.ConfigError: lrr=1 is not a setting. Use for example lr=1
    """
    if isinstance(node, ParsedConfig):
        return node
    path = path or locate(node, "optimizer")
    split = split_target(node, path, PLUGIN_KEYS)
    config: OptimizerConfig
    if split is None:
        config = validate(AdamConfig, to_dict(node, path), path)
        if config.fused and config.foreach:
            problem = f"cannot be combined with {(path / 'fused').assignment(True)}"
            raise (path / "foreach").invalid(True, problem, None)
    else:
        target, own = split
        if {entry.name for entry in fields(AdamConfig)} <= {*target.keywords, *own}:
            raise merged_with_preset(path, target_name(target), "lightning_adam/optimizer")
        check_arguments(target, path)
        config = validate(CustomOptimizerConfig, own, path)
        config.factory = target
    _check_groups(config.groups, path / "groups")
    _check_no_decay(config, path)
    _check_layer_decay(config.layer_decay, path / "layer_decay")
    return ParsedConfig(config, path)


def _check_no_decay(config: OptimizerConfig, path: ConfigPath) -> None:
    """Raises if `no_decay` is set but has no effect, because every parameter decays."""
    choices = {config.weight_decay_on, *(group.weight_decay_on for group in config.groups)}
    if WeightDecayOn.matrices not in choices and config.no_decay != list(NO_DECAY):
        raise (path / "no_decay").error(
            f"has no effect with {(path / 'weight_decay_on').assignment('all')}",
            (path / "weight_decay_on").suggest("matrices"),
            config.no_decay,
        )


def _check_groups(groups: list[GroupConfig], path: ConfigPath) -> None:
    used = ["decay", "no_decay"]
    for index, group in enumerate(groups):
        name = path / index / "name"
        if group.name == MISSING:
            raise name.required()
        if not re.fullmatch(r"[A-Za-z0-9_.]+", group.name):
            raise name.invalid(group.name, "must consist of letters, digits, . and _", "head")
        names = [group.name, f"{group.name}_no_decay"]
        if not set(names).isdisjoint(used):
            problem = f"is already used by one of the groups {', '.join(used)}"
            raise name.invalid(group.name, problem, f"{group.name}_{index}")
        used += names
    for index, group in enumerate(groups):
        _check_matcher(group, path / index)


def _check_matcher(group: GroupConfig, path: ConfigPath) -> None:
    given = [matcher for matcher in MATCHERS if getattr(group, matcher) is not None]
    if len(given) != 1:
        suggestion = (path / (given[-1] if given else "match")).suggest(
            None if given else "net.head.*"
        )
        raise path.error(
            f"({group.name}) needs exactly one of {', '.join(MATCHERS)}, not"
            f" {' and '.join(given) or 'none'}",
            suggestion,
        )
    if group.regex is not None:
        try:
            re.compile(group.regex)
        except (re.error, OverflowError, RecursionError) as error:
            problem = f"is not a regular expression: {error}"
            raise (path / "regex").invalid(group.regex, problem, r"head\.") from error


def _check_layer_decay(layer_decay: LayerDecayConfig, path: ConfigPath) -> None:
    pattern, rate = layer_decay.pattern, layer_decay.rate
    if pattern is None and rate is not None:
        raise (path / "pattern").invalid(None, "is required with a rate", "net.blocks.*")
    if rate is None and pattern is not None:
        raise (path / "rate").invalid(None, "is required with a pattern", 0.75)
    if pattern is not None and "*" not in pattern.split("."):
        example = f"{pattern.rstrip('.')}.*"
        problem = "must have a * in place of the layer's number"
        raise (path / "pattern").invalid(pattern, problem, example)
