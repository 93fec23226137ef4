"""Module → named parameter groups: which parameters share settings, and which ones decay."""

import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hydra.utils import get_class
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_adam.config.errors import ConfigError, ConfigPath, nearest
from lightning_adam.config.optimizer import (
    GroupConfig,
    LayerDecayConfig,
    OptimizerConfig,
    WeightDecayOn,
)
from lightning_adam.statistics.names import clean_name, group_name

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMALIZATIONS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.SyncBatchNorm,
)


LR_SCALE = "lr_scale"
"""Key of a group's learning rate as a multiple of the optimizer's."""
DEFAULT_GROUP = -1
"""The index of parameters that none of the config's `groups` matches."""


def peak_lr(group: Mapping[str, Any]) -> Any:
    """Returns the peak learning rate of a group, which schedulers store as `initial_lr`.

    Example:
        >>> peak_lr({"lr": 0.5, "initial_lr": 2.0}), peak_lr({"lr": 0.5})
        (2.0, 0.5)
    """
    return group.get("initial_lr", group["lr"])


def lr_factor(group: Mapping[str, Any]) -> Any:
    """Returns the current learning rate of a group as a fraction of its peak.

    Example:
        >>> lr_factor({"lr": 0.5, "initial_lr": 2.0}), lr_factor({"lr": 0.0})
        (0.25, 0.0)
    """
    peak = peak_lr(group)
    return group["lr"] / peak if peak else 0.0


def param_groups(
    module: nn.Module,
    config: OptimizerConfig,
    path: ConfigPath,
    hyperparameters: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Sorts the trained parameters of a module into named groups.

    Without `groups` and `layer_decay` the groups are `decay` and `no_decay`. They depend on the
    module and on `weight_decay_on` alone, not on the value of weight_decay, so that runs with and
    without decay have the same metric keys and can load each other's state. Each entry of `groups`
    forms a group of its own; its parameters that do not decay form `<name>_no_decay`. With
    `layer_decay` each layer has its own pair, `layer_<number>`, and so have the modules below the
    first layer, `stem`.

    A shared parameter belongs to one group, under its first name. It is matched by any of its
    names, and does not decay if any of its owners is an embedding or a normalization layer. Frozen
    parameters belong to no group.

    Args:
        module: The module to train.
        config: The config; `weight_decay_on`, `groups` and `layer_decay` are used.
        path: Its place, for errors.
        hyperparameters: The optimizer's arguments; `lr` and `weight_decay` are used.

    Returns:
        Groups for a torch optimizer, each with its `name`, its `params` and their `param_names`.
        Empty groups are omitted.

    Raises:
        ConfigError: If nothing is trained, a parameter is uninitialized, or a group or the layer
            decay matches no parameter.

    Example:
        >>> from lightning_adam.config.optimizer import AdamConfig
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        >>> path = ConfigPath("optimizer")
        >>> groups = param_groups(net, AdamConfig(), path, {"weight_decay": 0.1})
        >>> [(group["name"], group["param_names"]) for group in groups]
        [('decay', ['0.weight']), ('no_decay', ['0.bias', '1.weight', '1.bias'])]
    """
    parameters = _parameters(module)
    if not any(each.is_trained for each in parameters):
        raise ConfigError(
            f"{type(module).__name__} has no parameter with requires_grad=True",
            "Unfreeze at least one parameter",
        )
    no_decay = _no_decay(module, config.weight_decay_on)
    group_of = _match_groups(parameters, config.groups, path / "groups")
    layers = _layers(parameters, config.layer_decay, path / "layer_decay")
    buckets: dict[tuple[int, _Layer, bool], list[_Parameter]] = defaultdict(list)
    for each, index, layer in zip(parameters, group_of, layers, strict=True):
        if each.is_trained:
            buckets[index, layer, id(each.parameter) in no_decay].append(each)
    _check_decay(buckets, config.groups, path)
    groups: dict[str, dict[str, Any]] = {}
    for index, layer, is_no_decay in sorted(buckets):
        group = GroupConfig(name="") if index == DEFAULT_GROUP else config.groups[index]
        bucket = buckets[index, layer, is_no_decay]
        name = _name(group, layer, is_no_decay)
        if name in groups:
            problem = "is taken by the group of a layer"
            example = f"{group.name}_{index}"
            raise (path / "groups" / index / "name").invalid(group.name, problem, example)
        groups[name] = {
            "name": name,
            "params": [each.parameter for each in bucket],
            "param_names": [each.names[0] for each in bucket],
            LR_SCALE: group.lr_scale * layer.lr_scale,
            **_settings(group, layer, is_no_decay, hyperparameters, path),
        }
    return list(groups.values())


def later_groups(
    module: nn.Module,
    optimizer: Optimizer,
    group: Mapping[str, Any],
    weight_decay_on: WeightDecayOn,
) -> list[dict[str, Any]]:
    """Names and splits a group for `add_param_group`.

    Args:
        module: The module to train.
        optimizer: The optimizer with the first groups.
        group: The argument of `add_param_group`. Its `lr` is the current learning rate, from which
            the schedule continues.
        weight_decay_on: Which parameters decay, unless the group has its own weight_decay.

    Returns:
        The group, and a second one for the parameters that do not decay, if any.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        >>> from torch.optim import AdamW
        >>> adam = AdamW([{"params": net[0].parameters(), "name": "decay"}])
        >>> groups = later_groups(net, adam, {"params": net[1].parameters()}, "matrices")
        >>> [(each["name"], each["param_names"]) for each in groups]
        [('group_1', ['1.weight']), ('group_1_no_decay', ['1.bias'])]
    """
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else list(params)
    if not all(isinstance(each, Tensor) for each in params):
        return [{**group, "params": params}]
    names = {id(each): clean_name(name) for name, each in module.named_parameters()}
    name = group_name(group, len(optimizer.param_groups))
    common = _with_schedule(optimizer, group)
    if common.get("lr") == 0:
        rank_zero_warn(
            f"{name} is added with lr=0, and its learning rate will stay 0. Add it after the first"
            " step of the warm-up, or set its lr."
        )
    is_decay_set = "weight_decay" in group or "weight_decay" not in optimizer.defaults
    no_decay = set() if is_decay_set else _no_decay(module, weight_decay_on)
    buckets = [
        (name, [each for each in params if id(each) not in no_decay], {}),
        (
            f"{name}_no_decay",
            [each for each in params if id(each) in no_decay],
            {"weight_decay": 0.0},
        ),
    ]
    return [
        {
            **common,
            **own,
            "name": name,
            "params": bucket,
            "param_names": [
                names.get(id(each), f"{name}.{position}") for position, each in enumerate(bucket)
            ],
        }
        for name, bucket, own in buckets
        if bucket
    ]


def _with_schedule(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with its place in the schedule of the optimizer's first group."""
    first, lr = optimizer.param_groups[0], optimizer.defaults.get("lr")
    if lr is None:
        return dict(group)
    factor = lr_factor(first)
    if "lr" not in group:
        scheduled = {**group, "lr": lr * factor, "initial_lr": lr}
    else:
        scheduled = {**group, "initial_lr": group["lr"] / factor if factor else group["lr"]}
    scheduled[LR_SCALE] = scheduled["initial_lr"] / lr
    return scheduled


@dataclass(frozen=True)
class _Parameter:
    """A parameter, all its names, and all modules that contain it."""

    parameter: nn.Parameter
    names: list[str]
    modules: list[nn.Module]

    @property
    def is_trained(self) -> bool:
        return self.parameter.requires_grad


class _Layer(NamedTuple):
    """A layer between input and output, and its factor on the learning rate."""

    depth: int
    name: str
    lr_scale: float


def _parameters(module: nn.Module) -> list[_Parameter]:
    parameters: dict[int, _Parameter] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if is_lazy(parameter):
            raise ConfigError(
                f"{name} is uninitialized",
                "Run one batch through the model in `setup` or `configure_model`",
            )
        entry = parameters.setdefault(id(parameter), _Parameter(parameter, [], []))
        entry.names.append(clean_name(name))
    for owner in module.modules():
        for parameter in owner.parameters():
            parameters[id(parameter)].modules.append(owner)
    return list(parameters.values())


def _no_decay(module: nn.Module, weight_decay_on: WeightDecayOn) -> set[int]:
    """The ids of the parameters that do not decay."""
    if weight_decay_on == WeightDecayOn.all:
        return set()
    return {
        id(parameter)
        for owner in module.modules()
        for parameter in owner.parameters(recurse=False)
        if parameter.ndim < 2 or isinstance(owner, EMBEDDINGS + NORMALIZATIONS)
    }


def _match_groups(
    parameters: list[_Parameter], groups: Sequence[GroupConfig], path: ConfigPath
) -> list[int]:
    """The index of the first group that matches each parameter."""
    group_of = [DEFAULT_GROUP] * len(parameters)
    for index, group in enumerate(groups):
        place = path / index
        matched = _matches(parameters, group, place)
        if not any(parameters[position].is_trained for position in matched):
            rank_zero_warn(
                f"{place.name} ({group.name}) matches only frozen parameters, such as"
                f" {parameters[matched[0]].names[0]}. It has no effect."
            )
            continue
        free = [position for position in matched if group_of[position] == DEFAULT_GROUP]
        if not any(parameters[position].is_trained for position in free):
            taken = set(matched) - set(free)
            earlier = ", ".join(sorted({groups[group_of[position]].name for position in taken}))
            raise place.error(
                f"({group.name}) matches only parameters that belong to {earlier}",
                f"Put {group.name} before {earlier}",
            )
        for position in free:
            group_of[position] = index
    return group_of


def _matches(parameters: list[_Parameter], group: GroupConfig, path: ConfigPath) -> list[int]:
    """The positions of the parameters that a group matches, including frozen ones."""
    names = [name for each in parameters for name in each.names]
    if group.module_class is not None:
        key, pattern = "module_class", group.module_class
        known = [type(module).__name__ for each in parameters for module in each.modules]
        instances = {id(module) for module in _instances(parameters, pattern, path / key)}
        is_match = [any(id(module) in instances for module in each.modules) for each in parameters]
    elif group.regex is not None:
        key, pattern, known = "regex", group.regex, names
        is_match = [any(re.search(pattern, name) for name in each.names) for each in parameters]
    else:
        key, pattern, known = "match", str(group.match), names
        is_match = [any(fnmatch.fnmatchcase(n, pattern) for n in each.names) for each in parameters]
    positions = [position for position, matches in enumerate(is_match) if matches]
    if not positions:
        raise _no_match(path / key, pattern, known)
    return positions


def _instances(parameters: list[_Parameter], name: str, path: ConfigPath) -> list[nn.Module]:
    """The modules of a class or of a subclass, by the class's name or full path."""
    modules = [module for each in parameters for module in each.modules]
    if "." not in name:
        return [each for each in modules if name in {kind.__name__ for kind in type(each).__mro__}]
    try:
        kind = get_class(name)
    except (ImportError, ValueError) as error:
        problem = f"cannot be imported: {' '.join(str(error).split())}"
        raise path.invalid(name, problem, name.rpartition(".")[2] or "LayerNorm") from error
    return [each for each in modules if isinstance(each, kind)]


def _layers(
    parameters: list[_Parameter], layer_decay: LayerDecayConfig, path: ConfigPath
) -> list[_Layer]:
    """The layer of each parameter; one layer for all without layer decay."""
    if layer_decay.pattern is None or layer_decay.rate is None:
        return [_Layer(0, "", 1.0)] * len(parameters)
    parts = (
        r"(\d+)" if part == "*" else re.escape(part) for part in layer_decay.pattern.split(".")
    )
    pattern = re.compile(r"\.".join(parts) + r"\.")
    found = [next(filter(None, map(pattern.match, each.names)), None) for each in parameters]
    numbers = [match and tuple(map(int, match.groups())) for match in found]
    layers = sorted({number for number in numbers if number})
    if not layers:
        names = [name for each in parameters for name in each.names]
        numbered = [re.sub(r"\.\d+\..*", ".*", name) for name in names]
        known = [name for name in numbered if name.endswith(".*")]
        raise _no_match(path / "pattern", layer_decay.pattern, known)
    first = next(position for position, number in enumerate(numbers) if number)
    head = len(layers) + 1
    result = []
    for position, number in enumerate(numbers):
        if number:
            depth, name = layers.index(number) + 1, "_".join(map(str, ("layer", *number)))
        else:
            depth, name = (0, "stem") if position < first else (head, "")
        result.append(_Layer(depth, name, layer_decay.rate ** (head - depth)))
    return result


def _no_match(path: ConfigPath, pattern: str, known: list[str]) -> ConfigError:
    # Without a cutoff the result is empty only if there are no names.
    close = nearest(pattern.replace("*", ""), dict.fromkeys(known), 3, cutoff=0.0)
    problem = f"matches nothing; the nearest are {', '.join(close)}" if close else "matches nothing"
    return path.invalid(pattern, problem, close[0] if close else None)


def _name(group: GroupConfig, layer: _Layer, is_no_decay: bool) -> str:
    parts = (group.name, layer.name, "no_decay" if is_no_decay else "")
    return "_".join(filter(None, parts)) or "decay"


def _settings(
    group: GroupConfig,
    layer: _Layer,
    is_no_decay: bool,
    hyperparameters: Mapping[str, Any],
    path: ConfigPath,
) -> dict[str, Any]:
    """The settings of a group that differ from the optimizer's."""
    settings: dict[str, Any] = {}
    lr_scale = group.lr_scale * layer.lr_scale
    if lr_scale != 1:
        lr = hyperparameters.get("lr")
        if not isinstance(lr, int | float):
            problem = "must be a number, which groups and layer_decay scale"
            raise (path / "lr").invalid(lr, problem, 0.001)
        settings["lr"] = lr * lr_scale
    weight_decay = group.weight_decay
    if weight_decay is None:
        weight_decay = hyperparameters.get("weight_decay")
    if weight_decay is not None:
        settings["weight_decay"] = 0.0 if is_no_decay else weight_decay
    if group.betas is not None:
        settings["betas"] = (group.betas[0], group.betas[1])
    if group.eps is not None:
        settings["eps"] = group.eps
    return settings


def _check_decay(
    buckets: Iterable[tuple[int, _Layer, bool]], groups: Sequence[GroupConfig], path: ConfigPath
) -> None:
    """Raises if a group has its own weight_decay and no parameter that decays."""
    decaying = {index for index, _, is_no_decay in buckets if not is_no_decay}
    for index in {index for index, _, _ in buckets} - decaying - {DEFAULT_GROUP}:
        group = groups[index]
        if group.weight_decay:
            raise (path / "groups" / index / "weight_decay").error(
                f"has no effect: with weight_decay_on=matrices no parameter of {group.name} decays",
                (path / "weight_decay_on").suggest("all"),
                value=group.weight_decay,
            )
