"""Checks that refuse command-line options without effect, and errors on one line."""

import argparse
import textwrap
from collections.abc import Iterable


def refuse(
    args: argparse.Namespace,
    names: Iterable[str],
    given_options: list[str],
    reason: str,
    but: str | bool = False,
) -> None:
    """Refuse the first of ``names`` that was given, as it would have no effect.

    Raises:
        ValueError: names the option, its value and ``reason``, with ``{option}`` replaced.
    """
    for name in names:
        if name in given_options and name != but:
            value = getattr(args, name)
            value = " ".join(map(str, value)) if isinstance(value, list) else value
            option = f"--{name.replace('_', '-')}"
            shown = option if value is True else f"{option} {value}"
            raise ValueError(f"{shown}: {reason.format(option=option)}")


def brief(error: BaseException) -> str:
    """Return an error as ``Type: message`` on one line, the message cut to 200 characters."""
    text = textwrap.shorten(str(error), 200, placeholder=" …")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
