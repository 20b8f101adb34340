"""Docstrings as Markdown: they are written with reStructuredText's literal blocks and roles."""

import re
from typing import Any

import griffe


def markdown(text: str) -> str:
    """``text`` with ``::`` before a block as ``:``, and roles such as :func: as code."""
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return re.sub(r":(?:func|class|meth|mod|attr):`~?([^`]+)`", r"`\1`", text)


class Markdown(griffe.Extension):
    """Applies :func:`markdown` to every docstring that is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """One object has been loaded."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
