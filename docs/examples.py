"""Makes Griffe parse `Example:` in a docstring as the section `Examples:`."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Lets the doctests below `Example:` be read as such."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Reads an object's docstring before it is parsed."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
