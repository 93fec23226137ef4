"""Names of parameters, parameter groups and optimizers."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_adam._compat.torch import WRAPPED, WRAPPERS


def clean_name(name: str) -> str:
    """Returns a parameter's name without the attributes of torch's wrappers.

    These are `torch.compile`, FSDP1, and activation checkpointing and offloading. `module` of DDP
    remains, as it may be a name in the user's module; `named_parameters` distinguishes the two.

    Example:
        >>> clean_name("net._orig_mod.0._checkpoint_wrapped_module.weight")
        'net.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the parameters of a module under all their names, without the names of wrappers.

    Example:
        >>> net = nn.Sequential(nn.DataParallel(nn.Linear(2, 3)), nn.ModuleDict())
        >>> net[1]["module"] = nn.Linear(3, 1, bias=False)
        >>> [name for name, _ in named_parameters(net)]
        ['0.weight', '0.bias', '1.module.weight']
    """
    modules: dict[str, nn.Module] = {}
    paths = {"": ""}
    for path, owner in module.named_modules(remove_duplicate=False):
        modules[path] = owner
        if path:
            parent, _, name = path.rpartition(".")
            is_wrapped = name == "module" and isinstance(modules[parent], WRAPPERS)
            own = "" if is_wrapped else clean_name(name)
            paths[path] = ".".join(filter(None, (paths[parent], own)))
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            yield ".".join(filter(None, (paths[path], clean_name(name)))), parameter


def group_name(group: Mapping[str, Any], index: int) -> str:
    """Returns the name of a parameter group, or one from its index if it has none.

    Example:
        >>> group_name({"name": "decay"}, 0), group_name({}, 1)
        ('decay', 'group_1')
    """
    return str(group.get("name", f"group_{index}"))


def group_names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns distinct names of parameter groups, with the index appended to repeated names.

    Example:
        >>> group_names([{"name": "decay"}, {}, {"name": "decay"}])
        ['decay', 'group_1', 'decay_2']
    """
    names: list[str] = []
    for index, group in enumerate(groups):
        name = group_name(group, index)
        while name in names:
            name = f"{name}_{index}"
        names.append(name)
    return names


def optimizer_names(optimizers: Sequence[Optimizer], module: nn.Module) -> list[str]:
    """Returns distinct names for optimizers: the submodules that they train.

    Args:
        optimizers: The optimizers. The name of a single optimizer is empty.
        module: The module that they train.

    Returns:
        The shortest distinct module paths; the indexes of the optimizers if there are none.

    Example:
        >>> gan = nn.ModuleDict({"generator": nn.Linear(3, 4), "discriminator": nn.Linear(4, 1)})
        >>> from torch.optim import Adam
        >>> optimizer_names([Adam(gan[part].parameters()) for part in gan], gan)
        ['generator', 'discriminator']
    """
    if len(optimizers) == 1:
        return [""]
    names = {id(each): name.split(".") for name, each in reversed([*named_parameters(module)])}
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
            # The name of a submodule may be a number.
            return named if len(set(named)) == len(named) else numbers
    return numbers


def _common_prefix(paths: Sequence[Sequence[str]]) -> Sequence[str]:
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return [parts[0] for parts in shared]
