"""Parses logged keys into statistic and scope."""

import re
from typing import NamedTuple

from lightning_adam.monitor.log_keys import TENSOR
from lightning_adam.statistics.catalogue import STATISTICS, Statistic
from lightning_adam.statistics.histograms import PERCENTILE_FAMILIES, PERCENTILES, QUANTITIES

PERCENTILE_KEYS = {
    quantity: [f"adam_{family}/{quantity}_p{percent}" for percent in PERCENTILES]
    for quantity, family in PERCENTILE_FAMILIES.items()
}
"""The keys of percentiles by quantity."""
BASES = {
    **{statistic.key: statistic for statistic in STATISTICS.values()},
    **dict.fromkeys((f"adam_histogram/{quantity}" for quantity in QUANTITIES), None),
    **dict.fromkeys((key for keys in PERCENTILE_KEYS.values() for key in keys), None),
}
"""The keys of the model, and their statistics."""
KEY = re.compile(
    r"(adam_[a-z_]+/)(?:optimizer/([^/]+)/)?(?:(group|layer|tensor)/([^/]+)/|(worst)_(\d+)/)?([^/]+)"
)
"""Matches family, optimizer, kind and name of the scope, and statistic."""


class Scope(NamedTuple):
    """The scope of a key."""

    optimizer: str = ""
    """Empty if it is the only one."""
    kind: str = ""
    """`group`, `layer`, `tensor` or `worst`; empty for the model."""
    name: str = ""
    """The name, or the rank if the kind is `worst`: 1 is the largest value."""

    @property
    def is_inner(self) -> bool:
        """Whether it is a layer or a tensor."""
        return self.kind in ("layer", "tensor")

    def __str__(self) -> str:
        """Returns the label in a legend.

        Example:
            >>> print(Scope("generator", "group", "decay"))
            generator: decay
            >>> print(Scope("", "worst", "2"))
            worst 2
        """
        inner = self.name if self.kind else "" if self.optimizer else "model"
        if self.kind == "worst":
            inner = f"worst {self.name}"
        return ": ".join(filter(None, (self.optimizer, inner)))


class Key(NamedTuple):
    """A logged key."""

    base: str
    """The key without its scope."""
    statistic: Statistic | None
    """The statistic; None for histograms, percentiles and other keys."""
    scope: Scope


def read_key(key: str) -> Key:
    """Parses a key.

    Example:
        >>> base, statistic, scope = read_key("adam_update/layer/net.0/update_norm")
        >>> base, scope
        ('adam_update/update_norm', Scope(optimizer='', kind='layer', name='net.0'))
        >>> read_key("train/loss").base
        'train/loss'
    """
    found = KEY.fullmatch(key)
    if found is None:
        return Key(key, None, Scope())
    family, optimizer, kind, name, worst, rank, statistic = (part or "" for part in found.groups())
    base = family + statistic
    if base not in BASES:
        return Key(key, None, Scope())
    return Key(base, BASES[base], Scope(optimizer, kind or worst, name or rank))


def is_tensor(key: str) -> bool:
    """Returns whether the value of a key is the name of the tensor with one of the largest values.

    Example:
        >>> is_tensor("adam_gradient/worst_1/grad_max_tensor"), is_tensor("train/my_tensor")
        (True, False)
    """
    return key.endswith(TENSOR) and read_key(key.removesuffix(TENSOR)).scope.kind == "worst"
