"""What Griffe is told of our docstrings: `Example:` is a section, as `Examples:` is to it."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Lets the doctests below `Example:` be read as such."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Reads an object's docstring before it is parsed."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
