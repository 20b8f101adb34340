"""Training runs that stop in the middle and go on in another process.

`python resume_run.py FOLDER THREADS` ends every run `NAME.half.pt` of the folder in `NAME.end.pt`.
"""

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer
from toy import TOY, toy

from optimzoo import create_optimizer
from optimzoo.models.llama import Llama, LlamaConfig

STEPS, HALF, WARMUP = 12, 6, 3
MORE: dict[str, dict[str, Any]] = {
    "fira": {"projector": "svd", "rotate": False},
    "stable_spam": {"gap": 4, "total_steps": STEPS},
    **{key: {"weight_decay_style": "cautious"} for key in ("rmnp", "natural_galore", "sinkgd")},
}
# Those with a subspace renew it in the first step after the save.
HYPER = {
    name: toy(name, **{"rank": 7, "gap": HALF, "weight_decay": 0.1, **MORE.get(name, {})})
    for name in TOY
    if name != "adams"  # whose groups of weights this model does not divide into
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Run(NamedTuple):
    model: nn.Module
    optimizer: Optimizer
    scheduler: LambdaLR

    def state_dict(self) -> dict[str, Any]:
        return {part: getattr(self, part).state_dict() for part in self._fields}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for part in self._fields:
            getattr(self, part).load_state_dict(saved[part])


def schedule(step: int) -> float:
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.55 + 0.45 * math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))


def start(name: str, dtype: str) -> Run:
    model = Llama(LlamaConfig(97, 24, 37, 2, 2), seed=3).to(DTYPES[dtype])
    optimizer = create_optimizer(name, model, **HYPER[name])
    return Run(model, optimizer, LambdaLR(optimizer, schedule))


def train(run: Run, first: int, last: int) -> None:
    for step in range(first, last):
        tokens = torch.randint(0, 97, (2, 13), generator=torch.Generator().manual_seed(step))
        run.optimizer.zero_grad()
        run.model(tokens[:, :-1], tokens[:, 1:]).backward()
        run.optimizer.step()
        run.scheduler.step()


def main(folder: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    for half in sorted(Path(folder).glob("*.half.pt")):
        case = half.name.removesuffix(".half.pt")
        run = start(*case.split("-"))
        run.load_state_dict(torch.load(half, weights_only=True))
        train(run, HALF, STEPS)
        torch.save(run.state_dict(), half.with_name(f"{case}.end.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
