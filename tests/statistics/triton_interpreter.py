"""Triton's interpreter, with which its kernel measures tensors of the CPU.

It is there in a process that starts with TRITON_INTERPRET=1, and is not to be mixed with compiling.
"""

from typing import Any

import numpy as np

from lightning_adam.statistics import kernels


def switch_on() -> None:
    """Lets the kernel measure on the CPU, by an interpreter that does as a device does."""
    import triton.language as tl
    from triton.runtime import interpreter

    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    own_cast, own_splat = builder.cast_impl, builder.create_splat

    def cast(self: Any, source: Any, dtype: Any) -> Any:
        """Its own cast to bfloat16 does not round to nearest."""
        kinds = (source.dtype.scalar, dtype.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            values = (source.data.astype(np.uint32) << 16).view(np.float32)
        elif kinds == (tl.float32, tl.bfloat16):
            bits = source.data.astype(np.float32).view(np.uint32)
            values = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            values[np.isnan(source.data)] = 0x7FC0
        else:
            return own_cast(self, source, dtype)
        return handle(values, dtype.scalar)

    def splat(self: Any, block: Any, scalar: Any) -> Any:
        """Its own takes the outcome of a comparison for a number."""
        if block.scalar != tl.int1:
            return own_splat(self, block, scalar)
        return handle(np.full(block.shape, bool(np.ravel(scalar.data)[0])), tl.int1)

    own_patch = interpreter._patch_lang
    patched: set[Any] = set()

    def patch(function: Any) -> Any:
        """Its own puts itself in the language's place at every call, for most of the time."""
        modules = [each for each in (tl, tl.core) if each in function.__globals__.values()]
        if not patched.issuperset(modules):
            patched.update(modules)
            own_patch(function)
        return interpreter._LangPatchScope()

    builder.cast_impl, builder.create_splat = cast, splat
    interpreter._patch_lang = patch
    kernels.FAST["cpu"] = "triton"
