"""Training runs in several processes, forked from one that has imported torch: quick to restart.

`python parallel_runs.py SCENARIO FOLDER JSON` prints what `elastic` or `killed` returns.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # imported by the first step: once here, not in every child
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.utils.tensorboard
from tiny_benchmarks import TINY, saved_step, tiny_corpus
from toy import run_config

from benchmarks.data.corpus import Corpus
from benchmarks.training import checkpoint
from benchmarks.training.checkpoint import Checkpoints
from benchmarks.training.config import RunConfig
from benchmarks.training.distributed import ALONE, Parallel
from benchmarks.training.loop import train
from benchmarks.training.run import Run
from optimzoo.models import llama
from optimzoo.optimizers import galore

SIZES = {"model": "tiny", "batch_size": 4, "seq_len": 16, "eval_tokens": 256, "accumulate": 2}


def config(name: str, **changes: Any) -> RunConfig:
    return RunConfig(
        name, **{**SIZES, "steps": 8, "clip": 0.5, **run_config(name, gap=3), **changes}
    )


def prepare(folder: Path) -> Corpus:
    torch.set_num_threads(1)
    llama.CONFIGS["tiny"] = TINY
    return tiny_corpus(folder)


def stop_at(last: int) -> Callable[[int, float, float], None]:
    def progress(step: int, loss: float, speed: float) -> None:
        if step == last:
            raise KeyboardInterrupt

    return progress


def together(folder: Path, kind: str, size: int, work: Callable[[Parallel], Any]) -> list[int]:
    """Do ``work`` in ``size`` processes that know each other; how each of them ended."""
    meeting = folder / f"meet-{time.monotonic_ns()}"
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            _child(meeting, kind, rank, size, work)
        children.append(child)
    return _wait(children)


def _child(meeting: Path, kind: str, rank: int, size: int, work: Callable[..., Any]) -> None:
    status = 1
    try:
        parallel = ALONE
        if kind != "none":
            dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=size)
            parallel = Parallel(kind, rank, size)
        work(parallel)
        status = 0
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _wait(children: list[int]) -> list[int]:
    """As torchrun does it: when one has failed, the others are ended, since they wait for it."""
    ends: dict[int, int] = {}
    while len(ends) < len(children):
        child, status = os.waitpid(-1, 0)
        ends[child] = os.waitstatus_to_exitcode(status)
        if ends[child] not in (0, 130):
            for other in children:
                if other not in ends:
                    os.kill(other, signal.SIGKILL)
    return [ends[child] for child in children]


@contextmanager
def weights_kept(out: Path) -> Iterator[None]:
    """The leader of a run keeps the final weights as ``weights.pt``, beside the row."""
    evaluate = Run.evaluate

    def keeping(self: Run, split: str) -> float:
        state = self.parallel.gather(self.model.state_dict())
        if self.parallel.leads:
            torch.save(state, out / "weights.pt")
        return evaluate(self, split)

    Run.evaluate = keeping  # type: ignore[method-assign]
    try:
        yield
    finally:
        Run.evaluate = evaluate  # type: ignore[method-assign]


def trained(out: Path, parallel: Parallel, run: RunConfig, corpus: Corpus, **options: Any) -> None:
    """Train in one of the processes."""
    with weights_kept(out):
        train(run, corpus, out=out, parallel=parallel, **options)


def distance(out: Path, other: Path) -> float:
    """The largest difference of a weight or a loss, as a part of the largest entry."""
    a, b = (torch.load(folder / "weights.pt", weights_only=True) for folder in (out, other))
    assert a.keys() == b.keys()
    off = [float((a[k] - b[k]).abs().max() / b[k].abs().max()) for k in a]
    rows = [json.loads((folder / "row.json").read_text()) for folder in (out, other)]
    assert rows[0]["state_bytes"] == rows[1]["state_bytes"]
    off += [abs(rows[0][k] / rows[1][k] - 1) for k in ("valid_loss", "test_loss")]
    off += [abs(x[1] - y[1]) for x, y in zip(rows[0]["curve"], rows[1]["curve"], strict=True)]
    return max(off)


def same(a: Any, b: Any) -> bool:
    """Equal in structure, type and every bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


def reread(out: Path, parallel: Parallel, run_config: RunConfig, corpus: Corpus) -> None:
    """Fail where what these processes have loaded is not what the checkpoint has."""
    run = Run(run_config, corpus, out, parallel=parallel)
    assert run.resume()
    state = parallel.gather(run.state_dict())
    saved = Checkpoints(out / "checkpoints").load(run.step)[0]
    if parallel.leads:
        for part in saved:
            assert same(state[part], saved[part]), part


def elastic(folder: Path, name: str, chain: list[tuple[str, int]], **changes: Any) -> float:
    """A run that goes on in other processes again and again; its distance from one process."""
    corpus, run = prepare(folder), config(name, **changes)
    label = "-".join([name, *changes.values()])
    one, out = folder / f"{label}-one", folder / label
    trained(one, ALONE, run, corpus)
    for i, (kind, size) in enumerate(chain):
        last = 2 * i + 2
        options: dict[str, Any] = {} if i + 1 == len(chain) else {"progress": stop_at(last)}
        if i:
            ends = together(folder, kind, size, lambda p: reread(out, p, run, corpus))
            assert ends == [0] * size, (kind, size, ends)
        # The default binds this turn's options.
        ends = together(folder, kind, size, lambda p, o=options: trained(out, p, run, corpus, **o))
        assert ends == [130 if options else 0] * size, (kind, size, ends)
    return distance(out, one)


def arm(place: str, count: int) -> None:
    """End this process with SIGKILL when it has been in a place for the ``count``-th time.

    The place ``call`` is any call of any function, in Python or C, by the main thread.
    """
    if place == "call":
        return _arm_any_call(count)
    owner, name = {
        "step": (galore.GaLore, "direction"),
        "refresh": (galore, "refresh"),
        "write": (checkpoint._Sink, "write"),
        "sync": (os, "fsync"),
    }[place]
    original, left = getattr(owner, name), [count]

    def counted(*args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    setattr(owner, name, counted)


def _arm_any_call(count: int) -> None:
    left = count

    def counted(frame: Any, event: str, argument: Any) -> None:
        nonlocal left
        left -= event in ("call", "c_call")
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(counted)


def killed(folder: Path, kind: str, size: int, seed: int, kills: int) -> dict[str, Any]:
    """A GaLore run one of whose processes is killed again and again, beside one left alone."""
    corpus, rng = prepare(folder), random.Random(seed)
    run = config("galore", steps=6 * kills + 10)
    straight, out = folder / "straight", folder / "killed"
    ends = together(folder, kind, size, lambda p: trained(straight, p, run, corpus, save_every=2))
    assert ends == [0] * size
    found: dict[str, Any] = {"places": [], "steps": [0]}
    for _ in range(kills):
        place = rng.choice(["step", "refresh", "write", "sync"])
        victim = 0 if place in ("write", "sync") else rng.randrange(size)
        count = rng.randint(1, {"step": 120, "refresh": 60, "write": 300, "sync": 15}[place])

        def work(parallel: Parallel, at: tuple[str, int, int] = (place, victim, count)) -> None:
            if parallel.rank == at[1]:
                arm(at[0], at[2])
            trained(out, parallel, run, corpus, save_every=2)

        ends = together(folder, kind, size, work)
        assert ends[victim] == -signal.SIGKILL, (place, count, ends)
        found["places"].append(place)
        found["steps"].append(saved_step(out) if (out / "checkpoints" / "latest").exists() else 0)
    ends = together(folder, kind, size, lambda p: trained(out, p, run, corpus, save_every=2))
    assert ends == [0] * size
    found["distance"] = distance(out, straight)
    found["files"] = sorted(p.name for p in out.iterdir() if "tfevents" not in p.name)
    return found


if __name__ == "__main__":
    scenario = {"elastic": elastic, "killed": killed}[sys.argv[1]]
    print(json.dumps(scenario(Path(sys.argv[2]), *json.loads(sys.argv[3]))))
