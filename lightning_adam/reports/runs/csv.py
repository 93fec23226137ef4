"""Reads the metrics.csv of Lightning's CSVLogger."""

import csv
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lightning_adam.reports.keys import is_tensor
from lightning_adam.reports.runs.part import RunPart


def read(file: Path, has_read: Callable[[int], object]) -> RunPart:
    """Reads the complete lines of a metrics.csv.

    Args:
        file: The file.
        has_read: Called with the number of bytes read since the last call.
    """
    part = RunPart(file, "CSVLogger")
    incomplete = 0
    with file.open(encoding="utf-8", errors="replace", newline="") as lines:
        rows = map(_cells, _complete_lines(lines, has_read))
        names = next(rows, [])
        if "step" not in names:
            part.notes.append(f"{file}: nothing could be read; it has no column step.")
            return part
        for row in rows:
            step = row[names.index("step")] if len(row) == len(names) else ""
            if not re.fullmatch("[0-9]{1,18}", step):
                incomplete += 1
                continue
            numbers = {}
            for name, cell in zip(names, row, strict=True):
                if is_tensor(name) and cell:
                    part.add_tensor(int(step), name, cell)
                elif name not in ("step", "epoch") and _is_number(cell):
                    numbers[name] = float(cell)
            part.add(int(step), numbers)
    if incomplete or not _ends_a_line(file):
        part.notes.append(f"{part.name}: its file has lines that are cut; the rest is shown.")
    return part


def _complete_lines(lines: Iterable[str], has_read: Callable[[int], object]) -> Iterator[str]:
    for line in lines:
        has_read(len(line))
        if line.endswith("\n"):
            yield line


def _cells(line: str) -> list[str]:
    """Returns the cells of one line, so that a damaged quote does not extend to the next."""
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _ends_a_line(file: Path) -> bool:
    with file.open("rb") as content:
        content.seek(-1, os.SEEK_END)
        return content.read() == b"\n"
