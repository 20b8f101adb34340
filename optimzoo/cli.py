"""Command line: ``optimzoo list``, ``doctor``, ``memory``, ``models``, ``start``."""

import argparse
import fnmatch
import io
import os
import sys
import textwrap
from typing import NoReturn

from optimzoo import __version__, doctor
from optimzoo.memory import command as memory
from optimzoo.memory.options import MODEL, parse_hyper
from optimzoo.memory.sources import load_model
from optimzoo.models import CONFIGS, public_models
from optimzoo.registry import get_info, list_optimizers
from optimzoo.tuned_rates import starting_values


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


def list_models(pattern: str) -> int:
    """Print the names of models that match a shell pattern, with parameters and release."""
    rows = [(f"llama-{name}", "", "the benchmarks' own") for name in CONFIGS]
    rows += [
        (model.name, f"{model.parameters:,}", f"{model.released}  {model.repository}")
        for model in public_models()
        if _matches(pattern, model.repository, *model.names)
    ]
    rows = [row for row in rows if row[1] or _matches(pattern, row[0])]
    if not rows:
        raise ValueError(f"no model matches {pattern!r}; see `optimzoo models`")
    width = max(len(name) for name, _, _ in rows)
    for name, parameters, text in rows:
        print(f"{name:<{width}} {parameters:>15}  {text}")
    return 0


def _matches(pattern: str, *names: str) -> bool:
    return any(fnmatch.fnmatch(name.lower(), pattern.lower()) for name in names)


def _add_start_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL)
    parser.add_argument("--optimizer", default="scale", help="default: scale")
    parser.add_argument(
        "--adamw-lr",
        nargs="+",
        metavar="RATE",
        help="your learning rate for AdamW; or by role, as hidden=1e-3 embedding=0.03",
    )
    parser.add_argument("--batch-tokens", type=int, help="tokens of a step")
    parser.add_argument("--steps", type=int, help="steps of the run")
    text = "options of the optimizer with rows of their own, as normalize=spectral"
    parser.add_argument("--hyper", nargs="+", default=[], metavar="NAME=VALUE", help=text)


def start(args: argparse.Namespace) -> int:
    """Print the code that makes an optimizer at its starting values for a model."""
    name = get_info(args.optimizer).name
    taken = parse_hyper(args.hyper, [name]).values()
    values = starting_values(
        name,
        load_model(args.model),
        adamw_lr=_adamw_lr(args.adamw_lr),
        batch_tokens=args.batch_tokens,
        steps=args.steps,
        **{key: value for hyper in taken for key, value in hyper[name].items()},
    )
    torch_too = "import torch\n" if "torch." in str(values) else ""
    print(f"import optimzoo\n{torch_too}\n{values}")
    return 0


def _adamw_lr(words: list[str] | None) -> float | dict[str, float] | None:
    """Return AdamW's rate, or rates by role, as given on the command line."""
    if words is None:
        return None
    try:
        if len(words) == 1 and "=" not in words[0]:
            return float(words[0])
        return {role: float(rate) for role, rate in (word.split("=") for word in words)}
    except ValueError:
        raise ValueError(
            f"--adamw-lr {' '.join(words)}: give one rate, or hidden=RATE and other roles'"
        ) from None


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
    text = "the names of models that memory and start take, with the published parameters"
    models = commands.add_parser("models", help=text, description=text)
    models.add_argument("pattern", nargs="?", default="*", help="a shell pattern, as 'qwen*'")
    commands.add_parser("doctor", help="the kernels of this machine, and whether they are right")
    text = "what fits: exact bytes, the peak of a training step, a script's live peak"
    memory.add_arguments(commands.add_parser("memory", help=text, description=text))
    text = "code to start a run with: learning rates by role, clipping, warm-up"
    _add_start_arguments(commands.add_parser("start", help=text, description=text))
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a console of Windows may lack a character
        sys.stdout.reconfigure(errors="replace")
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
    if args.command == "start":
        return start(args)
    if args.command == "models":
        return list_models(args.pattern)
    return doctor.main() if args.command == "doctor" else list_methods(args.pattern)


def _drop_output() -> None:
    """Discard output that is still to be written to a closed pipe or a full disk."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
