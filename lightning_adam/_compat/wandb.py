"""Private names and formats of wandb, as of 0.31.0.

W&B also turns a logged table into an artifact. For this the client waits for the server during
training, up to 19 s if it does not answer. `keep_as_file` prevents it.

The documented `wandb leet inspect --json` prints 10 MB per second, more than a minute for a run of
100,000 rows. `records` reads the same file ten times as fast.
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
"""Size of the blocks of LevelDB's log format. No chunk crosses the end of a block."""
CHUNK = struct.Struct("<IHB")
"""Checksum, length and type of a chunk."""
HistoryItem: TypeAlias = Any
"""`wandb_internal_pb2.HistoryItem`, whose module has no types; likewise the following."""
ConfigRecord: TypeAlias = Any
Record: TypeAlias = Any
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def keep_as_file(table: wandb.Table, run: "wandb.Run", key: str) -> None:
    """Makes W&B log a table as a file of the run, without an artifact."""
    table.bind_to_run(run, key, run.step)  # type: ignore[no-untyped-call]


def is_log(path: Path) -> bool:
    """Returns whether a file has the header of a W&B run."""
    with path.open("rb") as file:
        return file.read(HEADER.size).startswith(IDENTIFIER)


def records(path: Path, has_read: Callable[[int], object]) -> Iterator[Record | None]:
    """Yields the records of a run's file.

    Args:
        path: A .wandb file, which may be truncated.
        has_read: Called with the number of bytes that were read since the last call.

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
        offset = len(file.read(HEADER.size))
        is_whole = True
        while is_whole and (block := file.read(BLOCK - offset % BLOCK)):
            # The last block may be incomplete, because the run is still writing it.
            is_whole = (offset + len(block)) % BLOCK == 0
            position = 0
            while position + CHUNK.size <= len(block):
                checksum, length, kind = CHUNK.unpack_from(block, position)
                end = position + CHUNK.size + length
                if end > len(block) and not is_whole:
                    break
                # The checksum covers the type and the data.
                data = block[position + CHUNK.size - 1 : end]
                is_chunk = FULL <= kind <= LAST and end <= len(block)
                if not is_chunk or zlib.crc32(data) != checksum:
                    yield None
                    break
                yield kind, block[position + CHUNK.size : end]
                position = end
            offset += len(block)
            has_read(len(block))
