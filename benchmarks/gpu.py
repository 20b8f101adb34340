"""What needs a GPU, in one command of under nine minutes: build, test, sanitize, measure.

``make gpu`` writes, into ``--out``, ``gpu.json`` (how each stage ended, and the rows of the step
times) and ``gpu.log`` (all output). A stage that fails or runs out of its time does not stop the
next, and what the whole has no time left for is named, to be run with ``--only``. Without a GPU it
refuses, but for ``--dry-run``, which runs what a CPU can, at small sizes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import provenance, write_json

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
SHAPES = (("60m",), ("1b",), ("7b", "--layers", "1"))
TRITON = ("tests/kernels_triton_rules.py", "tests/kernels_triton_edges.py")


@dataclass(frozen=True)
class Stage:
    """One command, how long it may take, and the JSON file that it writes, if any."""

    name: str
    command: list[str]
    seconds: int
    rows: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


def step_time(out: Path, model: str, dtype: str, *more: str) -> Stage:
    """Step times of a model's shapes, in a file of their own."""
    rows = out / f"step-{model}-{dtype}.json"
    command = [PYTHON, "-m", "benchmarks", "step-time", "--model", model, "--dtype", dtype]
    return Stage(f"steps {model} {dtype}", [*command, "--out", str(rows), *more], 90, rows)


def shapes(out: Path, model: str, *more: str, native: bool = True) -> Stage:
    """SCALE in bfloat16 by CUDA kernels, or by Triton's, beside its loop, its graph and torch's."""
    kernels = "cuda" if native else "triton"
    rows = out / f"step-{model}-{kernels}.json"
    methods = ["sgd", "adamw", "scale"]
    methods += ["scale-loop", "scale-captured", "scale-compiled"] if native else []
    command = [PYTHON, "-m", "benchmarks", "step-time", "--model", model, "--dtype", "bfloat16"]
    command += ["--optimizers", *methods, "--repeats", "50", "--no-refresh", "--no-peers", *more]
    environment = {} if native else {"OPTIMZOO_NATIVE": "0"}
    name = f"steps {model} {kernels}"
    return Stage(name, [*command, "--out", str(rows)], 60, rows, environment)


def measured(out: Path, command: str, *more: str) -> Stage:
    """Another command of `python -m benchmarks` that writes its rows to a file."""
    rows = out / f"{command}.json"
    return Stage(
        command, [PYTHON, "-m", "benchmarks", command, "--out", str(rows), *more], 60, rows
    )


def memory(out: Path, *more: str) -> Stage:
    """Simulated peaks beside the allocator's, and a 7B step for real."""
    rows = out / "memory.json"
    command = [PYTHON, "-m", "benchmarks", "memory", "--checks", "simulate", "plan"]
    return Stage("memory", [*command, "--out", str(rows), *more], 150, rows)


def stages(out: Path, dry: bool) -> list[Stage]:
    """What is run, in order."""
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if dry:
        few = (
            "--optimizers",
            "sgd",
            "scale",
            "scale-loop",
            "--repeats",
            "3",
            "--no-refresh",
            "--no-peers",
        )
        return [
            Stage("build", [PYTHON, "csrc/build.py", "--require"], 300),
            Stage("kernels", [*pytest, "tests/test_kernels.py", "-k", "zeros or chosen"], 120),
            step_time(out, "nano", "float32", *few),
            measured(out, "sparse-time", "--model", "nano", "--repeats", "3"),
            memory(out, "--models", "nano", "--optimizers", "scale", "--plan-model", "9m"),
        ]
    contract = ["tests/test_torch_contract.py", "tests/test_torch_state.py"]
    rows = out / "release.json"
    released = [PYTHON, "-m", "benchmarks", "release-memory", "--model=1b", "--dtype=bfloat16"]
    plan = [
        Stage("build", [PYTHON, "csrc/build.py", "--require"], 150),
        Stage("kernels", [*pytest, "tests/test_kernels.py", "tests/test_kernels_cuda.py"], 90),
        Stage("triton", [*pytest, *TRITON], 90),
        Stage("contract", [*pytest, *contract, "-k", "CUDA or cuda"], 60),
        Stage("release", [*pytest, "tests/test_release.py", "tests/test_release_edges.py"], 90),
        Stage("released bytes", [*released, "--out", str(rows)], 60, rows),
        step_time(out, "60m", "float32"),
        *(shapes(out, m, *few) for m, *few in SHAPES),
        *(shapes(out, m, *few, native=False) for m, *few in SHAPES),
        Stage("compiled", [*pytest, "tests/test_compile.py"], 60),
        Stage("sparsity", [*pytest, "tests/test_sparsity.py", "-k", "semi_structured"], 60),
        measured(out, "sparse-time"),
        memory(out, "--models", "60m", "350m", "1b"),
    ]
    tool = shutil.which("compute-sanitizer")
    for check in ("memcheck", "racecheck") if tool else ():
        options = ["--tool", check, "--error-exitcode", "9"]
        plan.append(
            Stage(
                check,
                [str(tool), *options, PYTHON, "csrc/cuda/sanitize.py"],
                60,
                environment=UNCACHED,
            )
        )
    return plan


def run(stage: Stage, log: Path, left: float) -> dict[str, Any]:
    """Run one stage in at most ``left`` seconds; how it ended, and its rows."""
    print(f"{stage.name} ...", end=" ", flush=True)
    if left < 2:
        print("not run: no time left", flush=True)
        return {"stage": stage.name, "ended": "not run: no time left", "seconds": 0.0}
    start, limit = time.perf_counter(), min(stage.seconds, left)
    with log.open("ab") as file:
        file.write(f"\n=== {stage.name}: {' '.join(stage.command)}\n".encode())
        file.flush()
        try:
            done = subprocess.run(
                stage.command,
                cwd=ROOT,
                # Without the cache an access behind a tensor is one behind an allocation.
                env={**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=limit,
            )
            ended = "ok" if done.returncode == 0 else f"failed with status {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
    result: dict[str, Any] = {"stage": stage.name, "ended": ended}
    result["seconds"] = round(time.perf_counter() - start, 1)
    if stage.rows is not None and stage.rows.exists():
        result["rows"] = json.loads(stage.rows.read_text(encoding="utf-8"))
        stage.rows.unlink()  # it is in gpu.json now
    print(f"{ended} ({result['seconds']} s)", flush=True)
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks gpu`."""
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=8.8, help="of the whole, at most")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run these alone")
    parser.add_argument("--dry-run", action="store_true", help="what a CPU can run, small")


def main(args: argparse.Namespace) -> int:
    """Run all stages; 1 if one did not end well."""
    if not args.dry_run and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU here; --dry-run runs what a CPU can")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.unlink(missing_ok=True)
    plan = stages(out, args.dry_run)
    names = [stage.name for stage in plan]
    for name in args.only or []:
        if name not in names:
            raise ValueError(f"no stage {name!r}; there are: {', '.join(names)}")
    results = []
    end = time.perf_counter() + 60 * args.minutes
    for stage in plan:
        if args.only and stage.name not in args.only:
            continue
        results.append(run(stage, log, end - time.perf_counter()))
        write_json(out / "gpu.json", {"stages": results, "provenance": provenance()})
    failed = [r["stage"] for r in results if r["ended"] != "ok"]
    print(f"written to {out}" + (f"; look at gpu.log for {', '.join(failed)}" if failed else ""))
    return int(bool(failed))
