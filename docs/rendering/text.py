"""The package's texts as Markdown: nothing in them is markup, and names and papers are links."""

import re
import string
from collections.abc import Iterable
from dataclasses import fields

from lightning_adam.config.explain import TOPICS
from lightning_adam.findings import RULES
from lightning_adam.findings.preflight import NOTICES
from lightning_adam.statistics.catalogue import STATISTICS, SYMBOLS

FIELDS = {
    field.name for topic in TOPICS.values() for each in topic for field in fields(each.config)
}
UNAMBIGUOUS = {
    name
    for name in (STATISTICS.keys() ^ (RULES.keys() | NOTICES.keys())) - FIELDS
    # `step` and `lr` are words of any sentence.
    if "_" in name
}
"""Names that mean one statistic or one finding, wherever they stand."""
PAPER = r"arXiv (?P<paper>\d{4}\.\d{4,5})|\b(?P<number_alone>\d{4}\.\d{5})\b"
ISSUE = r"\b(?P<repository>[\w-]+/[\w-]+) issue (?P<number>\d+)"
NAME = rf"\b(?P<name>{'|'.join(UNAMBIGUOUS)})\b"
LINKED = re.compile(rf"`(?P<code>[^`]+)`|{PAPER}|{ISSUE}|{NAME}")


def plain(text: str) -> str:
    """A text in which nothing is markup, whatever stands in it.

    Any mark of punctuation may mean something to Markdown, or to one of its extensions, which no
    character reference does.

    Example:
        >>> plain("max |u| < *x*")
        'max &#124;u&#124; &#60; &#42;x&#42;'
    """
    return "".join(f"&#{ord(each)};" if each in string.punctuation else each for each in text)


def code(text: str) -> str:
    """A text as code within a line."""
    return f"<code>{plain(text)}</code>"


def block(language: str, lines: Iterable[str]) -> str:
    """Lines as a block of code."""
    return "\n".join([f"```{language}", *lines, "```"])


def statistic(name: str) -> str:
    """A link to a statistic's page."""
    return f"[{code(name)}](../statistics/{name}.md)"


def finding(name: str) -> str:
    """A link to a finding's page."""
    return f"[{code(name)}](../findings/{name}.md)"


def named(name: str) -> str:
    """A link to what a name means, if it means one thing only."""
    if name not in UNAMBIGUOUS:
        return code(name)
    return statistic(name) if name in STATISTICS else finding(name)


def prose(text: str) -> str:
    """A text with its code as code, and its names and papers as links.

    Example:
        >>> prose("see `a_b`, arXiv 1412.6980")
        'see <code>a&#95;b</code>&#44; [arXiv 1412&#46;6980](https://arxiv.org/abs/1412.6980)'
    """
    parts, end = [], 0
    for found in LINKED.finditer(text):
        parts += [plain(text[end : found.start()]), _linked(found)]
        end = found.end()
    return "".join([*parts, plain(text[end:])])


def _linked(found: re.Match[str]) -> str:
    if found["code"]:
        return named(found["code"])
    if paper := found["paper"] or found["number_alone"]:
        return f"[{plain(found[0])}](https://arxiv.org/abs/{paper})"
    if found["repository"]:
        address = f"https://github.com/{found['repository']}/issues/{found['number']}"
        return f"[{plain(found[0])}]({address})"
    return named(found["name"])


def paragraphs(text: str) -> str:
    """Several paragraphs of prose."""
    return "\n\n".join(prose(" ".join(each.split())) for each in text.split("\n\n"))


def definitions(entries: Iterable[tuple[str, str]]) -> str:
    """What is said of each of several things, those left out of which nothing is said."""
    return "\n\n".join(f"{term}\n:   {said}" for term, said in entries if said)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of cells in Markdown that holds no `|`."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def symbols() -> str:
    """The symbols of the formulas, one a line."""
    each = re.split(r"(?:;|\.)\s", " ".join(SYMBOLS.split()).rstrip("."))
    return "\n".join(f"- {prose(said)}" for said in each)


def page(title: str, *parts: str) -> str:
    """A page with a title, which is a name or words."""
    return "\n\n".join([f"# {title}", *filter(None, parts)]) + "\n"
