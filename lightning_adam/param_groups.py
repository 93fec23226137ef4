"""Module → named parameter groups: which tensors decay and which do not."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_adam.schema import ConfigError, WeightDecayOn

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


def clean_name(name: str) -> str:
    """A parameter's name as the user wrote it, without the wrapper that `torch.compile` adds.

    Example:
        >>> clean_name("net._orig_mod.0.weight")
        'net.0.weight'
    """
    return name.replace("_orig_mod.", "")


def group_name(group: dict[str, Any], index: int) -> str:
    """A group's name; its position for groups that were built without one.

    Example:
        >>> group_name({"name": "decay"}, 0), group_name({}, 1)
        ('decay', 'group_1')
    """
    return str(group.get("name", f"group_{index}"))


def param_groups(
    module: nn.Module, weight_decay: float, weight_decay_on: WeightDecayOn
) -> list[dict[str, Any]]:
    """Sorts a module's trained parameters into the groups `decay` and `no_decay`.

    The groups depend on the module and on `weight_decay_on` alone, not on the strength of the
    decay, so that runs with and without decay have the same keys and can load each other's state.
    A shared parameter stands once, under its first name, and does not decay if any of its owners
    is an embedding or a normalisation. Frozen parameters stand in no group.

    Args:
        module: The module to train.
        weight_decay: The decay of the group `decay`.
        weight_decay_on: `matrices` or `all`.

    Returns:
        Groups for a torch optimizer, each with its `name` and its parameters as
        `(name, parameter)`; an empty group is left out.

    Raises:
        ConfigError: If nothing is trained, or a parameter has no shape yet.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        >>> groups = param_groups(net, 0.1, WeightDecayOn.matrices)
        >>> [(group["name"], [name for name, _ in group["params"]]) for group in groups]
        [('decay', ['0.weight']), ('no_decay', ['0.bias', '1.weight', '1.bias'])]
    """
    exempt = set() if weight_decay_on is WeightDecayOn.all else set(_exempt(module))
    decay: list[tuple[str, nn.Parameter]] = []
    no_decay: list[tuple[str, nn.Parameter]] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if is_lazy(parameter):
            raise ConfigError(
                f"{name} has no shape yet: expected initialised parameters; run one batch through"
                " the model in `setup` or `configure_model`"
            )
        (no_decay if id(parameter) in exempt else decay).append((clean_name(name), parameter))
    if not decay and not no_decay:
        raise ConfigError(
            f"{type(module).__name__} has no parameter to train: expected at least one with"
            " requires_grad=True"
        )
    groups = [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _exempt(module: nn.Module) -> Iterator[int]:
    """The ids of the parameters that `matrices` leaves alone."""
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            vector = not is_lazy(parameter) and parameter.ndim < 2
            if vector or isinstance(owner, EMBEDDINGS + NORMALISATIONS):
                yield id(parameter)
