"""The format of TensorBoard's event files, as of tensorboard 2.21 and tensorboardX 2.6."""

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError as DecodeError  # type: ignore[import-untyped]

Event: TypeAlias = Any
"""`event_pb2.Event`, whose module has no types."""
MODULES = ("tensorboard.compat.proto.event_pb2", "tensorboardX.proto.event_pb2")
HEADER = struct.Struct("<QI")
"""Header of a record: its length, and a checksum of the length."""
CHECKSUM = 4
"""Bytes after each record."""
BYTES_AT_ONCE = 1 << 20
TEXT = "/text_summary"
"""What `add_text` appends to the key."""


def event_class() -> Any:
    """Returns the class of an event; None if neither tensorboard nor tensorboardX is installed."""
    for name in MODULES:
        with suppress(ImportError):
            return import_module(name).Event
    return None


def records(path: Path, has_read: Callable[[int], object]) -> Iterator[bytes | None]:
    """Yields the records of an event file, and a final None if the file is truncated.

    Args:
        path: The file.
        has_read: Called with the number of bytes that were read since the last call.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        # An empty file cannot be mapped.
        data = mmap(file.fileno(), size, access=ACCESS_READ) if size else b""
    start = reported = 0
    while start < size:
        is_whole = start + HEADER.size < size
        end = start + HEADER.size + HEADER.unpack_from(data, start)[0] if is_whole else size
        if end + CHECKSUM > size:
            yield None
            break
        yield data[start + HEADER.size : end]
        start = end + CHECKSUM
        if start - reported > BYTES_AT_ONCE:
            has_read(start - reported)
            reported = start
    has_read(size - reported)
