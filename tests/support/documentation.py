"""What the README, CONTRIBUTING and the documentation show in fenced blocks."""

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
    "python train.py optimizer.lr=3e-4 'optimizer.betas=[0.9,0.95]' scheduler.warmup_steps=500"
)
"""What the project of the README is made of, and how it is trained there."""


class Block(NamedTuple):
    """A fenced block."""

    page: str
    language: str
    text: str


@functools.cache
def blocks() -> list[Block]:
    """Each fenced block of all pages."""
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
    """The text of the block in that language that begins so."""
    texts = {
        each.text
        for each in blocks()
        if each.language == language and each.text.startswith(beginning)
    }
    assert len(texts) == 1, f"{len(texts)} {language} blocks begin with {beginning!r}"
    return texts.pop()


def typed(pattern: str) -> list[str]:
    """The lines of all shell blocks that match, each once."""
    lines = [line for each in blocks() if each.language == "bash" for line in each.text.split("\n")]
    return [line for line in dict.fromkeys(lines) if line and re.match(pattern, line)]


def files(*beginnings: tuple[str, str]) -> dict[str, str]:
    """Blocks by the path that stands in their first comment."""
    texts = [block(*beginning) for beginning in beginnings]
    # What Hydra is told of a file's package comes first.
    heads = [text.removeprefix("# @package _global_\n").partition("\n")[0] for text in texts]
    return {head.removeprefix("# "): text for head, text in zip(heads, texts, strict=True)}
