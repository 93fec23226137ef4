"""The events in TensorBoard's files, as tensorboard 2.21 and tensorboardX 2.6 define them."""

import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError as DecodeError  # type: ignore[import-untyped]

Event: TypeAlias = Any
"""`event_pb2.Event`; its module comes without types."""
MODULES = ("tensorboard.compat.proto.event_pb2", "tensorboardX.proto.event_pb2")
HEADER = struct.Struct("<QI")
"""Before each record: its length, and a checksum of the length."""
CHECKSUM = 4
"""Bytes after each record."""
BYTES_AT_ONCE = 1 << 20
TEXT = "/text_summary"
"""What `add_text` appends to the key."""
TIME_BYTES, _STEP, _SUMMARY = 9, b"\x10", b"\x2a"
"""The bytes of an event's time, and those before its step and before its summary."""


def event_class() -> Any:
    """Returns the class of an event; None if neither tensorboard nor tensorboardX is installed.

    Example:
        >>> event_class()(step=3).step
        3
    """
    for name in MODULES:
        with suppress(ImportError):
            return import_module(name).Event
    return None


def records(path: Path, has_read: Callable[[int], object]) -> Iterator[bytes | None]:
    """Yields the records of an event file; None at last if the end is missing.

    Args:
        path: The file.
        has_read: Called with the number of bytes that were read since the last call.
    """
    read = 0
    size = path.stat().st_size
    with path.open("rb") as file:
        while header := file.read(HEADER.size):
            length = HEADER.unpack(header)[0] if len(header) == HEADER.size else size
            # A damaged length may be larger than the memory.
            record = file.read(length + CHECKSUM) if length < size else b""
            if len(record) != length + CHECKSUM:
                yield None
                break
            yield record[:-CHECKSUM]
            read += HEADER.size + len(record)
            if read > BYTES_AT_ONCE:
                has_read(read)
                read = 0
    has_read(read)


def step_bytes(step: int) -> bytes:
    r"""Returns the bytes between the time and the summary of an event.

    Example:
        >>> step_bytes(0), step_bytes(300)
        (b'*', b'\x10\xac\x02*')
    """
    if not step:
        return _SUMMARY
    varint, rest = bytearray(), step % 2**64
    while rest > 127:
        varint.append(rest & 127 | 128)
        rest >>= 7
    return _STEP + varint + bytes([rest]) + _SUMMARY
