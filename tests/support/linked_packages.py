"""An environment with what an extra asks for and nothing else, borrowed from that of the tests.

To install torch and what stands beside it anew takes minutes; pip finds that all of it is there.
"""

import sys
import sysconfig
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

PACKAGE = "lightning-adam"


def lend(environment: Path, extra: str) -> None:
    """Links into an environment of the same Python all that an extra of ours needs."""
    paths = {"base": str(environment), "platbase": str(environment)}
    site_packages = Path(sysconfig.get_path("purelib", vars=paths))
    commands = Path(sysconfig.get_path("scripts", vars=paths))
    for lent in needed(f"{PACKAGE}[{extra}]").values():
        for file in lent.files or ():
            source = Path(str(lent.locate_file(file)))
            if file.parts[0] != "..":
                link(site_packages / file.parts[0], Path(str(lent.locate_file(file.parts[0]))))
            elif source.parent.resolve() == Path(sys.executable).parent:
                script(commands / source.name, source)


def needed(requirement: str) -> dict[str, Distribution]:
    """The distributions that a requirement brings, by name, without our own."""
    found: dict[str, Distribution] = {}
    asked, seen = [Requirement(requirement)], set()
    while asked:
        each = asked.pop()
        key = (each.name.lower(), *sorted(each.extras))
        if key in seen:
            continue
        seen.add(key)
        here = distribution(each.name)
        if each.name != PACKAGE:
            found[each.name.lower()] = here
        wanted = [{"extra": extra} for extra in ("", *each.extras)]
        for line in here.requires or ():
            further = Requirement(line)
            if further.marker is None or any(map(further.marker.evaluate, wanted)):
                asked.append(further)
    return found


def link(name: Path, source: Path) -> None:
    if not name.exists() and source.name != "__pycache__":
        name.symlink_to(source, target_is_directory=source.is_dir())


def script(name: Path, source: Path) -> None:
    """A command that runs in its own environment, whose folder may have a space, as pip's do."""
    first, _, rest = source.read_text(errors="replace").partition("\n")
    if first.startswith("#!") and "python" in first:
        python = name.parent / "python"
        name.write_text(f"#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\n{rest}")
        name.chmod(0o755)
