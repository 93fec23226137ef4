"""Names of parameters, parameter groups and optimizers."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer


def clean_name(name: str) -> str:
    """A parameter's name as the user wrote it, without what `torch.compile` and FSDP1 add.

    Example:
        >>> clean_name("net._orig_mod.0.weight")
        'net.0.weight'
    """
    return name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")


def group_name(group: Mapping[str, Any], index: int) -> str:
    """A group's name; its position for groups that were built without one.

    Example:
        >>> group_name({"name": "decay"}, 0), group_name({}, 1)
        ('decay', 'group_1')
    """
    return str(group.get("name", f"group_{index}"))


def optimizer_names(optimizers: Sequence[Optimizer], module: nn.Module) -> list[str]:
    """Returns distinct names for the optimizers of a module: the submodule that each one trains.

    Args:
        optimizers: The optimizers. The name of a single one is empty.
        module: The module that they train.

    Returns:
        The shortest module paths that differ, otherwise the optimizers' positions.

    Example:
        >>> gan = nn.ModuleDict({"generator": nn.Linear(3, 4), "discriminator": nn.Linear(4, 1)})
        >>> from torch.optim import Adam
        >>> optimizer_names([Adam(gan[part].parameters()) for part in gan], gan)
        ['generator', 'discriminator']
    """
    if len(optimizers) == 1:
        return [""]
    names = {id(each): clean_name(name).split(".") for name, each in module.named_parameters()}
    paths = []
    for optimizer in optimizers:
        parameters = (each for group in optimizer.param_groups for each in group["params"])
        paths.append(
            _common_prefix([names[id(each)][:-1] for each in parameters if id(each) in names])
        )
    numbers = [str(index) for index in range(len(optimizers))]
    for depth in range(1, max(map(len, paths), default=0) + 1):
        found = [".".join(path[:depth]) for path in paths]
        if len(set(found)) == len(found):
            named = [name or number for name, number in zip(found, numbers, strict=True)]
            # A submodule's own name may be a number.
            return named if len(set(named)) == len(named) else numbers
    return numbers


def _common_prefix(paths: Sequence[Sequence[str]]) -> Sequence[str]:
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return [parts[0] for parts in shared]
