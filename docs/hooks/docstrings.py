"""Conversion of docstrings, with reStructuredText's literal blocks and roles, to Markdown."""

import re
import textwrap
from typing import Any

import griffe

from docs.hooks.maths import is_maths, mathml, rule

# A line that ends with two colons, and the indented lines below it.
BLOCK = re.compile(r"^( *)(.*)::\n\n((?:\1 +.*\n|\n(?=\1 ))+)", re.MULTILINE)


def markdown(text: str) -> str:
    """Replace ``::`` before a block by ``:``, roles such as :func: by code, maths by MathML."""

    def block(match: re.Match[str]) -> str:
        indent, before, body = match[1], match[2], match[3]
        typeset = rule(textwrap.dedent(body).splitlines())
        if typeset:
            body = f"{indent}{typeset}\n"
        return (f"{indent}{before}:\n\n" if before else "") + body

    text = BLOCK.sub(block, f"{text}\n")[:-1]
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    text = re.sub(r":(?:func|class|meth|mod|attr):`~?([^`]+)`", r"`\1`", text)
    return re.sub(
        r"(?<!`)``([^`]+)``(?!`)", lambda m: mathml(m[1]) if is_maths(m[1]) else m[0], text
    )


class Markdown(griffe.Extension):
    """Extension of griffe that applies :func:`markdown` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Convert the docstring of a loaded object."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
