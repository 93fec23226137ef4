"""The fenced blocks of the README, of CONTRIBUTING and of the documentation."""

import functools
import re
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[2]
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]

TRAIN = ("python", "# train.py\n")
CONFIG = ("yaml", "# conf/config.yaml\n")
TRAIN_LINE = (
    "python train.py optimizer.lr=3e-3 'optimizer.betas=[0.9,0.95]' scheduler.warmup_steps=100"
)
"""The two files of the project of the quick start, and the command that trains it."""


class Block(NamedTuple):
    """A fenced block."""

    page: str
    language: str
    text: str


@functools.cache
def blocks() -> list[Block]:
    """Returns the fenced blocks of all pages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = re.findall(r"^ *(`{3,}|~{3,})", text, re.MULTILINE)
        pairs = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
        assert len(fences) == 2 * len(pairs), f"a fence of {page} is indented or not closed"
        name = page.relative_to(REPOSITORY).as_posix()
        found += [Block(name, language, block) for language, block in pairs]
    return found


def block(language: str, beginning: str) -> str:
    """Returns the text of the only block in a language with a prefix."""
    texts = {
        each.text
        for each in blocks()
        if each.language == language and each.text.startswith(beginning)
    }
    assert len(texts) == 1, f"{len(texts)} {language} blocks begin with {beginning!r}"
    return texts.pop()


def shell_lines(pattern: str) -> list[str]:
    """Returns the lines of all shell blocks that match from their start, each once."""
    lines = [line for each in blocks() if each.language == "bash" for line in each.text.split("\n")]
    return [line for line in dict.fromkeys(lines) if line and re.match(pattern, line)]


def named_files(*beginnings: tuple[str, str]) -> dict[str, str]:
    """Returns blocks by the path in their first comment."""
    texts = [block(*beginning) for beginning in beginnings]
    # A directive for Hydra comes before the path.
    heads = [text.removeprefix("# @package _global_\n").partition("\n")[0] for text in texts]
    return {head.removeprefix("# "): text for head, text in zip(heads, texts, strict=True)}
