"""Writes the story of a search beside its trials: `tune.md`, and `tune.html` to look at."""

import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from lightning_adam.tune import html, markdown
from lightning_adam.tune.story import Story

log = logging.getLogger(__name__)
_said: set[str] = set()
"""What has been logged already."""


def write_story(story: Story, folder: Path) -> None:
    """Writes the story to a folder; what was there before is replaced at once, never in part.

    What goes wrong is logged, once, and stops nothing: the trials are worth more than their story.

    Args:
        story: What the search has come to.
        folder: Where to; it has to be there.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_story(Story("mnist", "mnist", "maximize", 20, 2, [], []), folder)
        >>> sorted(each.name for each in folder.iterdir())
        ['tune.html', 'tune.md']
    """
    _write(folder / "tune.md", lambda: markdown.page(story))
    _write(folder / "tune.html", lambda: html.page(story))


def _write(file: Path, page: Callable[[], str]) -> None:
    # Two processes may write to one folder.
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        # A name that the filesystem has no text for can be written all the same.
        partial.write_bytes(page().encode("utf-8", errors="backslashreplace"))
        os.replace(partial, file)
    except Exception as error:
        partial.unlink(missing_ok=True)
        said = f"adam_tune: {file} was not written ({type(error).__name__}: {error})"
        if said not in _said:
            _said.add(said)
            log.warning(said)
