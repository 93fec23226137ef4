"""Environments with only the requirements of an extra, linked from that of the tests.

Installing torch and its dependencies takes minutes; pip finds the linked packages installed.
"""

import sys
import sysconfig
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

PACKAGE = "lightning-adam"


def link_packages(environment: Path, extra: str = "", requires: Iterable[str] = ()) -> None:
    """Links the requirements of lightning_adam into an environment of the same Python.

    Args:
        environment: The folder of the environment.
        extra: An extra of lightning_adam, whose requirements are linked too.
        requires: The requirements, as the metadata of a wheel lists them; by default those of the
            lightning_adam that the tests import.
    """
    paths = {"base": str(environment), "platbase": str(environment)}
    site_packages = Path(sysconfig.get_path("purelib", vars=paths))
    commands = Path(sysconfig.get_path("scripts", vars=paths))
    root = Requirement(f"{PACKAGE}[{extra}]")
    for linked in distributions(root, list(requires) or distribution(PACKAGE).requires or ()):
        for file in linked.files or ():
            source = Path(str(linked.locate_file(file)))
            if file.parts[0] != "..":
                link(site_packages / file.parts[0], Path(str(linked.locate_file(file.parts[0]))))
            elif source.parent.resolve() == Path(sys.executable).parent:
                write_script(commands / source.name, source)


def distributions(root: Requirement, requires: Iterable[str]) -> list[Distribution]:
    """Returns the distributions that a package and its extras need, without the package itself."""
    found: dict[str, Distribution] = {}
    open_, seen = [(root, requires)], set()
    while open_:
        asking, lines = open_.pop()
        extras = [{"extra": extra} for extra in ("", *asking.extras)]
        for each in map(Requirement, lines):
            key = (each.name.lower(), *sorted(each.extras))
            is_needed = each.marker is None or any(map(each.marker.evaluate, extras))
            if not is_needed or key in seen:
                continue
            seen.add(key)
            if each.name == root.name:
                open_.append((each, requires))
            else:
                found[each.name.lower()] = here = distribution(each.name)
                open_.append((each, here.requires or ()))
    return list(found.values())


def link(name: Path, source: Path) -> None:
    if not name.exists() and source.name != "__pycache__":
        name.symlink_to(source, target_is_directory=source.is_dir())


def write_script(name: Path, source: Path) -> None:
    """Rewrites a pip command for another environment; its path may contain a space."""
    first, _, rest = source.read_text(errors="replace").partition("\n")
    if first.startswith("#!") and "python" in first:
        python = name.parent / "python"
        name.write_text(f"#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\n{rest}")
        name.chmod(0o755)
