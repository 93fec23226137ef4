"""Loads a file of `torch.save` without importing or executing anything that it names."""

import io
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lightning_adam._compat.pickle import PythonUnpickler
from lightning_adam._compat.torch import is_torchscript, storage_view

NUMPY_FORMATS = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i"}
"""The supported numpy scalars, and their formats for `struct`."""
MARKED = {pickle.APPENDS[0], pickle.SETITEMS[0], pickle.ADDITEMS[0]}
"""Pickle instructions that add several items to a container."""
CONTAINERS = {pickle.APPEND[0]: -2, pickle.SETITEM[0]: -3, **dict.fromkeys(MARKED, -1)}
"""Pickle instructions that add to a container, and its position on the stack."""
EXTENSIONS = {pickle.EXT1[0], pickle.EXT2[0], pickle.EXT4[0]}
"""Pickle instructions that load objects from a registry; torch.save writes none."""


FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class Unknown:
    """Replaces a class or an object that is not loaded, and ignores operations on it.

    Args:
        name: The name of the class or function, with its module.

    Example:
        >>> Unknown("os.system")("rm -rf /").__name__
        'os.system'
    """

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, *arguments: Any) -> "Unknown":
        """Returns itself as the instance of the class."""
        return self

    def append(self, *item: Any) -> None:
        """Ignores an item."""

    add = extend = __setitem__ = append


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *options: Any) -> Tensor | Unknown:
    # An untyped storage has the dtype among the options.
    dtype = next((each for each in options if isinstance(each, torch.dtype)), storage.dtype)
    tensor = storage_view(storage, dtype, offset, size, stride)
    is_expanded = tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    return Unknown("torch.Tensor (expanded)") if is_expanded else tensor


def _first(first: Any, *others: Any) -> Any:
    return first


def _tensor_of_class(rebuild: Any, tensor_class: Any, arguments: Any, state: Any) -> Any:
    """A plain tensor; any other class may store its numbers in another format."""
    is_plain = tensor_class.__name__ in ("torch.Tensor", "torch.nn.parameter.Parameter")
    return rebuild(*arguments) if is_plain else tensor_class


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    if dtype not in NUMPY_FORMATS:
        return Unknown(f"numpy.{dtype}")
    return struct.unpack(NUMPY_FORMATS[dtype], data)[0]


KNOWN: dict[str, Any] = {
    **{str(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)},
    **dict.fromkeys(("collections.OrderedDict", "collections.defaultdict"), lambda *_: {}),
    "torch.storage.UntypedStorage": SimpleNamespace(dtype=torch.uint8),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._utils._rebuild_wrapper_subclass": _first,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_class,
    "numpy.dtype": _first,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "_codecs.encode": lambda text, *_: text.encode("latin-1"),
}
"""Replacements for the names in a file. None of them allocates memory or changes an object."""


class SafeUnpickler(PythonUnpickler):
    """Loads containers, numbers, strings and tensors, and an `Unknown` for everything else."""

    file_size = 0
    """Size of the file in bytes, which is more than the number of elements of any storage."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns the replacement for a name. Nothing is imported."""
        return KNOWN.get(f"{module}.{name}") or Unknown(f"{module}.{name}")


def _call(unpickler: SafeUnpickler) -> None:
    arguments = unpickler.stack.pop()
    unpickler.stack.append(unpickler.stack.pop()(*arguments))


def _call_with_options(unpickler: SafeUnpickler) -> None:
    unpickler.stack.pop()
    _call(unpickler)


def _ignore_state(unpickler: SafeUnpickler) -> None:
    unpickler.stack.pop()


def _load_storage(unpickler: SafeUnpickler) -> None:
    identifier = unpickler.stack[-1]
    if len(identifier) > 4 and not 0 <= identifier[4] <= unpickler.file_size:
        raise pickle.UnpicklingError("a storage is larger than the file")
    PythonUnpickler.dispatch[pickle.BINPERSID[0]](unpickler)


def _into_container(instruction: int) -> Callable[[SafeUnpickler], None]:
    def load(unpickler: SafeUnpickler) -> None:
        stack = unpickler.metastack[-1] if instruction in MARKED else unpickler.stack
        if not isinstance(stack[CONTAINERS[instruction]], dict | list | set | Unknown):
            raise pickle.UnpicklingError("items are added to an object that is not a container")
        PythonUnpickler.dispatch[instruction](unpickler)

    return load


SafeUnpickler.dispatch = {
    **{code: each for code, each in PythonUnpickler.dispatch.items() if code not in EXTENSIONS},
    **{instruction: _into_container(instruction) for instruction in CONTAINERS},
    # As bytes, because a bytearray would be allocated before its content is read.
    pickle.BYTEARRAY8[0]: PythonUnpickler.dispatch[pickle.BINBYTES8[0]],
    pickle.NEWOBJ[0]: _call,
    pickle.NEWOBJ_EX[0]: _call_with_options,
    pickle.BUILD[0]: _ignore_state,
    pickle.BINPERSID[0]: _load_storage,
}


class _Stream(io.BufferedReader):
    """A file without a descriptor, so that torch does not extract it as a tar archive."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation


def load(path: Path) -> Any:
    """Loads a file of `torch.save`, with an `Unknown` for unsupported objects.

    Args:
        path: The file. Tensors of a zip file are memory-mapped.

    Raises:
        Exception: Any error of torch or pickle, if the file is damaged or has another format.
    """
    unpickler = type("Unpickler", (SafeUnpickler,), {"file_size": path.stat().st_size})
    module = SimpleNamespace(
        __name__=__name__,
        Unpickler=unpickler,
        load=lambda file, **options: unpickler(file, **options).load(),
    )
    # With this variable, torch would use its own unpickler, which rejects other classes.
    forced = os.environ.pop(FORCED, None)
    try:
        with _Stream(io.FileIO(path)) as file:
            is_zip = file.peek(2)[:2] == b"PK"
            if is_zip and is_torchscript(path):
                raise pickle.UnpicklingError("it is a TorchScript archive")
            return torch.load(
                path if is_zip else file,
                map_location="cpu",
                mmap=is_zip,
                weights_only=False,
                pickle_module=module,
            )
    finally:
        if forced is not None:
            os.environ[FORCED] = forced
