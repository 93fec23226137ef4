"""A pytest plugin that runs the Triton kernel on the CPU with Triton's interpreter.

A process either interprets kernels or compiles them: `test_triton.py` starts one with this plugin.
"""

import os
import sys
from typing import Any

import numpy as np


def pytest_configure() -> None:
    """Patches the interpreter so that it computes like a device."""
    os.environ["TRITON_INTERPRET"] = "1"
    # Triton reads the variable when it is imported, and torch has imported it already.
    for name in list(sys.modules):
        if name.split(".")[0] == "triton" and not name.startswith("triton._C"):
            del sys.modules[name]
    import triton.language as tl
    from triton.runtime import interpreter

    from lightning_adam.statistics import kernels

    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    own_cast, own_splat = builder.cast_impl, builder.create_splat

    def cast(self: Any, source: Any, dtype: Any) -> Any:
        """Rounds bfloat16 to nearest, which Triton's own does not."""
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
        """Keeps booleans, which Triton's own takes for numbers."""
        if block.scalar != tl.int1:
            return own_splat(self, block, scalar)
        return handle(np.full(block.shape, bool(np.ravel(scalar.data)[0])), tl.int1)

    own_patch = interpreter._patch_lang
    patched: set[Any] = set()

    def patch(function: Any) -> Any:
        """Patches a module once: to do so at every call takes most of the time."""
        modules = [each for each in (tl, tl.core) if each in function.__globals__.values()]
        if not patched.issuperset(modules):
            patched.update(modules)
            own_patch(function)
        return interpreter._LangPatchScope()

    builder.cast_impl, builder.create_splat = cast, splat
    interpreter._patch_lang = patch
    kernels.FAST["cpu"] = "triton"
