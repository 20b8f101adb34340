"""A training run that is killed again and again while it writes a checkpoint every step.

`python killed_run.py FOLDER SEED KILLS` trains a tiny model in FOLDER/killed, ends that process
with SIGKILL at random moments, goes on each time, and prints what came of it as JSON.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # imported by the first step: once here, not in every child
import torch.utils.tensorboard
from tiny_benchmarks import TINY, saved_step, tiny_corpus

from benchmarks.training.checkpoint import Checkpoints
from benchmarks.training.config import RunConfig
from benchmarks.training.loop import train
from optimzoo.models import llama

CONFIG = RunConfig("scale", 1e-2, model="tiny", steps=100, batch_size=2, seq_len=16)


def newest(out: Path) -> int:
    return max(Checkpoints(out / "checkpoints").steps(), default=0)


def main(folder: Path, seed: int, kills: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    llama.CONFIGS["tiny"] = TINY
    corpus, rng = tiny_corpus(folder), random.Random(seed)
    out, steps = folder / "killed", [0]
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            train(CONFIG, corpus, out=out, save_every=1)
            os._exit(0)
        before, ended = newest(out), (0, 0)
        while newest(out) == before and ended == (0, 0):
            time.sleep(0.001)
            ended = os.waitpid(child, os.WNOHANG)
        if ended != (0, 0):  # it failed, which the run below shows, or has come to its end
            break
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (out / "row.json").exists():
            break
        steps.append(saved_step(out))
    row = train(CONFIG, corpus, out=out, save_every=1)
    straight = train(CONFIG, corpus)
    keys = ("curve", "valid_loss", "test_loss")
    return {
        "steps": steps,
        "same": {key: row[key] == straight[key] for key in keys},
        "files": sorted(path.name for path in out.iterdir() if "tfevents" not in path.name),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
