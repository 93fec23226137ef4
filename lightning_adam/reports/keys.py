"""A logged key taken apart: what was measured, and of what."""

import re
from typing import NamedTuple

from lightning_adam.statistics.catalogue import STATISTICS, Statistic
from lightning_adam.statistics.histograms import QUANTITIES

BASES = {
    **{statistic.key: statistic for statistic in STATISTICS.values()},
    **dict.fromkeys((f"adam_histogram/{quantity}" for quantity in QUANTITIES), None),
}
"""The keys of the whole model, and the statistics that they are of."""
SCOPE = re.compile(r"(?:/optimizer/(.+?))?(?:/(group|layer|tensor)/(.+))?")
"""What follows: optimizer, kind and name."""


class Scope(NamedTuple):
    """What a number is given for."""

    optimizer: str = ""
    """Empty if it is the only one."""
    kind: str = ""
    """`group`, `layer` or `tensor`; empty for the whole model."""
    name: str = ""

    @property
    def is_inner(self) -> bool:
        """Whether it is a layer or a tensor."""
        return self.kind in ("layer", "tensor")

    def __str__(self) -> str:
        """How a legend calls it.

        Example:
            >>> print(Scope("generator", "group", "decay"))
            generator: decay
        """
        inner = self.name if self.kind else "" if self.optimizer else "model"
        return ": ".join(filter(None, (self.optimizer, inner)))


class Key(NamedTuple):
    """A logged key."""

    base: str
    """All but the scope; of a key that is not ours, all of it."""
    statistic: Statistic | None
    """What it is of; None for a histogram and for what is not ours."""
    scope: Scope


def read_key(key: str) -> Key:
    """Takes a key apart.

    Example:
        >>> base, statistic, scope = read_key("adam_update/layer/net.0/update_norm")
        >>> base, scope
        ('adam_update/update_norm', Scope(optimizer='', kind='layer', name='net.0'))
        >>> read_key("train/loss").base
        'train/loss'
    """
    base = "/".join(key.split("/", 2)[:2])
    found = SCOPE.fullmatch(key[len(base) :])
    if base not in BASES or found is None:
        return Key(key, None, Scope())
    return Key(base, BASES[base], Scope(*(part or "" for part in found.groups())))
