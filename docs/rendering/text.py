"""Texts of the package as Markdown: punctuation is escaped, names and papers become links."""

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
    # `step` and `lr` are ordinary words too.
    if "_" in name
}
"""Names that mean one statistic or one finding in any text."""
PAPER = r"arXiv (?P<paper>\d{4}\.\d{4,5})|\b(?P<number_alone>\d{4}\.\d{5})\b"
ISSUE = r"\b(?P<repository>[\w-]+/[\w-]+) issue (?P<number>\d+)"
NAME = rf"\b(?P<name>{'|'.join(UNAMBIGUOUS)})\b"
LINKED = re.compile(rf"`(?P<code>[^`]+)`|{PAPER}|{ISSUE}|{NAME}")


def plain(text: str) -> str:
    """Returns a text with all punctuation escaped as character references.

    Any punctuation can be markup to Markdown or to one of its extensions.

    Example:
        >>> plain("max |u| < *x*")
        'max &#124;u&#124; &#60; &#42;x&#42;'
    """
    return "".join(f"&#{ord(each)};" if each in string.punctuation else each for each in text)


def code(text: str) -> str:
    """Returns a text as inline code."""
    return f"<code>{plain(text)}</code>"


def block(language: str, lines: Iterable[str]) -> str:
    """Returns lines as a block of code."""
    return "\n".join([f"```{language}", *lines, "```"])


def statistic(name: str) -> str:
    """Returns a link to the page of a statistic."""
    return f"[{code(name)}](../statistics/{name}.md)"


def finding(name: str) -> str:
    """Returns a link to the page of a finding or a notice."""
    return f"[{code(name)}](../findings/{name}.md)"


def named(name: str) -> str:
    """Returns a name as a link to its page, or as code if it is ambiguous."""
    if name not in UNAMBIGUOUS:
        return code(name)
    return statistic(name) if name in STATISTICS else finding(name)


def prose(text: str) -> str:
    """Returns a text with its code as code, and its names and papers as links.

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
    """Returns paragraphs of prose."""
    return "\n\n".join(prose(" ".join(each.split())) for each in text.split("\n\n"))


def definitions(entries: Iterable[tuple[str, str]]) -> str:
    """Returns a definition list without the empty entries."""
    return "\n\n".join(f"{term}\n:   {text}" for term, text in entries if text)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a table. Its cells are Markdown without `|`."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def symbols() -> str:
    """Returns the symbols of the formulas, one a line."""
    each = re.split(r"(?:;|\.)\s", " ".join(SYMBOLS.split()).rstrip("."))
    return "\n".join(f"- {prose(text)}" for text in each)


def page(title: str, *parts: str) -> str:
    """Returns a page with a title."""
    return "\n\n".join([f"# {title}", *filter(None, parts)]) + "\n"
