"""Logged keys."""


def in_scope(key: str, scope: str) -> str:
    """Returns the key of a scope, from that of the model.

    Example:
        >>> in_scope("adam_update/update_norm", "group/decay")
        'adam_update/group/decay/update_norm'
    """
    family, _, name = key.partition("/")
    return "/".join(filter(None, (family, scope, name)))
