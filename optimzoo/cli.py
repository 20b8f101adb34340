"""Command line: ``optimzoo list``, ``doctor`` and ``memory``, also ``python -m optimzoo``."""

import argparse
import os
import sys
import textwrap
from typing import NoReturn

from optimzoo import __version__, doctor
from optimzoo.memory import command as memory
from optimzoo.registry import get_info, list_optimizers


def list_methods(pattern: str) -> int:
    """Print the optimizers whose names match a shell pattern, each with its description."""
    names = list_optimizers(pattern)
    if not names:
        raise ValueError(f"no optimizer matches {pattern!r}; see `optimzoo list`")
    for name in names:
        info = get_info(name)
        first = f"{name:<15} "
        text = f"{info.description} ({info.source})"
        print(textwrap.fill(text, 80, initial_indent=first, subsequent_indent=" " * len(first)))
    return 0


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line, those of sub-commands too."""

    def error(self, message: str) -> NoReturn:
        """Print the error in one line and exit with status 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status: 2 with a one-line error, 130 after Ctrl-C."""
    parser = Parser(prog="optimzoo", description="memory-efficient optimizers")
    parser.add_argument("--version", action="version", version=f"optimzoo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="the optimizers of create_optimizer")
    listing.add_argument("pattern", nargs="?", default="*", help="a shell pattern, as 'ada*'")
    commands.add_parser("doctor", help="the kernels of this machine, and whether they are right")
    text = "what fits: exact bytes, the peak of a training step, a script's live peak"
    memory.add_arguments(commands.add_parser("memory", help=text, description=text))
    args = parser.parse_args(argv)
    try:
        status = _run(args)
        sys.stdout.flush()  # report a failed write here, not from the interpreter's shutdown
        return status
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has read enough
        _drop_output()
        return 141
    except OSError as error:
        _drop_output()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    if args.command == "memory":
        return memory.main(args)
    return doctor.main() if args.command == "doctor" else list_methods(args.pattern)


def _drop_output() -> None:
    """Discard output that is still to be written to a closed pipe or a full disk."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
