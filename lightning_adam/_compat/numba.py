"""Private names of numba, as of 0.66."""

from typing import Any


def has_compiled(function: Any) -> bool:
    """Returns whether a compiled function has a variant in this process or in its cache on disk."""
    if function.signatures:
        return True
    cache_file = getattr(function._cache, "_cache_file", None)
    return cache_file is not None and bool(cache_file._load_index())
