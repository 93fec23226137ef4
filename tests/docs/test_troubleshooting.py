"""The messages of docs/troubleshooting.md are those of the package."""

import ast
import re
from collections.abc import Iterator

from tests.support.commands import REPOSITORY

VARIABLE = "…"
"""Stands for a part of a message that depends on the run."""


def strings_of_package() -> Iterator[str]:
    """Yields all strings of the package, with `VARIABLE` for inserted values."""
    for file in (REPOSITORY / "lightning_adam").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [each.value for each in parts if isinstance(each, ast.Constant)]
            if texts and all(isinstance(each, str) for each in texts):
                values = [
                    each.value if isinstance(each, ast.Constant) else VARIABLE for each in parts
                ]
                yield " ".join("".join(map(str, values)).split())


def test_each_message_of_the_page_is_one_of_the_package() -> None:
    page = (REPOSITORY / "docs/troubleshooting.md").read_text(encoding="utf-8")
    _, *tables = page.split("\n| message |")
    rows = [line for each in tables for line in each.splitlines() if line.startswith("| `")]
    messages = [each for row in rows for each in re.findall("`(.+?)`", row.split(" | ")[0])]
    assert len(messages) > 100
    package = "\n".join(strings_of_package())
    assert [each for each in messages if each.strip(f"{VARIABLE} ") not in package] == []
