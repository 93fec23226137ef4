"""Selects the parameters that do not decay with `weight_decay_on: matrices`."""

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_adam.statistics.names import clean_name

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
LINEAR = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
LINEAR_NAME = re.compile(r"(Linear|Conv(Transpose)?[123][dD])$")
"""Names of classes that resemble `torch.nn.Linear` but do not derive from it."""
NORM_NAME = re.compile(r"Norm(?!al)|Normali[sz]ation")
"""Names of normalization layers; excludes normal distributions and normalizing flows."""
BIASES = ("bias", "bias_k", "bias_v")


class OwnedParameter(NamedTuple):
    """A parameter, its module, and its name there without reparametrization."""

    parameter: nn.Parameter
    owner: nn.Module
    name: str


def no_decay(
    module: nn.Module,
    patterns: Sequence[str],
    names: Mapping[int, Sequence[str]],
    shapes: Mapping[int, torch.Size],
) -> set[int]:
    """Returns the ids of the parameters that do not decay, according to any of their owners.

    Args:
        module: The module to train.
        patterns: The `no_decay` of the config.
        names: All names of each parameter, by its id.
        shapes: The unsharded shapes of sharded parameters, by their ids.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 1), nn.LayerNorm(1))
        >>> names = {id(each): [name] for name, each in net.named_parameters()}
        >>> excluded = no_decay(net, [], names, {})
        >>> [names[each] for each in names if each not in excluded]
        [['0.weight']]
    """
    found = {
        key for key, own in names.items() if any(matches(name, patterns) for name in own)
    } | set(_named_by_modules(module))
    for parameter, owner, name in _owned_parameters(module):
        shape = shapes.get(id(parameter), parameter.shape)
        is_list = isinstance(owner, nn.ParameterList | nn.ParameterDict)
        own = names[id(parameter)]
        if (
            not is_matrix(shape, owner, name)
            or isinstance(owner, EMBEDDINGS)
            or _is_norm(owner)
            or name.endswith(BIASES)
            # An attribute that state-space models set on their parameters.
            or getattr(parameter, "_no_weight_decay", False)
            or (is_list and any(matches(each.rpartition(".")[0], patterns) for each in own))
        ):
            found.add(id(parameter))
    return found


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Returns whether a pattern matches the name, or its last part if the pattern has no dot.

    Example:
        >>> matches("net.cls_token", ["*_token"]), matches("net.to_token.weight", ["*_token"])
        (True, False)
        >>> matches("net.a.weight", ["net.*"])
        True
    """
    last = name.rpartition(".")[2]
    return any(fnmatch.fnmatchcase(name if "." in each else last, each) for each in patterns)


def is_matrix(shape: Sequence[int], owner: nn.Module | None = None, name: str = "") -> bool:
    """Returns whether a parameter has two dimensions above 1, or is a weight of a linear map.

    Example:
        >>> is_matrix((8, 4)), is_matrix((1, 8, 1)), is_matrix((1, 8), nn.Linear(8, 1), "weight")
        (True, False, True)
    """
    if sum(size > 1 for size in shape) > 1:
        return True
    if isinstance(owner, RECURRENT):
        return name.startswith("weight")
    return owner is not None and name == "weight" and _is_linear(owner)


def _is_linear(owner: nn.Module) -> bool:
    return isinstance(owner, LINEAR) or any(map(LINEAR_NAME.search, _class_names(owner)))


def _is_norm(owner: nn.Module) -> bool:
    return not _is_linear(owner) and any(map(NORM_NAME.search, _class_names(owner)))


def _class_names(owner: nn.Module) -> list[str]:
    return [kind.__name__ for kind in type(owner).__mro__]


def _owned_parameters(module: nn.Module) -> Iterator[OwnedParameter]:
    """Yields the parameters of each module, and those of its parametrizations as its own."""
    parametrized: dict[int, tuple[nn.Module, str]] = {}
    for owner in module.modules():
        if is_parametrized(owner):
            lists = owner.parametrizations.items()  # type: ignore[union-attr,operator]
            parametrized |= {id(each): (owner, name) for name, each in lists}
        reparametrized = parametrized.get(id(owner))
        for name, parameter in owner.named_parameters(recurse=False):
            if reparametrized is None:
                yield OwnedParameter(parameter, owner, _original_name(owner, name))
            elif name in ("original", "original1"):
                yield OwnedParameter(parameter, *reparametrized)
            else:
                # The magnitude of a weight norm keeps its name, so it does not count as a weight.
                yield OwnedParameter(parameter, reparametrized[0], name)


def _original_name(owner: nn.Module, name: str) -> str:
    """Returns the name without the suffix of torch's hooks, such as spectral norm or pruning."""
    if name.endswith("_v") and hasattr(owner, f"{name[:-1]}g"):
        return name[:-2]
    return name.removesuffix("_orig")


def _named_by_modules(module: nn.Module) -> Iterator[int]:
    """Yields the ids of parameters that a module's `no_weight_decay()` lists, timm's convention."""
    for owner in module.modules():
        method = getattr(owner, "no_weight_decay", None)
        if not callable(method) or isinstance(method, Tensor | nn.Module):
            continue
        listed = [clean_name(name) for name in method()]
        for name, parameter in owner.named_parameters(remove_duplicate=False):
            if any(fnmatch.fnmatchcase(clean_name(name), each) for each in listed):
                yield id(parameter)
