"""A page for each topic of `lightning-adam explain` that is configured, with every field."""

from enum import Enum
from typing import get_args, get_type_hints

from docs.rendering.text import code, page, paragraphs, plain, prose
from lightning_adam.config.explain import TOPICS, Documented, Section, documented


def pages() -> dict[str, str]:
    """The pages, by their paths."""
    return {f"configuration/{topic}.md": of(topic) for topic in TOPICS}


def navigation() -> list[object]:
    """Where they stand."""
    return [{topic.capitalize(): f"configuration/{topic}.md"} for topic in TOPICS]


def of(topic: str) -> str:
    """A topic's configs, one after the other."""
    told = prose(f"What `lightning-adam explain {topic}` prints: every field as it is typed, with")
    return page(
        topic.capitalize(),
        told + prose(" its default."),
        *(part for section in TOPICS[topic] for part in _section(section)),
    )


def _section(section: Section) -> list[str]:
    anchor = f"{{ #{section.config.__name__} }}"
    head = [f"## {plain(section.title)} {anchor}", paragraphs(section.summary)]
    return [*head, *(part for field in section.fields for part in _field(section, field))]


def _field(section: Section, field: Documented) -> list[str]:
    # In an anchor, what stands between two underscores would be emphasised.
    anchor = f"{{ #{section.config.__name__}.{field.name.strip('_')} }}"
    typed = f"{code(section.default(field.name))} of type {code(field.type)}"
    return [f"### {code(field.name)} {anchor}", typed, prose(field.meaning), words(section, field)]


def words(section: Section, field: Documented) -> str:
    """The words that a field takes, one a line, and what each means."""
    hint = get_type_hints(section.config)[field.name]
    enums = [
        each
        for each in (hint, *get_args(hint))
        if isinstance(each, type) and issubclass(each, Enum)
    ]
    return "\n".join(
        f"- {code(word.name)}: {prose(word.meaning)}" for each in enums for word in documented(each)
    )
