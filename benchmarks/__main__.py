"""`python -m benchmarks COMMAND`: train, compare, reproduce, report."""

import argparse
import os
import signal
import sys

from benchmarks.experiments import cast, compare, fine_tuning, oracle, starting_values
from benchmarks.microbench import (
    gpu_suite,
    gradient_release,
    low_rank,
    memory_planner,
    mfu,
    sparsity,
    step_time,
    step_time_by_size,
)
from benchmarks.papers import reproduce
from benchmarks.report import readme
from benchmarks.training import cli as train

COMMANDS = {
    "train": (train, "train one model with one optimizer"),
    "compare": (compare, "train the same model with several optimizers and print the table"),
    "cast": (cast, "from a dense model to a 2:4 one: CAST beside other ways"),
    "oracle": (oracle, "a published run of others, repeated: nanoGPT on tiny Shakespeare"),
    "starting-values": (starting_values, "starting values beside each method's own best"),
    "fine-tuning": (fine_tuning, "what methods learn of a second text, and forget of the first"),
    "step-time": (step_time, "what one optimizer step costs, as ratios in one process"),
    "growth": (step_time_by_size, "how one step's cost grows from a million weights to a billion"),
    "lowrank-time": (low_rank, "what low-rank weights cost: refactorization and SLTrain"),
    "sparse-time": (sparsity, "what N:M masks cost, and what a 2:4 layer gives on a GPU"),
    "release-memory": (gradient_release, "what optimizer-in-backward frees"),
    "memory": (memory_planner, "the memory planner against what torch holds, and the 7B plan"),
    "utilisation": (mfu, "how much of a GPU training uses, and the optimizer's share"),
    "gpu": (gpu_suite, "build, test, sanitize and measure the kernels on a GPU"),
    "report": (readme, "write the README's tables from the committed results"),
    "reproduce": (reproduce, "a paper's table beside ours"),
}


def _given(
    parser: argparse.ArgumentParser, args: argparse.Namespace, words: list[str]
) -> list[str]:
    """Return the names of the options on the command line, those at their defaults included.

    A value that is set before parsing keeps argparse from setting the default.
    """
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))
    parsed = parser.parse_args(words[words.index(args.command) + 1 :], unset)
    return [name for name, value in vars(parsed).items() if value is not None]


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status: 2, with one line on stderr, for bad input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=text, description=text))
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    args.given = _given(commands.choices[args.command], args, words)
    try:
        return COMMANDS[args.command][0].main(args)
    except KeyboardInterrupt:
        saved = getattr(args, "out", None) is not None
        text = "the same command goes on from here" if saved else "nothing is saved without --out"
        if os.environ.get("RANK", "0") == "0":  # of the processes of torchrun one says it
            print(f"stopped; {text}", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    status = main()
    for number in (signal.SIGINT, signal.SIGTERM):  # nothing is left to save, nor to tell
        signal.signal(number, signal.SIG_DFL)
    sys.exit(status)
