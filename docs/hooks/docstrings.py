"""Conversion of docstrings, with reStructuredText's literal blocks and roles, to Markdown."""

import re
from typing import Any

import griffe


def markdown(text: str) -> str:
    """Replace ``::`` before a block by ``:``, and roles such as :func: by code."""
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return re.sub(r":(?:func|class|meth|mod|attr):`~?([^`]+)`", r"`\1`", text)


class Markdown(griffe.Extension):
    """Extension of griffe that applies :func:`markdown` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Convert the docstring of a loaded object."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
