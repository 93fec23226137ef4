"""What is told of a dtype: its name, and whether it can hold a number."""

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as it is typed.

    Example:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def rounds_to_0(number: float, dtype: torch.dtype) -> bool:
    """Whether a number of at least 0 is 0 in a floating dtype.

    Example:
        >>> rounds_to_0(1e-8, torch.float16), rounds_to_0(1e-8, torch.bfloat16)
        (True, False)
    """
    kind = torch.finfo(dtype)
    # Half of the smallest number goes to the even one of its neighbours, which is 0.
    return number <= kind.tiny * kind.eps / 2
