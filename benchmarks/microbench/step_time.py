"""Step times of optimizers, timed in turn in one process, as ratios.

Machines drift, so absolute times mean little: every repeat times each method once, and the table
gives medians and their ratios to the first method.
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import optimzoo
from benchmarks.common.files import write_json
from benchmarks.common.progress import RunProgress
from benchmarks.common.provenance import provenance
from benchmarks.common.tables import Table
from benchmarks.common.timing import timed
from benchmarks.microbench.operations import operations
from benchmarks.microbench.refresh import REFRESH_SHAPES, REFRESHES, measure_refresh
from benchmarks.microbench.third_party import Make, peers
from optimzoo.models.llama import Llama, get_config
from optimzoo.roles import ROLES

DEFAULT = (
    *("sgd", "adamw", "scale", "scale_spectral", "adams", "muon", "rmnp", "galore"),
    *("natural_galore", "fira", "apollo", "apollo_mini", "swan", "sinkgd", "stable_spam"),
)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "scale_spectral": ("scale", {"normalize": "spectral"})
}
# Tensors of the weight's size that a step must read or write, by role: the floor of its time.
FLOOR = {
    "sgd": {"hidden": 3, "embedding": 3, "head": 3, "vector": 3},
    "adamw": {"hidden": 7, "embedding": 7, "head": 7, "vector": 7},
    "scale": {"hidden": 3, "embedding": 4, "head": 5, "vector": 7},
}
FUSED = ("sgd", "adamw", "adam")
# Suffixes of a method, as in `scale-loop`, and the options of that execution mode.
EXECUTION_MODES: dict[str, dict[str, Any]] = {
    "loop": {"fused": False, "foreach": False},
    "captured": {"capturable": True},
    "compiled": {},
}
LOW_RANK = ("galore", "natural_galore", "fira", "apollo")


def ours(name: str, rank: int, gap: int) -> Make:
    """Return a registry method at ``rank``, fused if it is torch's."""
    name, _, mode = name.partition("-")
    name, options = VARIANTS.get(name, (name, {}))
    options = {"fused": True} if name in FUSED else options | EXECUTION_MODES.get(mode, {})
    options |= optimzoo.get_info(name).required
    if name in LOW_RANK:
        options |= {"rank": rank, "update_proj_gap": gap}
    return lambda groups: optimzoo.create_optimizer(name, groups, lr=1e-4, **options)


class TimedOptimizer:
    """One method with its copy of the weights, and the gradients that all methods share."""

    def __init__(
        self,
        name: str,
        make: Make,
        model: nn.Module,
        grads: list[torch.Tensor],
        roles: list[str] | None,
    ) -> None:
        self.name = name
        sources = [g for g in optimzoo.param_groups(model) if not roles or g["role"] in roles]
        groups = [dict(g) for g in sources]
        gradient = dict(zip(model.parameters(), grads, strict=True))
        for group in groups:
            group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
        self.grads = {
            p: gradient[original]
            for group, source in zip(groups, sources, strict=True)
            for p, original in zip(group["params"], source["params"], strict=True)
        }
        method, _, mode = name.partition("-")
        tensors = FLOOR.get(method) if mode in ("", *EXECUTION_MODES) else None
        self.floor_bytes = tensors and sum(
            tensors[g["role"]] * p.numel() * p.element_size() for g in groups for p in g["params"]
        )
        self.optimizer = optimizer = make(groups)  # its state is what a captured step writes to
        self.give_grads()
        self.step: Callable[[], Any] = optimizer.step
        if mode == "captured":
            self.step = captured(optimizer)
        elif mode == "compiled":
            self.step = torch.compile(optimizer.step, fullgraph=True)
        self.first = self.timed()  # makes the state and, for projected methods, the first subspace
        self.give_grads()
        self.operations = None if mode in ("captured", "compiled") else operations(self.step)
        self.times: list[float] = []

    def timed(self) -> float:
        """Return the milliseconds of one step."""
        self.give_grads()
        return timed(self.step)

    def give_grads(self) -> None:
        """Set the gradients before each step: heavyball removes those that it has used."""
        for p, grad in self.grads.items():
            p.grad = grad


class BandwidthProbe:
    """Memory bandwidth: the better of a copy and an in-place sum on tensors of at most 256 MB.

    A copy counts two tensors, but a CPU also reads the target before it writes it; an in-place sum
    counts and moves three, as a step without state does.
    """

    def __init__(self, grads: list[torch.Tensor]) -> None:
        size = min(sum(g.numel() * g.element_size() for g in grads), 2**28)
        self.source = torch.ones(size // 4, device=grads[0].device)
        self.target = torch.zeros_like(self.source)
        self.rates: dict[str, list[float]] = {"copy": [], "add": []}

    def measure(self) -> None:
        """Time one copy and one in-place sum."""
        calls: dict[str, tuple[Callable[..., Any], int]] = {
            "copy": (self.target.copy_, 2),
            "add": (self.target.add_, 3),
        }
        for name, (call, tensors) in calls.items():
            ms = timed(partial(call, self.source))
            self.rates[name].append(tensors * 4 * self.source.numel() / ms / 1e6)

    def best(self) -> float:
        """Return the higher median in gigabytes per second."""
        return max(statistics.median(rates) for rates in self.rates.values())


def captured(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """Capture the step as a CUDA graph after one that creates the state. Return its replay."""
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


def measure_steps(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return rows of milliseconds: the median step, the first step, and both amortised."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = get_config(args.model)
    if args.layers is not None:
        config = replace(config, num_hidden_layers=args.layers)
    model = Llama(config).to(device, getattr(torch, args.dtype))
    generator = torch.Generator().manual_seed(0)
    grads = [(torch.randn(p.shape, generator=generator) * 1e-3).to(p) for p in model.parameters()]
    makers = {name: ours(name, args.rank, args.gap) for name in args.optimizers}
    makers |= {} if args.no_peers else peers(args.rank, args.gap)
    with RunProgress(len(makers) + args.repeats) as bar:
        candidates = []
        for name, make in makers.items():
            bar.start(f"first step of {name}", 1)
            candidates.append(TimedOptimizer(name, make, model, grads, args.roles))
        gc.collect()
        bandwidth = BandwidthProbe(grads)
        for turn in range(args.repeats):
            bar.start(f"steps in turn, {turn + 1} of {args.repeats}", 1)
            bandwidth.measure()
            for candidate in candidates:
                # One slow method must not keep the others waiting: its median is of fewer steps.
                if sum(candidate.times) < 1000 * args.seconds:
                    candidate.times.append(candidate.timed())
    rows = []
    for candidate in candidates:
        plain = statistics.median(candidate.times)
        floor = candidate.floor_bytes
        rate = floor / plain / 1e6 if floor else None
        rows.append(
            {
                "method": candidate.name,
                "step_ms": plain,
                "steps": len(candidate.times),
                "operations": candidate.operations,
                "floor_gb_per_s": rate,
                "share_of_stream": rate and rate / bandwidth.best(),
                "first_ms": candidate.first,
                # a refresh every `gap` steps, counted at the cost of the first step
                "amortised_ms": (candidate.first + (args.gap - 1) * plain) / args.gap,
            }
        )
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks step-time`."""
    parser.add_argument("--model", default="60m")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--optimizers", nargs="+", default=list(DEFAULT), metavar="NAME")
    parser.add_argument("--roles", nargs="+", choices=ROLES, help="of the weights to step")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--gap", type=int, default=200, help="steps between two refreshes")
    parser.add_argument(
        "--repeats", type=int, default=15, help=f"of steps; of refreshes {REFRESHES} at most"
    )
    parser.add_argument(
        "--seconds", type=float, default=60, metavar="S", help="of steps of one method, at most"
    )
    parser.add_argument("--no-refresh", action="store_true", help="leave out projector refreshes")
    parser.add_argument("--no-peers", action="store_true", help="leave out installed peers")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")


def main(args: argparse.Namespace) -> int:
    """Print step times and refresh times, and write the rows to `--out`."""
    layers = get_config(args.model).num_hidden_layers
    if args.layers is not None and args.layers < 1:
        raise ValueError(
            f"--layers {args.layers}: it must be at least 1; {args.model} has {layers}"
        )
    if "repeats" in args.given and args.repeats > REFRESHES and not args.no_refresh:
        print(
            f"note: --repeats {args.repeats} is of the steps; refreshes are timed {REFRESHES} times"
        )
    for name in args.optimizers:
        name = name.partition("-")[0]
        optimzoo.get_info(VARIANTS.get(name, (name,))[0])
    steps = measure_steps(args)
    console = Console(highlight=False)
    base = steps[0]
    cells = [
        [
            row["method"],
            f"{row['step_ms']:.1f}",
            f"{row['step_ms'] / base['step_ms']:.2f}",
            str(row["operations"] or ""),
            f"{100 * row['share_of_stream']:.0f} %" if row["share_of_stream"] else "",
            f"{row['first_ms']:.0f}",
            f"{row['amortised_ms']:.1f}",
            f"{row['amortised_ms'] / base['step_ms']:.2f}",
        ]
        for row in steps
    ]
    headers = (
        *("method", "step ms", "ratio", "operations", "of stream"),
        *("first ms", "amortised ms", "ratio"),
    )
    Table(headers, cells, title=f"{args.model}, {args.dtype}, rank {args.rank}", gap=2).print()
    refreshes = [
        measure_refresh(*shape, args.rank, min(args.repeats, REFRESHES))
        for shape in REFRESH_SHAPES
        if not args.no_refresh
    ]
    for row in refreshes:
        ms = row["ms"]
        m, n = row["shape"]
        console.print(
            f"refresh {m} x {n}, rank {args.rank}: svd {ms['svd']:.0f} ms; "
            + "; ".join(
                f"{k} {ms[k]:.1f} ms ({ms['svd'] / ms[k]:.1f}x faster, "
                f"{100 * row['captured'][k]:.2f} % of the best energy)"
                for k in ("cold", "warm")
            )
        )
    if args.out:
        plain = {k: v for k, v in vars(args).items() if k not in ("given", "out")}
        write_json(
            args.out,
            {"rows": steps, "refresh": refreshes, "provenance": provenance(), "args": plain},
        )
    return 0
