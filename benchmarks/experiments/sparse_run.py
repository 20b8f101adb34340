"""Runs that train a dense model further to N:M sparsity: CAST and other methods."""

import copy
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.data.corpus import Corpus
from benchmarks.training.config import RunConfig
from benchmarks.training.run import Run
from optimzoo import AdamS, param_groups
from optimzoo.sparsity import (
    SparsityReport,
    distillation_loss,
    finalize,
    is_nm,
    linear_targets,
    nm_mask,
    prepare,
    report,
    sparse_groups,
    unpack,
)

N, M = 2, 4


@dataclass(frozen=True)
class Method:
    """Method by which a dense model becomes sparse.

    Attributes:
        label: in tables.
        lr: learning rate of the hidden weights.
        other_lr: learning rate of the other weights.
        decay: of AdamS (`l1`, `l2`), or None for AdamW.
        l1: strength of the decay.
        prune: fix the dense weights' mask from the first step on.
        masked_forward: prune the weights in the forward, with a straight-through gradient (SR-STE).
        scale_blocks: blocks of CAST's weight scaling.
        distill: train with the dense model as teacher.
        trained: False for no further steps.
    """

    label: str
    lr: float = 1e-3
    other_lr: float = 4e-3
    decay: str | None = None
    l1: float = 0.0
    prune: bool = False
    masked_forward: bool = False
    scale_blocks: int = 0
    distill: bool = True
    trained: bool = True


class MaskedForward(nn.Module):
    """Parametrization that masks a weight in the forward, with a straight-through gradient."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.mask = nn.Buffer(nm_mask(weight, N, M), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the pruned weight, with the identity's gradient (straight-through)."""
        return weight + (weight * self.mask - weight).detach()


def sparse_config(config: RunConfig, method: Method, eta: float) -> RunConfig:
    """Return a configuration with the method and the teacher's share as ``hyper``.

    They are part of the run's fingerprint.
    """
    return replace(config, hyper={**asdict(method), "eta": eta})


class SparseRun(Run):
    """Training run from dense weights to a sparse model.

    Args:
        config: from `sparse_config`; its ``weights`` are the dense ones.
        corpus: the text.
        out: the folder of its results and checkpoints.
        options: of `Run`.
    """

    def __init__(self, config: RunConfig, corpus: Corpus, out: Path | None, **options: Any) -> None:
        super().__init__(replace(config, optimizer="adamw", hyper={}), corpus, out, **options)
        self.config = config
        facts = dict(config.hyper)
        eta = facts.pop("eta")
        self.method = method = Method(**facts)
        self.eta = eta if method.distill else 0.0
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        layers: dict[str, Any] = dict(linear_targets(self.model))
        self.fixed = {m: nm_mask(m.weight, N, M) for m in layers.values() if method.prune}
        self._apply_fixed()
        if method.scale_blocks:
            prepare(self.model, N, M, scale_blocks=method.scale_blocks)
        for module in layers.values() if method.masked_forward else ():
            parametrize.register_parametrization(module, "weight", MaskedForward(module.weight))
        self._make_optimizer()
        self.last: SparsityReport | None = None
        self.masked_curve: list[tuple[int, float, float, float]] = []
        if not method.trained:
            self.step = config.steps

    def _make_optimizer(self) -> None:
        config, method = self.config, self.method
        groups = sparse_groups(self.model) if method.decay else param_groups(self.model)
        for group in groups:
            if group["role"] != "hidden" and config.other_lr is not None:
                group["lr"] = config.other_lr
        if method.decay:
            self.optimizer: Any = AdamS(
                groups,
                lr=config.lr,
                l1=method.l1,
                total_steps=config.steps,
                n=N,
                m=M,
                decay=method.decay,
            )
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=0.0)
        schedule = self.scheduler.lr_lambdas[0]
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)

    def _loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        if not self.eta or not torch.is_grad_enabled():  # no teacher, or an evaluation
            return super()._loss(inputs, labels)
        x, y = self._moved(inputs), self._moved(labels)
        with torch.no_grad():
            target = self.teacher(x)
        return distillation_loss(self.forward(x), target, y, self.eta)

    def train_step(self, log: bool, *, read: bool = True) -> tuple[float, dict[str, float]]:
        """Take one optimizer step; return the loss and, with ``log``, scalars with mask shares."""
        loss, scalars = super().train_step(log, read=read)
        self._apply_fixed()
        self._refresh_forward()
        if self.method.decay and (self.step % 10 == 1 or self.step == self.config.steps):
            self.last = report(self.model, self.optimizer, self.last)
            total = self.last.total()
            point = (self.step, total["masked_mean"], total["masked_max"], total["flips"])
            self.masked_curve.append(point)
            scalars |= {f"sparsity/{k}": v for k, v in total.items()}
        return loss, scalars

    @torch.no_grad()
    def _apply_fixed(self) -> None:
        for module, mask in self.fixed.items():
            module.weight.masked_fill_(~mask, 0)

    def _refresh_forward(self) -> None:
        for module in self.model.modules():
            if self.method.masked_forward and parametrize.is_parametrized(module, "weight"):
                parts: Any = module.parametrizations
                weight = parts.weight.original
                parts.weight[0].mask = unpack(self.optimizer.state[weight]["mask"], weight.shape)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the run resumes from."""
        return {**super().state_dict(), "masked": json.dumps(self.masked_curve)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state and restore the masks."""
        super().load_state_dict(state)
        self.masked_curve = [tuple(x) for x in json.loads(state["masked"])]
        if self.method.decay and self.step:
            self._refresh_forward()
            self.last = report(self.model, self.optimizer)

    def results(self, test: bool) -> dict[str, Any]:
        """Prune for good, and return losses and shares of zeros."""
        facts: dict[str, Any] = {"label": self.method.label, "masked_curve": self.masked_curve}
        facts["tokens"] = self.method.trained * self.step * self.config.tokens_per_step
        facts["valid_before"] = self.evaluate("valid")
        if self.method.decay and self.last is not None:
            facts |= {k: v for k, v in self.last.total().items() if k.startswith("masked")}
            finalize(self.model, self.optimizer)
        for module in list(self.model.modules()):
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
        layers: list[Any] = list(linear_targets(self.model).values())
        sparse = self.method.decay or self.method.prune
        if sparse and not all(is_nm(m.weight, N, M) for m in layers):
            raise RuntimeError(f"{self.method.label}: a weight is not {N}:{M}")
        zeros = sum(int((m.weight == 0).sum()) for m in layers)
        facts["zeros"] = zeros / sum(m.weight.numel() for m in layers)
        return facts | super().results(test)
