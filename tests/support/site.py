"""The documentation's site, as `make docs` builds it."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.commands import BIN, REPOSITORY, run_text
from tests.support.shared import shared

OUTPUT = "output.txt"


@dataclass
class Site:
    """The built site, and the output of mkdocs."""

    folder: Path
    output: str


def built_site(factory: pytest.TempPathFactory) -> Site:
    """Builds the site once for all test processes."""
    folder = shared(factory, "site", _build)
    return Site(folder / "site", (folder / OUTPUT).read_text(encoding="utf-8"))


def _build(folder: Path) -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    (line,) = re.findall(r"^docs:.*\n\t(.*)$", makefile, re.MULTILINE)
    (program,) = re.findall(r"^MKDOCS := (.*)$", makefile, re.MULTILINE)
    command = line.replace("$(MKDOCS)", program)
    command = command.replace("$(BIN)", shlex.quote(str(BIN / "python")))
    built = run_text(f"{command} --site-dir {shlex.quote(str(folder / 'site'))}", REPOSITORY)
    assert built.returncode == 0, built.output
    (folder / OUTPUT).write_text(built.output, encoding="utf-8")
