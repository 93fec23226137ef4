"""Private names and formats of wandb, seen in 0.31.0.

A table that is logged becomes an artifact too, for which the client asks the server in the middle
of training, and waits: up to 19 s each time if it does not answer. `keep_as_file` leaves the file.

`wandb leet inspect --json`, which is documented, prints 10 MB a second: a run of 100,000 rows would
be read in more than a minute. This reads the same records of the same file ten times as fast.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import wandb
from wandb.proto import wandb_internal_pb2

HEADER = struct.Struct("<4sHB")
IDENTIFIER = b":W&B"
BLOCK = 32768
"""The blocks of LevelDB's log format: no chunk crosses from one to the next."""
CHUNK = struct.Struct("<IHB")
"""Checksum, length and type of a chunk."""
HistoryItem: TypeAlias = Any
"""`wandb_internal_pb2.HistoryItem`, whose modules come without types; so with the others."""
ConfigRecord: TypeAlias = Any
Record: TypeAlias = Any
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def keep_as_file(table: wandb.Table, run: "wandb.Run", key: str) -> None:
    """Makes a table that is about to be logged a file of the run, and no artifact."""
    table.bind_to_run(run, key, run.step)  # type: ignore[no-untyped-call]


def is_log(path: Path) -> bool:
    """Whether a file begins as a W&B run does."""
    with path.open("rb") as file:
        return file.read(HEADER.size).startswith(IDENTIFIER)


def records(path: Path, has_read: Callable[[int], object]) -> Iterator[Record | None]:
    """The records of a run's file, as far as it goes.

    Args:
        path: A .wandb file, of which the end may be missing.
        has_read: Is told how many more bytes were read.

    Yields:
        A record, or None where the rest of a block is damaged.
    """
    parts: list[bytes] = []
    for chunk in _chunks(path, has_read):
        if chunk is None:
            parts = []
            yield None
            continue
        kind, data = chunk
        if kind in (FULL, FIRST):
            parts = [data]
        elif parts:
            parts.append(data)
        if kind in (FULL, LAST) and parts:
            yield wandb_internal_pb2.Record.FromString(b"".join(parts))  # type: ignore[attr-defined]
            parts = []


def _chunks(path: Path, has_read: Callable[[int], object]) -> Iterator[tuple[int, bytes] | None]:
    with path.open("rb") as file:
        # The file's header is part of the first block.
        place = len(file.read(HEADER.size))
        is_whole = True
        while is_whole and (block := file.read(BLOCK - place % BLOCK)):
            # Of the last block there may be as much as was written when it was read.
            is_whole = (place + len(block)) % BLOCK == 0
            position = 0
            while position + CHUNK.size <= len(block):
                checksum, length, kind = CHUNK.unpack_from(block, position)
                end = position + CHUNK.size + length
                if end > len(block) and not is_whole:
                    break
                # The checksum is of the type and the data.
                data = block[position + CHUNK.size - 1 : end]
                is_chunk = FULL <= kind <= LAST and end <= len(block)
                if not is_chunk or zlib.crc32(data) != checksum:
                    yield None
                    break
                yield kind, block[position + CHUNK.size : end]
                position = end
            place += len(block)
            has_read(len(block))
