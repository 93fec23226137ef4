"""Names of parameters and parameter groups."""

from collections.abc import Mapping
from typing import Any


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
