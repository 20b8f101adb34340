"""GPU suite in one command of under nine minutes: build, test, sanitize, measure.

``make gpu`` writes ``gpu.json`` (status of each stage, and the rows of the step times) and
``gpu.log`` (all output) to ``--out``. After the build, tests and sanitizers run concurrently, then
the measurements one at a time. A stage that fails or times out does not stop the next; stages for
which no time is left are named, to be run with ``--only``. Without a GPU only ``--dry-run`` works,
which runs what a CPU can, at small sizes.
"""

import argparse
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.files import ROOT, read_json, write_json
from benchmarks.common.provenance import provenance
from benchmarks.microbench.step_time import DEFAULT

PYTHON = sys.executable
# Without the cache an access behind a tensor is one behind an allocation.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
SHAPES = (("60m",), ("1b",), ("7b", "--layers", "1"))
KERNELS = (
    "tests/kernels/test_kernels.py",
    "tests/kernels/test_kernels_cuda.py",
    "tests/kernels/test_scale_launch_cache.py",
    "tests/subspace/test_subspace.py",
)
TRITON = ("tests/kernels/kernels_triton_rules.py", "tests/kernels/kernels_triton_edges.py")


@dataclass(frozen=True)
class Stage:
    """One command, its time limit in seconds, and the JSON file that it writes, if any."""

    name: str
    command: list[str]
    seconds: int
    rows: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    beside: bool = False  # may run concurrently with others


def measured(
    out: Path,
    command: str,
    *more: str,
    name: str | None = None,
    seconds: int = 60,
    environment: dict[str, str] | None = None,
) -> Stage:
    """Return the stage of a command of `python -m benchmarks` that writes rows."""
    name = name or command
    rows = out / f"{name.replace(' ', '-')}.json"
    words = [PYTHON, "-m", "benchmarks", command, "--out", str(rows), *more]
    return Stage(name, words, seconds, rows, environment or {})


def step_time(out: Path, model: str, dtype: str, *more: str) -> Stage:
    """Return the stage that times steps on a model's shapes."""
    words = ["--model", model, "--dtype", dtype, *more]
    return measured(out, "step-time", *words, name=f"steps {model} {dtype}", seconds=90)


def methods(dtype: str) -> list[str]:
    """Return the methods that are timed; AdamS takes no bfloat16 weights rounded to nearest."""
    return [name for name in DEFAULT if (name, dtype) != ("adams", "bfloat16")]


def captured(out: Path, dtype: str) -> Stage:
    """Return the stage that times every method's step as a replayed CUDA graph."""
    names = [f"{name}-captured" for name in methods(dtype) if name not in ("sgd", "adamw")]
    words = ["--model", "60m", "--dtype", dtype, "--no-refresh", "--no-peers"]
    words += ["--optimizers", "adamw", *names, "--repeats", "50"]
    return measured(out, "step-time", *words, name=f"steps 60m {dtype} captured")


def shapes(out: Path, model: str, *more: str, native: bool = True) -> Stage:
    """Return the stage that times SCALE in bfloat16 with CUDA or Triton kernels, and others."""
    kernels, environment = ("cuda", {}) if native else ("triton", {"OPTIMZOO_NATIVE": "0"})
    names = ["sgd", "adamw", "scale", "scale-captured"]
    names += ["scale-loop", "scale-compiled"] if native else []
    words = ["--model", model, "--dtype", "bfloat16", "--optimizers", *names, "--repeats", "50"]
    words += ["--no-refresh", "--no-peers", *more]
    name = f"steps {model} {kernels}"
    return measured(out, "step-time", *words, name=name, environment=environment)


def memory(out: Path, *more: str) -> Stage:
    """Return the stage that compares simulated peaks with the allocator's, and steps a 7B model."""
    return measured(out, "memory", "--checks", "simulate", "plan", *more, seconds=150)


def tests(name: str, *words: str) -> Stage:
    """Return a stage of tests, in three processes if xdist is installed."""
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        pytest += ["-n", "3"]
    one_thread = {"OMP_NUM_THREADS": "1"}
    return Stage(name, [*pytest, *words], 150, environment=one_thread, beside=True)


def sanitizers() -> list[Stage]:
    """Return the stages of all CUDA kernels under compute-sanitizer, if it is installed."""
    tool = shutil.which("compute-sanitizer")
    options = ["--error-exitcode", "9", PYTHON, "tools/sanitize.py"]
    return [
        Stage(check, [tool, "--tool", check, *options], 150, environment=UNCACHED, beside=True)
        for check in ("memcheck", "racecheck")
        if tool
    ]


def stages(out: Path, dry: bool) -> list[Stage]:
    """Return all stages in order, or the small ones of a dry run."""
    if dry:
        few = ["--optimizers", "sgd", "scale", "scale-loop", "--repeats", "3"]
        few += ["--no-refresh", "--no-peers"]
        return [
            Stage("build", [PYTHON, "csrc/build.py", "--require"], 300),
            tests("kernels", "tests/kernels/test_kernels.py", "-k", "zeros or chosen"),
            step_time(out, "nano", "float32", *few),
            measured(out, "sparse-time", "--model", "nano", "--repeats", "3"),
            measured(out, "utilisation", "--sizes", "dry", "--steps", "3"),
            memory(out, "--models", "nano", "--optimizers", "scale", "--plan-model", "9m"),
        ]
    contract = ("tests/contract/test_torch_contract.py", "tests/contract/test_torch_state.py")
    released = ["release-memory", "--model=350m", "--dtype=bfloat16"]
    return [
        Stage("build", [PYTHON, "csrc/build.py", "--require"], 150),
        tests("kernels", *KERNELS),
        tests("triton", *TRITON),
        tests("triton steps", "tests/kernels/kernels_triton_steps.py"),
        tests("contract", *contract, "-m", "not distributed", "-k", "CUDA or cuda"),
        tests("release", "tests/gradient_release", "tests/gradient_stabilizer"),
        tests("compiled", "tests/contract/test_compile.py"),
        tests("stacks", "tests/contract/test_stacks.py", "tests/optimizers/test_multi_tensor.py"),
        tests("sparsity", "tests/sparsity/test_sparsity.py", "-k", "semi_structured"),
        *sanitizers(),
        *(shapes(out, m, *few) for m, *few in SHAPES),
        *(shapes(out, m, *few, native=False) for m, *few in SHAPES),
        step_time(out, "60m", "float32"),
        step_time(out, "60m", "bfloat16", "--no-refresh", "--optimizers", *methods("bfloat16")),
        captured(out, "float32"),
        captured(out, "bfloat16"),
        measured(out, "utilisation", "--steps", "30", seconds=150),
        measured(out, "sparse-time"),
        measured(out, *released, name="released bytes"),
        memory(out, "--models", "60m", "1b"),
    ]


def run(stage: Stage, log: Path, end: float) -> dict[str, Any]:
    """Run one stage until ``end`` at the latest. Return its status, seconds and rows."""
    start = time.perf_counter()
    limit = min(stage.seconds, end - start)
    if end - start < 2:
        print(f"{stage.name}: not run: no time left", flush=True)
        return {"stage": stage.name, "ended": "not run: no time left", "seconds": 0.0}
    try:
        done = subprocess.run(
            stage.command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit,
        )
        output = done.stdout
        ended = "ok" if done.returncode == 0 else f"failed with status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output, ended = error.stdout or b"", f"stopped after {limit:.0f} s"
    with log.open("ab") as file:  # in one write: others may run beside it
        file.write(f"\n=== {stage.name}: {' '.join(stage.command)}\n".encode() + output)
    result: dict[str, Any] = {"stage": stage.name, "ended": ended}
    result["seconds"] = round(time.perf_counter() - start, 1)
    if stage.rows is not None and stage.rows.exists():
        result["rows"] = read_json(stage.rows)
        stage.rows.unlink()  # it is in gpu.json now
    print(f"{stage.name}: {ended} ({result['seconds']} s)", flush=True)
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks gpu`."""
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=8.8, help="of the whole, at most")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run these alone")
    parser.add_argument("--dry-run", action="store_true", help="what a CPU can run, small")


def main(args: argparse.Namespace) -> int:
    """Run all stages. Return 1 if one failed or was not run."""
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
    chosen = [stage for stage in plan if not args.only or stage.name in args.only]
    results: list[dict[str, Any]] = []
    end = time.perf_counter() + 60 * args.minutes

    def keep(result: dict[str, Any]) -> None:
        results.append(result)
        write_json(out / "gpu.json", {"stages": results, "provenance": provenance()})

    for together, group in itertools.groupby(chosen, lambda stage: stage.beside):
        some = list(group)
        with ThreadPoolExecutor(len(some) if together else 1) as pool:
            for result in pool.map(lambda stage: run(stage, log, end), some):
                keep(result)
    failed = [r["stage"] for r in results if r["ended"] != "ok"]
    print(f"written to {out}" + (f"; look at gpu.log for {', '.join(failed)}" if failed else ""))
    return int(bool(failed))
