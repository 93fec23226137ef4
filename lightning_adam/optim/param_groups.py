"""Module → named parameter groups: which tensors are trained with which settings."""

import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hydra.utils import get_class
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_adam.config.errors import ConfigError, nearest, refusal, type_instead
from lightning_adam.config.reading import CustomOptimizer
from lightning_adam.config.schema import AdamConfig, GroupConfig, LayerDecayConfig, WeightDecayOn
from lightning_adam.statistics.names import clean_name, group_name

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMALISATIONS = (
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


LR_RATIO = "lr_ratio"
"""The key of a group's learning rate as a multiple of the optimizer's, whatever trains it."""


def peak_lr(group: Mapping[str, Any]) -> Any:
    """The peak of a group's learning rate, which its schedule keeps as `initial_lr`.

    Example:
        >>> peak_lr({"lr": 0.5, "initial_lr": 2.0}), peak_lr({"lr": 0.5})
        (2.0, 0.5)
    """
    return group.get("initial_lr", group["lr"])


def schedule_share(group: Mapping[str, Any]) -> Any:
    """The share of its peak that a group trains with at this point of its schedule.

    Example:
        >>> schedule_share({"lr": 0.5, "initial_lr": 2.0}), schedule_share({"lr": 0.0})
        (0.25, 0.0)
    """
    peak = peak_lr(group)
    return group["lr"] / peak if peak else 0.0


def param_groups(
    module: nn.Module,
    config: AdamConfig | CustomOptimizer,
    where: str,
    hyperparameters: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Sorts a module's trained parameters into as many groups as there are settings.

    Without `groups` and `layer_decay` these are `decay` and `no_decay`. Which parameter stands in
    which depends on the module and on `weight_decay_on` alone, not on the strength of the decay:
    runs with and without decay have the same keys and can load each other's state. A group of
    `groups` is never merged with another; those of its parameters that do not decay stand in
    `<name>_no_decay`. With `layer_decay` each layer has its own pair, `layer_<number>`, and so has
    what lies below the first, `stem`.

    A shared parameter stands once, under its first name; it is matched by any of its names, and
    does not decay if any of its owners is an embedding or a normalisation. Frozen parameters stand
    in no group.

    Args:
        module: The module to train.
        config: The config, of which `weight_decay_on`, `groups` and `layer_decay` are read.
        where: The config's full name, for errors.
        hyperparameters: What the optimizer is built with; `lr` and `weight_decay` are read.

    Returns:
        Groups for a torch optimizer, each with its `name`, its `params` and their `param_names`; an
        empty group is left out.

    Raises:
        ConfigError: If nothing is trained, a parameter has no shape yet, or a group or the layer
            decay is for no parameter.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        >>> groups = param_groups(net, AdamConfig(), "optimizer", {"weight_decay": 0.1})
        >>> [(group["name"], group["param_names"]) for group in groups]
        [('decay', ['0.weight']), ('no_decay', ['0.bias', '1.weight', '1.bias'])]
    """
    parameters = _parameters(module)
    if not any(each.trained for each in parameters):
        raise ConfigError(
            f"{type(module).__name__} has no parameter to train: expected at least one with"
            " requires_grad=True"
        )
    exempt = set() if config.weight_decay_on is WeightDecayOn.all else set(_exempt(module))
    named = _named(parameters, config.groups, where)
    layers = _layers(parameters, config.layer_decay, f"{where}.layer_decay")
    sorted_out: dict[tuple[int, _Layer, bool], list[_Parameter]] = defaultdict(list)
    for each, index, layer in zip(parameters, named, layers, strict=True):
        if each.trained:
            sorted_out[index, layer, id(each.parameter) in exempt].append(each)
    _check_decay(sorted_out, config.groups, where)
    groups: dict[str, dict[str, Any]] = {}
    for index, layer, spared in sorted(sorted_out):
        group = GroupConfig(name="") if index == REST else config.groups[index]
        chosen = sorted_out[index, layer, spared]
        name = _name(group, layer, spared)
        if name in groups:
            expected = "expected another name, for a layer's group has this one"
            raise refusal(
                f"{where}.groups.{index}", "name", group.name, expected, f"{name}_{index}"
            )
        groups[name] = {
            "name": name,
            "params": [each.parameter for each in chosen],
            "param_names": [each.names[0] for each in chosen],
            LR_RATIO: group.lr_scale * layer.lr_scale,
            **_settings(group, layer, spared, hyperparameters, where),
        }
    return list(groups.values())


def later_groups(
    module: nn.Module,
    optimizer: Optimizer,
    group: Mapping[str, Any],
    weight_decay_on: WeightDecayOn,
) -> list[dict[str, Any]]:
    """A group to be added to an optimizer that has some: with names, and sorted by what decays.

    Args:
        module: The module to train.
        optimizer: The optimizer that has the first groups.
        group: The group as it is handed to `add_param_group`. Its `lr` is what it trains with now;
            the schedule, if there is one, goes on from there.
        weight_decay_on: Which parameters decay, if the group does not say how much.

    Returns:
        The group, and, if some of its parameters do not decay, a second one for these.

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
    common = _scheduled(optimizer, group)
    if common.get("lr") == 0:
        rank_zero_warn(
            f"{name} joins the optimizer with lr=0 and stays there. Add it after the first step of"
            " the warm-up, or with a learning rate of its own."
        )
    exempt = set() if weight_decay_on == WeightDecayOn.all else set(_exempt(module))
    if "weight_decay" in group or "weight_decay" not in optimizer.defaults:
        exempt = set()
    spared = [each for each in params if id(each) in exempt]
    decaying = [each for each in params if id(each) not in exempt]
    sorted_out = [
        (name, decaying, {}),
        (f"{name}_no_decay", spared, {"weight_decay": 0.0}),
    ]
    return [
        {
            **common,
            **own,
            "name": name,
            "params": chosen,
            "param_names": [
                names.get(id(each), f"{name}.{position}") for position, each in enumerate(chosen)
            ],
        }
        for name, chosen, own in sorted_out
        if chosen
    ]


def _scheduled(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """A group that joins others in the middle of their schedule, with its own place there."""
    first, lr = optimizer.param_groups[0], optimizer.defaults.get("lr")
    if lr is None:
        return dict(group)
    share = schedule_share(first)
    if "lr" not in group:
        joining = {**group, "lr": lr * share, "initial_lr": lr}
    else:
        joining = {**group, "initial_lr": group["lr"] / share if share else group["lr"]}
    joining[LR_RATIO] = joining["initial_lr"] / lr
    return joining


REST = -1
"""The index of what no group of `groups` takes."""


@dataclass(frozen=True)
class _Parameter:
    """A parameter, its names, the first of them first, and the modules it stands in."""

    parameter: nn.Parameter
    names: list[str]
    modules: list[nn.Module]

    @property
    def trained(self) -> bool:
        return self.parameter.requires_grad


class _Layer(NamedTuple):
    """A place between input and output, and what it does to the learning rate."""

    depth: int
    name: str
    lr_scale: float


def _parameters(module: nn.Module) -> list[_Parameter]:
    parameters: dict[int, _Parameter] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if is_lazy(parameter):
            raise ConfigError(
                f"{name} has no shape yet: expected initialised parameters; run one batch through"
                " the model in `setup` or `configure_model`"
            )
        entry = parameters.setdefault(id(parameter), _Parameter(parameter, [], []))
        entry.names.append(clean_name(name))
    for owner in module.modules():
        for parameter in owner.parameters():
            parameters[id(parameter)].modules.append(owner)
    return list(parameters.values())


def _named(parameters: list[_Parameter], groups: Sequence[GroupConfig], where: str) -> list[int]:
    """The index of the first group that matches each parameter."""
    chosen = [REST] * len(parameters)
    for index, group in enumerate(groups):
        place = f"{where}.groups.{index}"
        matched = _matched(parameters, group, place)
        if not any(parameters[position].trained for position in matched):
            rank_zero_warn(
                f"{place} ({group.name}) matches only frozen parameters, such as"
                f" {parameters[matched[0]].names[0]}: nothing is trained with its settings."
            )
            continue
        free = [position for position in matched if chosen[position] == REST]
        if not any(parameters[position].trained for position in free):
            earlier = sorted(
                {groups[chosen[position]].name for position in set(matched) - set(free)}
            )
            raise ConfigError(
                f"{place} ({group.name}): expected a parameter that no group before it takes, but"
                f" {', '.join(earlier)} has all that it matches; put it before"
            )
        for position in free:
            chosen[position] = index
    return chosen


def _matched(parameters: list[_Parameter], group: GroupConfig, where: str) -> list[int]:
    """The positions of the parameters that a group's matcher means, frozen ones too."""
    names = [name for each in parameters for name in each.names]
    if group.module_class is not None:
        key, pattern = "module_class", group.module_class
        known = [type(module).__name__ for each in parameters for module in each.modules]
        chosen = {id(module) for module in _instances(parameters, pattern, where)}
        means = [any(id(module) in chosen for module in each.modules) for each in parameters]
    elif group.regex is not None:
        key, pattern, known = "regex", group.regex, names
        means = [any(re.search(pattern, name) for name in each.names) for each in parameters]
    else:
        key, pattern, known = "match", str(group.match), names
        means = [any(fnmatch.fnmatchcase(n, pattern) for n in each.names) for each in parameters]
    matched = [position for position, meant in enumerate(means) if meant]
    if not matched:
        raise _matches_nothing(where, key, pattern, known)
    return matched


def _instances(parameters: list[_Parameter], name: str, where: str) -> list[nn.Module]:
    """The modules of a class, named with its path or alone; a subclass counts too."""
    modules = [module for each in parameters for module in each.modules]
    if "." not in name:
        return [each for each in modules if name in {kind.__name__ for kind in type(each).__mro__}]
    try:
        kind = get_class(name)
    except (ImportError, ValueError) as error:
        cause = " ".join(str(error).split())
        expected = f"expected a class that can be imported, but {cause}"
        raise refusal(where, "module_class", name, expected, name.rpartition(".")[2]) from error
    return [each for each in modules if isinstance(each, kind)]


def _layers(
    parameters: list[_Parameter], layer_decay: LayerDecayConfig, where: str
) -> list[_Layer]:
    """The layer of each parameter; with no layer decay all stand in one."""
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
        raise _matches_nothing(where, "pattern", layer_decay.pattern, known)
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


def _matches_nothing(where: str, key: str, pattern: str, known: list[str]) -> ConfigError:
    # Without a cutoff there is always something near, if there is anything.
    close = nearest(pattern.replace("*", ""), dict.fromkeys(known), 3, cutoff=0.0)
    expected = f"expected a match, but it matches nothing; the nearest are {', '.join(close)}"
    return refusal(where, key, pattern, expected, close[0] if close else None)


def _name(group: GroupConfig, layer: _Layer, spared: bool) -> str:
    parts = (group.name, layer.name, "no_decay" if spared else "")
    return "_".join(filter(None, parts)) or "decay"


def _settings(
    group: GroupConfig,
    layer: _Layer,
    spared: bool,
    hyperparameters: Mapping[str, Any],
    where: str,
) -> dict[str, Any]:
    """Those of the optimizer's settings that are a group's own."""
    settings: dict[str, Any] = {}
    lr_scale = group.lr_scale * layer.lr_scale
    if lr_scale != 1:
        if not isinstance(hyperparameters.get("lr"), int | float):
            expected = "expected a number for groups and layer_decay to scale"
            raise refusal(where, "lr", hyperparameters.get("lr"), expected, 0.001)
        settings["lr"] = hyperparameters["lr"] * lr_scale
    weight_decay = group.weight_decay
    if weight_decay is None:
        weight_decay = hyperparameters.get("weight_decay")
    if weight_decay is not None:
        settings["weight_decay"] = 0.0 if spared else weight_decay
    if group.betas is not None:
        settings["betas"] = (group.betas[0], group.betas[1])
    if group.eps is not None:
        settings["eps"] = group.eps
    return settings


def _check_decay(
    sorted_out: Iterable[tuple[int, _Layer, bool]], groups: Sequence[GroupConfig], where: str
) -> None:
    """Refuses a group's own weight_decay that would pull on nothing."""
    decaying = {index for index, _, spared in sorted_out if not spared}
    for index in {index for index, _, _ in sorted_out} - decaying - {REST}:
        if groups[index].weight_decay:
            raise ConfigError(
                f"{where}.groups.{index}.weight_decay={groups[index].weight_decay}: expected a"
                f" group in which something decays, but weight_decay_on=matrices spares all of"
                f" {groups[index].name}; {type_instead(f'{where}.weight_decay_on', 'all')}"
            )


def _exempt(module: nn.Module) -> Iterator[int]:
    """The ids of the parameters that `matrices` leaves alone."""
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            if parameter.ndim < 2 or isinstance(owner, EMBEDDINGS + NORMALISATIONS):
                yield id(parameter)
