"""`python -m benchmarks train`, and the corpus options of all commands."""

import argparse
import json
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.files import make_folder
from benchmarks.common.progress import RunProgress
from benchmarks.data.characters import character_corpus
from benchmarks.data.corpus import Corpus, load_corpus
from benchmarks.data.gratings import grating_corpus
from benchmarks.training.config import PRECISIONS, RunConfig
from benchmarks.training.distributed import KINDS, start
from benchmarks.training.flops import speed_text
from benchmarks.training.gpt import GPTConfig
from benchmarks.training.loop import finished, train
from benchmarks.training.metrics import perplexity
from benchmarks.training.models import CHARACTERS, IMAGES, OTHERS, vocab_size
from benchmarks.training.run import refuse_early
from optimzoo.models import get_config, is_config
from optimzoo.options import refuse

OPTIMIZER = "a name of optimzoo.list_optimizers(), package.module:Class, or FILE.py:Class"
MODEL = "a Llama by name, as nano; a public model, as gpt2; or the config.json of a causal one"
_OF_OUT = ("eval_every", "save_every", "keep", "keep_weights", "skip_damaged")


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the text, or its tokens."""
    parser.add_argument(
        "--data",
        nargs="+",
        default=["stdlib"],
        metavar="SOURCE",
        help="stdlib (this Python's own sources), c4, .txt and .jsonl files (.gz, .xz, .zst), "
        "or one folder of tokens: NAME-KEY of a --cache-dir, copied from any machine",
    )
    parser.add_argument("--max-chars", type=int, help="take at most this much training text")
    parser.add_argument("--max-tokens", type=int, help="c4: stream this many training tokens")
    parser.add_argument("--cache-dir", type=Path, default=Path(".cache/optimzoo"))
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="encode the text with that of a folder of tokens; default: it is trained on the text",
    )


def refuse_cache(args: argparse.Namespace) -> None:
    """Refuse a `--cache-dir` that would have no effect.

    Raises:
        ValueError: it was given with a folder of tokens.
    """
    named = args.data in (["stdlib"], ["c4"])
    if not named and len(args.data) == 1 and Path(args.data[0]).is_dir():
        reason = "--data is a folder of tokens, which are read where they lie; leave {option} out"
        refuse(args, ["cache_dir"], args.given, reason)


def corpus_from(args: argparse.Namespace, model: str, *, progress: bool = True) -> Corpus:
    """Load the corpus that the options choose, tokenized for a model.

    Raises:
        ValueError: options that the model's corpus does not take.
    """
    if model in (CHARACTERS, IMAGES):
        without_effect = ["data"] if model == IMAGES else []
        reason = f"the data of model {model} are its own, and whole; leave {{option}} out"
        refuse(args, [*without_effect, "max_chars", "max_tokens", "tokenizer"], args.given, reason)
    if model == IMAGES:
        return grating_corpus()
    if model == CHARACTERS:
        if len(args.data) != 1 or args.data in (["stdlib"], ["c4"]):
            raise ValueError(f"model {model} reads the characters of a text; give --data FILE")
        return character_corpus(Path(args.data[0]), GPTConfig.context)
    source = args.data[0] if args.data in (["stdlib"], ["c4"]) else args.data
    return load_corpus(
        source,
        vocab_size=vocab_size(model),
        cache_dir=args.cache_dir,
        progress=progress,
        max_chars=args.max_chars,
        max_tokens=args.max_tokens,
        tokenized_as=args.tokenizer,
    )


def as_json(text: str) -> Any:
    """Parse the JSON value of an option."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error}); see --help") from None


# Fields of `RunConfig` whose option is more than a value of their type.
_OPTIONS: dict[str, dict[str, Any]] = {
    "optimizer": {"required": True, "help": OPTIMIZER},
    "lr": {"type": float, "required": True, "help": "of the method's own weights"},
    "other_lr": {"type": float, "help": "of the rest (see optimzoo.get_info)"},
    "hyper": {"type": as_json, "help": "JSON, e.g. '{\"eps\": 1e-6}'"},
    "model": {"help": MODEL},
    "precision": {"choices": PRECISIONS},
    "compile": {"action": "store_true", "help": "torch.compile the model"},
    "lowrank": {"type": as_json, "help": "JSON, e.g. '{\"rank\": 32}' (see RunConfig)"},
    "groups": {"type": as_json, "help": "JSON, further options of a role's weights"},
    "release": {"action": "store_true", "help": "step weights in the backward"},
    "weights": {"metavar": "FILE", "help": "weights.pt to start from"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks train`: `RunConfig`'s fields, and the output."""
    for name, default in vars(RunConfig("", 0.0)).items():
        options = _OPTIONS.get(name, {"type": type(default)})
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, **options)
    add_corpus_arguments(parser)
    parser.add_argument("--out", type=Path, help="folder of checkpoints, TensorBoard and row.json")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--keep", type=int, default=3, metavar="N", help="checkpoints to keep")
    parser.add_argument(
        "--skip-damaged", action="store_true", help="go on from the newest whole checkpoint"
    )
    parser.add_argument("--keep-weights", action="store_true", help="write OUT/weights.pt")
    parser.add_argument("--eval-every", type=int, default=0, metavar="STEPS")
    parser.add_argument(
        "--parallel", choices=KINDS, default="none", help="how the processes of torchrun share it"
    )


def main(args: argparse.Namespace) -> int:
    """Train with a progress bar and print the result. Return 1 if the run diverged."""
    if args.out is None:
        reason = "it is of what --out keeps; add --out FOLDER, or leave {option} out"
        refuse(args, _OF_OUT, args.given, reason)
    refuse_cache(args)
    config = RunConfig(**{f.name: getattr(args, f.name) for f in fields(RunConfig)})
    refuse_early(config)
    if args.out is not None:
        make_folder(args.out, "--out")
    with start(args.parallel) as parallel:
        corpus = parallel.first(lambda: corpus_from(args, config.model, progress=parallel.leads))
        late = [name for name in (*_OF_OUT, "parallel") if name in args.given]
        if late and parallel.leads and finished(config, corpus, args.out):
            names = ", ".join("--" + name.replace("_", "-") for name in late)
            print(f"note: without effect, {args.out} is finished: {names}; take another --out")
        bars = RunProgress(config.steps) if parallel.leads else nullcontext()
        with bars as bar:
            row = train(
                config,
                corpus,
                out=args.out,
                progress=bar.start(config.optimizer, config.steps) if bar else None,
                save_every=args.save_every,
                eval_every=args.eval_every,
                parallel=parallel,
                keep=args.keep,
                skip_damaged=args.skip_damaged,
                keep_weights=args.keep_weights,
            )
    return _print_result(config, row) if parallel.leads else int(row["diverged"])


def _print_result(config: RunConfig, row: dict[str, Any]) -> int:
    if row["diverged"]:
        print(f"{config.optimizer} diverged; try a smaller --lr than {config.lr:g}")
        return 1
    print(
        f"{config.optimizer}: validation perplexity {perplexity(row['valid_loss']):.2f}, "
        f"test {perplexity(row['test_loss']):.2f}, {row['tokens_per_second']:,.0f} tokens/s"
    )
    timed = row.get("step_ms") and row["optimizer_ms"]
    llama = not is_config(config.model) and config.model not in OTHERS
    if torch.cuda.is_available() and timed and llama:
        print(speed_text(row, get_config(config.model)))
    return 0
