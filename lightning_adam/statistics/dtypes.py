"""Names of dtypes, and rounding to 0."""

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype without `torch.`.

    Example:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def rounds_to_0(number: float, dtype: torch.dtype) -> bool:
    """Returns whether a number of at least 0 rounds to 0 in a floating dtype.

    Example:
        >>> rounds_to_0(1e-8, torch.float16), rounds_to_0(1e-8, torch.bfloat16)
        (True, False)
    """
    kind = torch.finfo(dtype)
    # Half of the smallest subnormal number rounds to even, which is 0.
    return number <= kind.tiny * kind.eps / 2
