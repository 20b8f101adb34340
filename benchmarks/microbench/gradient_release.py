"""Memory of optimizer-in-backward: the peak of live gradients and, on a GPU, of the step."""

import argparse
import gc
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn

import optimzoo
from benchmarks.common.files import write_json
from benchmarks.common.provenance import provenance
from benchmarks.training.metrics import peak_memory, reset_peak_memory
from optimzoo.models.llama import CONFIGS, Llama, get_config

MODES = ("kept", "released", "released and clipped")
STEPS = 3


class LiveGradients:
    """Tracker of the peak bytes of live accumulated gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.peak = 0
        self._seen: dict[int, tuple[Any, int]] = {}
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(self._look)

    def _look(self, param: torch.Tensor) -> None:
        if param.grad is not None:
            self._seen[id(param)] = weakref.ref(param.grad), param.grad.nbytes
        live = sum(size for grad, size in self._seen.values() if grad() is not None)
        self.peak = max(self.peak, live)


def measure(args: argparse.Namespace, mode: str) -> dict[str, Any]:
    """Train a few steps in one mode. Return bytes of parameters, gradients and the step's peak."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = get_config(args.model)
    model = Llama(config).to(device, getattr(torch, args.dtype))
    model.reset_parameters(0)
    live = LiveGradients(model)  # its hooks come before the release's
    optimizer = optimzoo.create_optimizer(args.optimizer, model, lr=1e-3)
    if mode != "kept":
        optimzoo.release(optimizer, max_norm=1.0 if "clipped" in mode else None)
    tokens = torch.randint(config.vocab_size, (args.batch_size, args.seq_len + 1), device=device)
    for _ in range(STEPS):
        reset_peak_memory()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        "mode": mode,
        "parameter_bytes": sum(p.nbytes for p in model.parameters()),
        "gradient_bytes": live.peak,
        # On a CPU the process holds what it once took: that peak is no mode's own.
        "peak_bytes": peak_memory() if torch.cuda.is_available() else None,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks release-memory`."""
    parser.add_argument("--model", default="60m", choices=CONFIGS)
    parser.add_argument("--optimizer", default="scale")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")


def main(args: argparse.Namespace) -> int:
    """Print each mode's bytes, and write the rows to `--out`."""
    rows = []
    for mode in MODES:
        try:
            rows.append(measure(args, mode))
        except ValueError as error:  # a method that cannot clip what it releases
            print(f"{mode:<22}{error}")
            continue
        finally:
            gc.collect()
        row = rows[-1]
        text = f"{mode:<22}{row['gradient_bytes'] / 1e6:8.1f} MB of gradients alive at once"
        text += f", {row['parameter_bytes'] / 1e6:.1f} MB of weights"
        if row["peak_bytes"] is not None:
            text += f", {row['peak_bytes'] / 1e6:.1f} MB at the step's peak"
        print(text, flush=True)
    if args.out:
        write_json(args.out, {"provenance": provenance(), "rows": rows})
    return 0
