"""Options of ``optimzoo memory``, and checks that refuse those that cannot go together."""

import argparse
import ast
import difflib
import importlib
import os
import re
from pathlib import Path
from typing import Any

from optimzoo.options import refuse
from optimzoo.registry import get_info, hyperparameters

# None until an option is given, so that one without effect is refused and not ignored.
DEFAULTS: dict[str, Any] = {
    "optimizer": ["all"],
    "hyper": [],
    "dtype": "bfloat16",
    "shards": [1],
    "batch": 1,
    "seq": 256,
    "device": "cpu",
}
MODEL = "a name (see `optimzoo models`), or the path of a Hugging Face config.json"
_FILES = ("json", "picture", "snapshot")
_OF_A_STEP = ("batch", "seq", "checkpointing", "release", "device", "fits")
_OF_A_SIMULATION = ("convert", "optimizer", "hyper", "dtype", "shards", *_OF_A_STEP, "account")
_SIZES = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_SIZES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class _Once(argparse.Action):
    """Action that stores a value and refuses a second one."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest)
        if before is not None:
            parser.error(f"{option_string} is given twice, as {before} and {values}; give it once")
        setattr(namespace, self.dest, values)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``optimzoo memory``."""
    sources = parser.add_mutually_exclusive_group(required=True)

    def source(name: str, text: str, **more: Any) -> None:
        sources.add_argument(name, action=_Once, help=text, **more)

    def option(name: str, text: str, **more: Any) -> None:
        parser.add_argument(name, help=text, **{"action": _Once, **more})

    source("--model", MODEL)
    source("--module", "returns an nn.Module, or one and its step", metavar="FILE.py:FUNCTION")
    source("--script", "measure it; all after it are its arguments", nargs=argparse.REMAINDER)
    text = "low_rank=128, sltrain=128, lora=16 or cast=2:4, as optimzoo.lowrank and .sparsity do"
    option("--convert", text, metavar="KIND=VALUE")
    option("--optimizer", "names, or all (default)", nargs="+", action="extend")
    option("--hyper", "rank=256", nargs="+", action="extend", metavar="NAME=VALUE")
    option("--dtype", "default bfloat16", choices=["bfloat16", "float16", "float32"])
    text = "GPUs that share all under FSDP2; figures are one's; with --fits several, as 1 2 8"
    option("--shards", text, type=int, nargs="+", metavar="N")
    option("--batch", "sequences a micro-batch, on one GPU; default 1", type=int)
    option("--seq", "tokens a sequence; default 256", type=int)
    option("--checkpointing", "recompute activations", action="store_true")
    option("--release", "step in the backward pass", action="store_true")
    option("--device", "to simulate; default cpu", choices=["cpu", "cuda"])
    option("--account", "exact bytes only, no peaks", action="store_true")
    option("--fits", "methods, settings and micro-batches that fit in it", metavar="24GB")
    option("--json", "a file for the figures", type=Path)
    option("--picture", "a file for stacked bars", type=Path)
    option("--snapshot", "a file of a script on CUDA, for memory_viz", type=Path)


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Return the options with their defaults, after checking that each given one has an effect.

    Raises:
        ValueError: an option out of its range, or one that another leaves without effect.
        ImportError: a picture, and matplotlib is not installed.
    """
    given_options = [
        name for name, value in vars(args).items() if value is not None and value is not False
    ]
    if args.script is not None:
        reason = "a script is measured as it runs; leave {option} out, or plan with --model"
        refuse(
            args, _OF_A_SIMULATION, given_options, reason, but=args.device == "cuda" and "device"
        )
    elif "snapshot" in given_options:
        raise ValueError(
            f"--snapshot is of a script on CUDA; add --script FILE.py behind {args.snapshot}"
        )
    if args.account:
        reason = "it changes the peak of a step, which --account leaves out; leave out one of them"
        refuse(args, _OF_A_STEP, given_options, reason)
    for name in ("batch", "seq"):
        if name in given_options and getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    for shards in args.shards or []:
        if shards < 1:
            raise ValueError(f"--shards is {shards}; it must be at least 1")
    if len(args.shards or []) > 1 and "fits" not in given_options:
        several = " ".join(map(str, args.shards))
        raise ValueError(f"--shards {several}: several are compared by --fits; give one, or --fits")
    if "fits" in given_options:
        parse_size(args.fits)
    _check_files({name: getattr(args, name) for name in _FILES if name in given_options})
    values = {name: DEFAULTS[name] for name in DEFAULTS if name not in given_options}
    return argparse.Namespace(**{**vars(args), **values})


def refuse_for_own_step(args: argparse.Namespace, where: str) -> None:
    """Refuse options that the module's own step decides.

    Raises:
        ValueError: one of them was given.
    """
    given_options = [name for name in ("batch", "seq") if getattr(args, name) is not None]
    reason = f"{where} returns a step of its own, which decides that; leave {{option}} out"
    refuse(args, ("batch", "seq"), given_options, reason)


def _check_files(files: dict[str, Path]) -> None:
    """Refuse files that could not be written, before minutes of work and not after them."""
    options: dict[Path, str] = {}
    for option, path in files.items():
        if path.is_dir():
            raise ValueError(f"--{option} {path}: it is a folder; name a file in it")
        writable = path if path.exists() and not path.is_file() else path.absolute().parent
        if not os.access(writable, os.W_OK):
            raise ValueError(f"--{option} {path}: its folder is not there, or not to be written in")
        other = options.setdefault(path.resolve(), option)
        if other != option:
            raise ValueError(f"--{option} {path}: --{other} writes that file; name another")
    if "picture" in files:
        _check_picture(files["picture"])


def _check_picture(path: Path) -> None:
    try:
        backend = importlib.import_module("matplotlib.backend_bases")
    except ImportError:
        raise ImportError("--picture needs matplotlib: pip install matplotlib") from None
    endings = sorted(backend.FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in endings:
        raise ValueError(f"--picture {path}: its name must end in one of .{', .'.join(endings)}")


def parse_size(text: str) -> int:
    """Return the bytes of `24GB` (1e9), `24 gib` (2^30), `1.5T`.

    Raises:
        ValueError: it is no size, or has no unit.
    """
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*([kmgt]?i?b?)", text.strip(), re.IGNORECASE)
    unit = match[2].upper() if match else ""
    if match and not unit:
        raise ValueError(f"--fits {text}: a size needs its unit; write {match[1]}GB")
    unit = unit if unit.endswith("B") else f"{unit}B"
    if not match or unit not in _SIZES:
        raise ValueError(f"--fits: {text!r} is not a size; write 24GB or 24GiB")
    if not int(float(match[1]) * _SIZES[unit]):
        raise ValueError(f"--fits {text}: nothing fits in no bytes; write 24GB or 24GiB")
    return int(float(match[1]) * _SIZES[unit])


def parse_hyper(pairs: list[str], names: list[str]) -> dict[str, dict[str, Any]]:
    """Return for each ``NAME=VALUE`` the methods that take it, and what they are given.

    Raises:
        ValueError: it is no pair, is given twice, or none of the methods takes it.
    """
    result: dict[str, dict[str, Any]] = {}
    values: dict[str, str] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key or not text:
            raise ValueError(f"--hyper takes NAME=VALUE, not {pair!r}")
        if key in values:
            raise ValueError(f"--hyper {pair}: {key} is {values[key]} already; give it once")
        values[key] = text
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        takers = [name for name in names if key in hyperparameters(get_info(name))]
        if not takers:
            raise ValueError(_no_taker(pair, key, names))
        result[pair] = {name: {key: value} for name in takers}
    return result


def _no_taker(pair: str, key: str, names: list[str]) -> str:
    if len(names) == 1:
        accepted = ", ".join(hyperparameters(get_info(names[0])))
        return f"--hyper {pair}: {names[0]} has no hyperparameter {key!r}; it takes {accepted}"
    every = sorted({k for name in names for k in hyperparameters(get_info(name))})
    near = difflib.get_close_matches(key, every, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"they take {', '.join(every)}"
    return f"--hyper {pair}: none of the {len(names)} methods has a hyperparameter {key!r}; {hint}"
