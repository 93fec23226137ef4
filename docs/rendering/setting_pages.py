"""A page for each topic of `lightning-adam explain` that is configured, with every field."""

from enum import Enum
from typing import get_args, get_type_hints

from docs.rendering.text import code, page, paragraphs, plain, prose
from lightning_adam.config.explain import TOPICS, FieldDoc, Section, field_docs


def pages() -> dict[str, str]:
    """Returns the pages by their paths."""
    return {f"configuration/{topic}.md": of(topic) for topic in TOPICS}


def navigation() -> list[object]:
    """Returns their entries in the navigation."""
    return [{topic.capitalize(): f"configuration/{topic}.md"} for topic in TOPICS]


def of(topic: str) -> str:
    """Returns the page of a topic, with the fields of its configs."""
    return page(
        topic.capitalize(),
        prose(f"Look up a field and its default, as `lightning-adam explain {topic}` prints it."),
        *(part for section in TOPICS[topic] for part in _section(section)),
    )


def _section(section: Section) -> list[str]:
    anchor = f"{{ #{section.config.__name__} }}"
    head = [f"## {plain(section.title)} {anchor}", paragraphs(section.summary)]
    return [*head, *(part for field in section.fields for part in _field(section, field))]


def _field(section: Section, field: FieldDoc) -> list[str]:
    # Markdown would emphasise text between two underscores in an anchor.
    anchor = f"{{ #{section.config.__name__}.{field.name.strip('_')} }}"
    typed = f"{code(section.default(field.name))} of type {code(field.type)}"
    return [f"### {code(field.name)} {anchor}", typed, prose(field.meaning), words(section, field)]


def words(section: Section, field: FieldDoc) -> str:
    """Returns the words that a field accepts and their meanings, one a line."""
    hint = get_type_hints(section.config)[field.name]
    enums = [
        each
        for each in (hint, *get_args(hint))
        if isinstance(each, type) and issubclass(each, Enum)
    ]
    return "\n".join(
        f"- {code(word.name)}: {prose(word.meaning)}" for each in enums for word in field_docs(each)
    )
