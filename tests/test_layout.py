"""The folders of the package and the direction of their imports."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_adam

PACKAGE = Path(lightning_adam.__file__).parent
ORDER = (
    *("__init__", "cli", "callbacks"),
    *("tune", "reports", "monitor", "findings", "optim", "statistics", "config", "_compat"),
    "version",
)
"""From top to bottom: each may import those after it."""


def modules(package: Path) -> dict[str, Path]:
    """Returns the modules by dotted name within the package."""
    paths = {path.relative_to(package).with_suffix(""): path for path in package.rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in paths.items()}


def imports(package: Path) -> Iterator[tuple[str, str]]:
    """Yields pairs of importing and imported module, including imports in functions."""
    names = modules(package)
    for name, path in names.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                members = {f"{node.module}.{alias.name}" for alias in node.names}
                found = {each if within(each) in names else node.module for each in members}
            else:
                continue
            yield from ((name, within(each)) for each in sorted(found) if within(each) in names)


def within(module: str) -> str:
    """Returns the name of a module within the package."""
    return module.partition("lightning_adam.")[2] or module.replace("lightning_adam", "__init__")


def upward_imports(package: Path) -> list[str]:
    place = {folder: index for index, folder in enumerate(ORDER)}
    return [
        f"{importer} imports {imported}"
        for importer, imported in imports(package)
        if place[importer.partition(".")[0]] > place[imported.partition(".")[0]]
    ]


def test_package_has_eight_folders_and_four_modules() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert found - {"__pycache__", "conf"} == set(ORDER)


def test_imports_point_down() -> None:
    assert not upward_imports(PACKAGE)


def test_no_modules_import_each_other() -> None:
    graph = graphlib.TopologicalSorter[str]()
    for importer, imported in imports(PACKAGE):
        graph.add(importer, imported)
    graph.prepare()


@pytest.mark.parametrize(
    "line",
    ["import lightning_adam.tune.search", "def f():\n    from lightning_adam.tune import search"],
)
def test_upward_import_is_found(line: str, tmp_path: Path) -> None:
    for name, text in {"config/errors.py": line, "tune/search.py": ""}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    assert upward_imports(tmp_path) == ["config.errors imports tune.search"]
