"""``optimzoo list``, ``doctor`` and ``memory``, also as ``python -m optimzoo``."""

import argparse
import sys
import textwrap

from optimzoo import __version__, doctor
from optimzoo.memory import command as memory
from optimzoo.registry import get_info, list_optimizers


def list_methods(pattern: str) -> int:
    """Print the optimizers whose names match a shell pattern, one a line."""
    names = list_optimizers(pattern)
    if not names:
        raise ValueError(f"no optimizer matches {pattern!r}; see `optimzoo list`")
    for name in names:
        info = get_info(name)
        first = f"{name:<15} "
        text = f"{info.description} ({info.source})"
        print(textwrap.fill(text, 80, initial_indent=first, subsequent_indent=" " * len(first)))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one command; bad input is one line on stderr and exit status 2, Ctrl-C is 130."""
    parser = argparse.ArgumentParser(prog="optimzoo", description="memory-efficient optimizers")
    parser.add_argument("--version", action="version", version=f"optimzoo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="the optimizers of create_optimizer")
    listing.add_argument("pattern", nargs="?", default="*", help="a shell pattern, as 'ada*'")
    commands.add_parser("doctor", help="the kernels of this machine, and whether they are right")
    text = "what fits: exact bytes, the peak of a training step, a script's live peak"
    memory.add_arguments(commands.add_parser("memory", help=text, description=text))
    args = parser.parse_args(argv)
    try:
        if args.command == "memory":
            return memory.main(args)
        return doctor.main() if args.command == "doctor" else list_methods(args.pattern)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
