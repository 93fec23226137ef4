"""Plans parameter groups: the group, layer and settings of each parameter, also frozen ones."""

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

from lightning_adam._compat.torch import flat_shapes, is_flat_parameter, is_fsdp1_parameter
from lightning_adam.config.errors import ConfigError, ConfigPath, nearest
from lightning_adam.config.optimizer import (
    NO_DECAY,
    POSITIONS_AND_TOKENS,
    GroupConfig,
    LayerDecayConfig,
    OptimizerConfig,
    WeightDecayOn,
)
from lightning_adam.optim.console import log_info
from lightning_adam.optim.weight_decay import is_matrix, matches, no_decay
from lightning_adam.statistics.names import group_name, named_parameters

LR_SCALE = "lr_scale"
"""Key of a group's factor on the optimizer's learning rate."""
DEFAULT_GROUP = -1
"""Group index of parameters that match none of the config's `groups`."""
HEAD_NAME = re.compile(
    r"(^|_)(heads?|classifier|fc|decoder|out|outputs?|logits?|unembed|loss|criterion)(_|$)"
)
"""Names of modules that are never part of the stem, wherever they are registered."""
INPUT_NAME = re.compile(r"emb|stem|patch|wte|wpe|conv_in|(^|_)inputs?(_|$)")
"""Names of modules that are part of the stem even if they are not next to the layers."""


def peak_lr(group: Mapping[str, Any]) -> Any:
    """Returns the peak learning rate of a group: `initial_lr`, or `lr` without a schedule.

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


class _Layer(NamedTuple):
    """A layer, its depth from the input, and its factor on the learning rate."""

    depth: int
    name: str
    lr_scale: float


class _Bucket(NamedTuple):
    """The properties that the parameters of a group share."""

    group: int
    """The index of the group in the config's `groups`, or DEFAULT_GROUP."""
    layer: _Layer
    is_no_decay: bool


@dataclass(frozen=True)
class _Parameter:
    """A parameter, with all its names and all modules that contain it."""

    parameter: nn.Parameter
    names: list[str]
    modules: list[nn.Module]

    @property
    def is_trained(self) -> bool:
        return self.parameter.requires_grad


@dataclass(frozen=True)
class Plan:
    """The group, layer and settings of each parameter of a module; see `make_plan`."""

    config: OptimizerConfig
    path: ConfigPath
    hyperparameters: Mapping[str, Any]
    parameters: list[_Parameter]
    buckets: dict[int, _Bucket]
    """By the ids of the parameters."""

    @property
    def names(self) -> list[str]:
        """The names of all parameters, in the order of `module.parameters()`."""
        return [each.names[0] for each in self.parameters]

    def has_all(self, params: Iterable[Any]) -> bool:
        """Returns whether all parameters, or pairs of a name and a parameter, are the module's."""
        parameters = (each[1] if isinstance(each, tuple) else each for each in params)
        return all(id(each) in self.buckets for each in parameters)

    def path_of(self, parameter: Tensor, name: str) -> ConfigPath:
        """Returns the path of the config, a group's or the optimizer's, that sets `name`."""
        bucket = self.buckets.get(id(parameter))
        index = DEFAULT_GROUP if bucket is None else bucket.group
        if index != DEFAULT_GROUP and getattr(self.config.groups[index], name) is not None:
            return self.path / "groups" / index
        return self.path

    def first_groups(self) -> list[dict[str, Any]]:
        """Returns the groups of the parameters that are trained from the start.

        Without `groups` and `layer_decay` they are `decay` and `no_decay`. They do not depend on
        the value of weight_decay, so runs with and without decay have the same metric keys and can
        load each other's state. Each entry of the config's `groups` forms its own group; its
        parameters that do not decay form `<name>_no_decay`. With `layer_decay`, each layer has its
        own pair, `layer_<number>`, and so has the `stem` below the first layer.

        Returns:
            Groups for a torch optimizer, each with its `name`, its `params` and their
            `param_names`. Empty groups are omitted.

        Raises:
            ConfigError: If two groups have the same name.
        """
        buckets: dict[_Bucket, list[_Parameter]] = defaultdict(list)
        for each in self.parameters:
            if each.is_trained:
                buckets[self.buckets[id(each.parameter)]].append(each)
        groups: dict[str, dict[str, Any]] = {}
        for bucket in sorted(buckets):
            name = "_".join(self._parts(bucket)) or "decay"
            if name in groups:
                given = self.config.groups[bucket.group].name
                problem = "is already used by the group of a layer"
                path = self.path / "groups" / bucket.group / "name"
                raise path.invalid(given, problem, f"{given}_{bucket.group}")
            lr_scale = self._lr_scale(bucket)
            groups[name] = {
                "name": name,
                "params": [each.parameter for each in buckets[bucket]],
                "param_names": [each.names[0] for each in buckets[bucket]],
                LR_SCALE: lr_scale,
                **self._lr(lr_scale),
                **self._weight_decay(bucket),
                **self._settings(bucket),
            }
        return list(groups.values())

    def later_groups(self, optimizer: Optimizer, group: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Splits and names a group for `add_param_group`, and gives it the planned settings.

        Each part has the learning rate of its layer, and the betas, eps and weight_decay of its
        group in the config, unless the added group has these keys. If the added group has an `lr`,
        its uppermost layer trains with it and the schedule continues from it. The layers below keep
        their ratio to that layer.

        Args:
            optimizer: The optimizer with the first groups.
            group: The argument of `add_param_group`.

        Returns:
            The parts. There are several if only some parameters decay, or if the parameters belong
            to several layers or to several groups of the config.

        Example:
            >>> from torch.optim import AdamW
            >>> from lightning_adam.config.optimizer import AdamConfig
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
            >>> adam = AdamW([{"params": net[0].parameters(), "name": "decay"}])
            >>> plan = make_plan(net, AdamConfig(), ConfigPath("optimizer"), {})
            >>> groups = plan.later_groups(adam, {"params": net[1].parameters()})
            >>> [(each["name"], each["param_names"]) for each in groups]
            [('group_1', ['1.weight']), ('group_1_no_decay', ['1.bias'])]
        """
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        given = [each if isinstance(each, tuple) else (None, each) for each in params]
        if not all(isinstance(each, Tensor) for _, each in given):
            return [{**group, "params": params}]
        name = group_name(group, len(optimizer.param_groups))
        is_decay_set = "weight_decay" in group or "weight_decay" not in optimizer.defaults
        names = {id(each.parameter): each.names[0] for each in self.parameters}
        buckets: dict[_Bucket, list[tuple[str, Tensor]]] = defaultdict(list)
        for position, (own, parameter) in enumerate(given):
            bucket = self._bucket_of(parameter)
            known = names.get(id(parameter), own or f"{name}.{position}")
            bucket = bucket._replace(is_no_decay=bucket.is_no_decay and not is_decay_set)
            buckets[bucket].append((known, parameter))
        layers = {(bucket.group, bucket.layer) for bucket in buckets}
        largest = max(map(self._lr_scale, buckets), default=1.0)
        parts = []
        # BackboneFinetuning sets the learning rate of the last part only.
        for bucket in sorted(buckets, key=lambda each: (self._lr_scale(each), each)):
            own_parts = self._parts(bucket)
            if len(layers) == 1:
                own_parts = ["no_decay"] if bucket.is_no_decay else []
            scale = self._lr_scale(bucket)
            lr = _scheduled_lr(optimizer, group, scale, largest)
            part = {
                **({} if is_decay_set else self._later_weight_decay(bucket)),
                **self._settings(bucket),
                **group,
                **lr,
                "name": "_".join([name, *own_parts]),
                "params": [parameter for _, parameter in buckets[bucket]],
                "param_names": [each for each, _ in buckets[bucket]],
            }
            if part.get("lr") == 0:
                rank_zero_warn(
                    f"{part['name']} is added with lr=0, so its learning rate will stay 0. Add it"
                    " after the first step of the warm-up, or set its lr."
                )
            parts.append(part)
        return parts

    def layer_lines(self) -> list[str]:
        """Returns lines that show the stem and head of `layer_decay`; empty if it is off.

        Example:
            >>> from lightning_adam.config.optimizer import AdamConfig
            >>> net = nn.ModuleDict({"stem": nn.Linear(1, 2), "head": nn.Linear(2, 1)})
            >>> net["layers"] = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
            >>> config = AdamConfig(layer_decay=LayerDecayConfig("layers.*", 0.5))
            >>> plan = make_plan(net, config, ConfigPath("optimizer"), {"lr": 0.1})
            >>> plan.layer_lines()
            ['layer_decay: stem (lr * 0.125): stem', 'layer_decay: head (lr * 1): head']
        """
        pattern = self.config.layer_decay.pattern
        if pattern is None:
            return []
        found: dict[_Layer, dict[str, None]] = defaultdict(dict)
        for each in self.parameters:
            layer = self.buckets[id(each.parameter)].layer
            if layer.name in ("stem", ""):
                found[layer][_member(each.names[0], _container(pattern))] = None
        return [
            f"layer_decay: {layer.name or 'head'} (lr * {layer.lr_scale:.3g}): {', '.join(members)}"
            for layer, members in sorted(found.items())
        ]

    def _bucket_of(self, parameter: Tensor) -> _Bucket:
        """Returns the bucket of a parameter; one that is not in the module has no layer."""
        is_matrices = self.config.weight_decay_on == WeightDecayOn.matrices
        is_no_decay = is_matrices and not is_matrix(parameter.shape)
        default = _Bucket(DEFAULT_GROUP, _Layer(0, "", 1.0), is_no_decay)
        return self.buckets.get(id(parameter), default)

    def _group(self, bucket: _Bucket) -> GroupConfig:
        if bucket.group == DEFAULT_GROUP:
            return GroupConfig(name="")
        return self.config.groups[bucket.group]

    def _parts(self, bucket: _Bucket) -> list[str]:
        parts = (
            self._group(bucket).name,
            bucket.layer.name,
            "no_decay" if bucket.is_no_decay else "",
        )
        return [each for each in parts if each]

    def _lr_scale(self, bucket: _Bucket) -> float:
        return self._group(bucket).lr_scale * bucket.layer.lr_scale

    def _lr(self, lr_scale: float) -> dict[str, Any]:
        if lr_scale == 1:
            return {}
        lr = self.hyperparameters.get("lr")
        if not isinstance(lr, int | float):
            problem = "must be a number, which groups and layer_decay scale"
            raise (self.path / "lr").invalid(lr, problem, 0.001)
        return {"lr": lr * lr_scale}

    def _weight_decay(self, bucket: _Bucket) -> dict[str, Any]:
        own = self._group(bucket).weight_decay
        weight_decay = self.hyperparameters.get("weight_decay") if own is None else own
        if weight_decay is None:
            return {}
        return {"weight_decay": 0.0 if bucket.is_no_decay else weight_decay}

    def _later_weight_decay(self, bucket: _Bucket) -> dict[str, Any]:
        own = 0.0 if bucket.is_no_decay else self._group(bucket).weight_decay
        return {} if own is None else {"weight_decay": own}

    def _settings(self, bucket: _Bucket) -> dict[str, Any]:
        """Returns the other settings of the config's group."""
        group, settings = self._group(bucket), dict[str, Any]()
        if group.betas is not None:
            settings["betas"] = (group.betas[0], group.betas[1])
        if group.eps is not None:
            settings["eps"] = group.eps
        return settings


def make_plan(
    module: nn.Module,
    config: OptimizerConfig,
    path: ConfigPath,
    hyperparameters: Mapping[str, Any],
    root: nn.Module | None = None,
) -> Plan:
    """Assigns all parameters of a module, frozen ones included, to groups and layers.

    A shared parameter belongs to one group, under its first name. Patterns match any of its names.
    It does not decay if that holds for one of the modules that own it.

    Args:
        module: The module to train.
        config: The config; `weight_decay_on`, `no_decay`, `groups` and `layer_decay` are used.
        path: Its path, for errors.
        hyperparameters: The optimizer's arguments; `lr` and `weight_decay` are used.
        root: The module that contains FSDP1's wrappers (default: None, `module`).

    Raises:
        ConfigError: If no parameter is trained, one is uninitialized, a group or the layer decay
            matches none, or FSDP1 hides their shapes.

    Example:
        >>> from lightning_adam.config.optimizer import AdamConfig
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        >>> plan = make_plan(net, AdamConfig(), ConfigPath("optimizer"), {"weight_decay": 0.1})
        >>> [(group["name"], group["param_names"]) for group in plan.first_groups()]
        [('decay', ['0.weight']), ('no_decay', ['0.bias', '1.weight', '1.bias'])]
        >>> plan.names
        ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    parameters = _parameters(module)
    if not any(each.is_trained for each in parameters):
        raise ConfigError(
            f"{type(module).__name__} has no parameter with requires_grad=True",
            "Unfreeze at least one parameter",
        )
    choices = {
        DEFAULT_GROUP: config.weight_decay_on,
        **{
            index: group.weight_decay_on or config.weight_decay_on
            for index, group in enumerate(config.groups)
        },
    }
    no_decay_ids: set[int] = set()
    if WeightDecayOn.matrices in choices.values():
        shapes = _shapes(parameters, module if root is None else root, path)
        names = {id(each.parameter): each.names for each in parameters}
        no_decay_ids = no_decay(module, config.no_decay, names, shapes)
        _check_patterns(config, parameters, path)
    elif config.groups or config.layer_decay.pattern is not None:
        _check_unflattened(parameters, path)
    group_of = _match_groups(parameters, config.groups, path / "groups")
    layers = _layers(parameters, config.layer_decay, path / "layer_decay")
    buckets = {}
    for each, index, layer in zip(parameters, group_of, layers, strict=True):
        is_matrices = choices[index] == WeightDecayOn.matrices
        is_no_decay = is_matrices and id(each.parameter) in no_decay_ids
        buckets[id(each.parameter)] = _Bucket(index, layer, is_no_decay)
    _check_decay(buckets.values(), config, path)
    return Plan(config, path, hyperparameters, parameters, buckets)


def _scheduled_lr(
    optimizer: Optimizer, group: Mapping[str, Any], scale: float, largest: float
) -> dict[str, Any]:
    """Returns the learning rate of a part, at the point of the schedule of the first group."""
    base = optimizer.defaults.get("lr")
    if base is None:
        return {}
    factor = lr_factor(optimizer.param_groups[0])
    if "lr" not in group:
        scale = group.get(LR_SCALE, scale)
        return {"lr": base * scale * factor, "initial_lr": base * scale, LR_SCALE: scale}
    lr = group["lr"] * (1.0 if LR_SCALE in group else scale / largest)
    peak = lr / factor if factor else lr
    return {"lr": lr, "initial_lr": peak, LR_SCALE: peak / base}


def _parameters(module: nn.Module) -> list[_Parameter]:
    parameters: dict[int, _Parameter] = {}
    for name, parameter in named_parameters(module):
        if is_lazy(parameter):
            raise ConfigError(
                f"{name} is uninitialized",
                "Run one batch through the model in `setup` or `configure_model`",
            )
        entry = parameters.setdefault(id(parameter), _Parameter(parameter, [], []))
        entry.names.append(name)
    for owner in module.modules():
        for parameter in owner.parameters():
            parameters[id(parameter)].modules.append(owner)
    return list(parameters.values())


def _shapes(parameters: list[_Parameter], root: nn.Module, path: ConfigPath) -> dict[int, Any]:
    """Returns the unsharded shapes of sharded parameters, by their ids."""
    _check_unflattened(parameters, path)
    shapes: dict[int, Any] = flat_shapes(root)
    for each in parameters:
        key = id(each.parameter)
        # DeepSpeed's ZeRO stage 3 leaves an empty vector in place of a parameter.
        if hasattr(each.parameter, "ds_shape"):
            shapes[key] = each.parameter.ds_shape
        if is_fsdp1_parameter(each.parameter) and key not in shapes:
            raise path.error(
                f"cannot tell which parameters decay: FSDP1 has sharded {each.names[0]}, and its"
                " wrapper is outside of the module",
                "Use build_optimizer(module, optimizer, root=wrapped)",
            )
    return shapes


def _check_unflattened(parameters: list[_Parameter], path: ConfigPath) -> None:
    flattened = [each.names[0] for each in parameters if is_flat_parameter(each.parameter)]
    if flattened:
        raise path.error(
            "cannot tell which parameters decay or form a group: FSDP1 with use_orig_params=False"
            f" joins them into {flattened[0]}",
            "Use FullyShardedDataParallel(..., use_orig_params=True)",
        )


def _check_patterns(
    config: OptimizerConfig, parameters: list[_Parameter], path: ConfigPath
) -> None:
    """Warns if a pattern in `no_decay` that is not a default matches nothing."""
    names = [name for each in parameters for name in each.names]
    for pattern in config.no_decay:
        if pattern not in NO_DECAY and not any(matches(name, [pattern]) for name in names):
            close = nearest(pattern.replace("*", ""), names, 3, cutoff=0.0)
            rank_zero_warn(
                f"{(path / 'no_decay').name}: {pattern} matches nothing; the nearest are"
                f" {', '.join(close)}"
            )


def _match_groups(
    parameters: list[_Parameter], groups: Sequence[GroupConfig], path: ConfigPath
) -> list[int]:
    """Returns the index of the first group that matches each parameter."""
    group_of = [DEFAULT_GROUP] * len(parameters)
    for index, group in enumerate(groups):
        group_path = path / index
        matched = _matches(parameters, group, group_path)
        free = [position for position in matched if group_of[position] == DEFAULT_GROUP]
        if not free:
            earlier = ", ".join(sorted({groups[group_of[position]].name for position in matched}))
            raise group_path.error(
                f"({group.name}) matches only parameters that belong to {earlier}",
                f"Put {group.name} before {earlier}",
            )
        if not any(parameters[position].is_trained for position in free):
            log_info(
                f"{group_path.name} ({group.name}) has only frozen parameters, such as"
                f" {parameters[free[0]].names[0]}. It has no effect until they are trained."
            )
        for position in free:
            group_of[position] = index
    return group_of


def _matches(parameters: list[_Parameter], group: GroupConfig, path: ConfigPath) -> list[int]:
    """Returns the positions of the parameters that a group matches, including frozen ones."""
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
    """Returns the modules that are instances of a class, by the class's name or full path."""
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
    """Returns the layer of each parameter; the same layer for all without layer decay."""
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
    matched = [position for position, number in enumerate(numbers) if number]
    container = _container(layer_decay.pattern)
    head = len(layers) + 1
    latest, result = layers[0], []
    for position, (each, number) in enumerate(zip(parameters, numbers, strict=True)):
        if number is None and matched[0] < position < matched[-1]:
            # Between two layers of a container, such as a module that downsamples images.
            is_inside = each.names[0].split(".")[: len(container)] == container
            number = latest if is_inside else None
        if number is not None:
            latest = number
            depth, name = layers.index(number) + 1, "_".join(map(str, ("layer", *number)))
        else:
            is_stem = any(_is_stem(name, container, position < matched[0]) for name in each.names)
            depth, name = (0, "stem") if is_stem else (head, "")
        result.append(_Layer(depth, name, layer_decay.rate ** (head - depth)))
    return result


def _container(pattern: str) -> list[str]:
    """Returns the parts of the path of the module that contains the layers."""
    parts = pattern.split(".")
    return parts[: parts.index("*")]


def _is_stem(name: str, container: list[str], is_before: bool) -> bool:
    """Returns whether a parameter outside of all layers is below the first layer.

    Args:
        name: Its name.
        container: The parts of the path of the module that contains the layers.
        is_before: Whether it is registered before the first layer.
    """
    member = _member(name, container)
    own = member.rpartition(".")[2]
    is_beside = "." in member or len(container) <= 1
    if is_beside and matches(own, POSITIONS_AND_TOKENS):
        return True
    if member == name or not is_before or HEAD_NAME.search(own):
        return False
    return is_beside or bool(INPUT_NAME.search(own))


def _member(name: str, container: list[str]) -> str:
    """Returns the outermost module or parameter that contains a parameter, but not the layers."""
    parts, shared = name.split("."), 0
    while shared < min(len(parts) - 1, len(container)) and parts[shared] == container[shared]:
        shared += 1
    return ".".join(parts[: shared + 1])


def _no_match(path: ConfigPath, pattern: str, known: list[str]) -> ConfigError:
    # With this cutoff the result is empty only without names.
    close = nearest(pattern.replace("*", ""), dict.fromkeys(known), 3, cutoff=0.0)
    problem = f"matches nothing; the nearest are {', '.join(close)}" if close else "matches nothing"
    return path.invalid(pattern, problem, close[0] if close else None)


def _check_decay(buckets: Iterable[_Bucket], config: OptimizerConfig, path: ConfigPath) -> None:
    """Checks that a group with its own weight_decay has a parameter that decays."""
    buckets = list(buckets)
    decaying = {bucket.group for bucket in buckets if not bucket.is_no_decay}
    for index in {bucket.group for bucket in buckets} - decaying - {DEFAULT_GROUP}:
        group, group_path = config.groups[index], path / "groups" / index
        if group.weight_decay:
            raise (group_path / "weight_decay").error(
                f"has no effect: with weight_decay_on=matrices no parameter of {group.name} decays",
                (group_path / "weight_decay_on").suggest("all"),
                value=group.weight_decay,
            )
