"""The configuration of a training run."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.data.corpus import Corpus
from benchmarks.training.low_rank_model import check
from benchmarks.training.models import config_sha256
from benchmarks.training.own import is_own, source_sha256
from optimzoo.models import is_config
from optimzoo.roles import ROLES

PRECISIONS = ("auto", "fp32", "bf16-autocast", "bf16")


@dataclass(frozen=True)
class RunConfig:
    """All settings that determine a run's results, except the corpus.

    `lr` trains the weights of the method's own rule, `other_lr` the rest (see
    `optimzoo.create_optimizer`); `clip` bounds the gradient's global norm, 0 leaves it alone.
    Learning rates warm up linearly over `warmup` of the steps, then follow a cosine to
    `min_lr_ratio`. `precision="auto"` is fp32 on a CPU and bf16-autocast on a GPU. `lowrank` makes
    the hidden weights low-rank: arguments of `optimzoo.lowrank.convert`, `freeze` to train the
    factors alone, and `restarts` or `relora` with those of `Restarts` or `ReLoRA`; empty: the model
    is dense. `groups` has further options of the parameters of a role, as
    `{"embedding": {"momentum": 0.9}}`. `release` steps each weight in the backward, with
    `optimzoo.release`. `weights` is a file that the model's weights are read from, `weights.pt` of
    another run; without it they are drawn from the seed. `optimizer` is a name of the registry, or
    a class of one's own, `package.module:Class` or `FILE.py:Class`; `model` that of a Llama,
    `nanogpt-char`, `vit`, or the path of a Hugging Face config.
    """

    optimizer: str
    lr: float
    other_lr: float | None = None
    hyper: dict[str, Any] = field(default_factory=dict)
    model: str = "nano"
    steps: int = 240
    batch_size: int = 8
    seq_len: int = 256
    accumulate: int = 1
    warmup: float = 0.1
    min_lr_ratio: float = 0.1
    clip: float = 0.0
    precision: str = "auto"
    compile: bool = False
    seed: int = 0
    eval_tokens: int = 65536
    lowrank: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    release: bool = False
    weights: str = ""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "accumulate", "eval_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is {self.warmup}; it is a share of the steps, from 0 to 1")
        if self.eval_tokens < self.seq_len:
            raise ValueError(
                f"eval_tokens is {self.eval_tokens}, less than one window of seq_len {self.seq_len}"
            )
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio is {self.min_lr_ratio}; it must be from 0 to 1")
        if not self.clip >= 0:
            raise ValueError(f"clip is {self.clip}; it must be >= 0 (0: no clipping)")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if not isinstance(self.hyper, dict):
            raise ValueError(f"hyper is {self.hyper!r}; it must be an object, as {{'eps': 1e-6}}")
        check(self.lowrank)
        for role in self.groups:
            if role not in ROLES:
                raise ValueError(f"groups has the role {role!r}; there are {', '.join(ROLES)}")

    @property
    def tokens_per_step(self) -> int:
        """Return the number of tokens of one optimizer step."""
        return self.batch_size * self.accumulate * self.seq_len


def resolve_precision(config: RunConfig) -> str:
    """Return the precision of a run on this machine."""
    if config.precision != "auto":
        return config.precision
    return "bf16-autocast" if torch.cuda.is_available() else "fp32"


def fingerprint(config: RunConfig, corpus: Corpus) -> dict[str, Any]:
    """Return the settings that a checkpoint or a row must share with a run to be reused."""
    values = {**asdict(config), "precision": resolve_precision(config), "corpus": corpus.sha256}
    # What rows from before it was an option were made with, on a CPU.
    values["hyper"] = {k: v for k, v in config.hyper.items() if k != "ns_dtype" or v == "bfloat16"}
    if config.weights:
        values["weights"] = hashlib.sha256(Path(config.weights).read_bytes()).hexdigest()
    for later in ("lowrank", "groups", "release", "weights"):
        if not values[later]:
            del values[later]  # rows from before it was there stay valid
    if is_own(config.optimizer):
        values["source"] = source_sha256(config.optimizer)
    if is_config(config.model):
        values["model_config"] = config_sha256(config.model)
    return json.loads(json.dumps(values))


def lr_factor(step: int, config: RunConfig) -> float:
    """Return the factor of the peak learning rate at ``step``: linear warmup, then cosine decay."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))
