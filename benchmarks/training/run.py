"""One training run: its configuration, its step, its evaluation, its state."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import optimzoo
from benchmarks.data.batches import Batches, iterate_eval
from benchmarks.data.corpus import Corpus
from benchmarks.training.checkpoint import FORMAT, Checkpoints
from benchmarks.training.config import RunConfig, fingerprint, lr_factor, resolve_precision
from benchmarks.training.distributed import ALONE, Parallel, whole
from benchmarks.training.low_rank_model import convert_model, make_restarts, on_meta
from benchmarks.training.metrics import UpdateRatios
from optimzoo.lowrank import support_bytes
from optimzoo.models.llama import Llama, get_config
from optimzoo.roles import ROLES, role_of


def make_optimizer(config: RunConfig, model: Llama) -> Optimizer:
    """The run's optimizer on a model's weights."""
    groups = optimzoo.param_groups(model)
    for group in groups:
        group.update(config.groups.get(group["role"], {}))
    rates = {f"{role}_lr": config.other_lr for role in ROLES if role != "hidden"}
    if config.other_lr is None:
        rates = {}  # the method's own
    hyper = {"lr": config.lr, **rates, **config.hyper}
    try:
        return optimzoo.create_optimizer(config.optimizer, groups, **hyper)
    except TypeError as error:
        raise ValueError(f"hyper {config.hyper} does not fit: {error}") from error


def refuse_early(config: RunConfig) -> None:
    """Raise what a run would raise of its model and optimizer, before minutes of reading text."""
    make_optimizer(config, on_meta(config.model, config.lowrank))


class Run:
    """One training run: model, optimizer, schedule, data, and how far it is.

    With ``out`` it has ``checkpoints`` there; ``parallel`` says with whom it is run.
    """

    def __init__(
        self,
        config: RunConfig,
        corpus: Corpus,
        out: Path | None = None,
        *,
        parallel: Parallel = ALONE,
        keep: int = 3,
    ) -> None:
        self.config, self.corpus, self.out, self.parallel = config, corpus, out, parallel
        self.checkpoints = None if out is None else Checkpoints(out / "checkpoints", keep)
        if config.lowrank and parallel.kind == "fsdp":
            raise ValueError("lowrank weights cannot be sharded; take --parallel ddp")
        if config.release and parallel.kind != "none":
            raise ValueError(f"release is for one process; leave out --parallel {parallel.kind}")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = resolve_precision(config)
        shape = replace(get_config(config.model), vocab_size=corpus.vocab_size)
        self.model = Llama(shape)
        self.model.reset_parameters(config.seed)
        convert_model(self.model, config.lowrank, config.seed)
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.model.to(self.device, dtype)
        self.replica = parallel.wrap(self.model)
        self.forward: Callable[..., Tensor] = self.replica
        # A CUDA graph of forward and backward: a small model's kernels are shorter than their
        # launches. It cannot be where gradients add up, or are waited for, in the backward.
        whole_batch = config.accumulate == 1 and not config.release and parallel.kind == "none"
        self.graphed = config.compile and whole_batch and self.device.type == "cuda"
        if config.compile:
            mode = "reduce-overhead" if self.graphed else None
            self.forward = torch.compile(self.forward, mode=mode)
        self.optimizer = make_optimizer(config, self.model)
        self.released = None
        if config.release:
            self.released = optimzoo.release(self.optimizer, max_norm=config.clip or None)
        self.restarts = make_restarts(self.model, self.optimizer, config.lowrank)
        if self.restarts is None:
            self.scheduler = LambdaLR(self.optimizer, lambda step: lr_factor(step, config))
        else:
            self.scheduler = self.restarts.scheduler(lambda step: lr_factor(step, config))
        size = config.batch_size * config.accumulate
        self.batches = Batches(corpus.train, size, config.seq_len, seed=config.seed)
        for split in ("valid", "test"):
            self._windows(split)  # a split that is too short is refused before the training
        self.step = 0
        self.loss: float | None = None  # as last read
        self.seconds = 0.0
        self.curve: list[tuple[int, float]] = []
        self.valid_curve: list[tuple[int, float]] = []

    def autocast(self) -> Any:
        """The autocast context of this run's precision."""
        if self.precision != "bf16-autocast":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def accumulate_gradients(self) -> Tensor:
        """Forward and backward over this process's rows of a step's batch; their mean loss."""
        inputs, labels = self.batches[self.step]
        total = torch.zeros((), device=self.device)
        parts = self.config.accumulate
        batches = zip(inputs.chunk(parts), labels.chunk(parts), strict=True)
        for part, (x, y) in enumerate(batches, 1):
            rows, weight = self.parallel.rows(len(x))
            held: Any = self.parallel.local_gradients(self.replica, part == parts)
            if self.released is not None and part < parts:
                held = self.released.paused()
            with held:
                with self.autocast():
                    loss = self._loss(x[rows], y[rows]) * weight / parts
                loss.backward()
            total += loss.detach()
        return total

    def train_step(self, log: bool, *, read: bool = True) -> tuple[float, dict[str, float]]:
        """One optimizer step; the loss, and the scalars to log where ``log`` asks for them.

        Without ``read`` the loss may be that of an earlier step: a GPU is then not waited for.
        """
        ratios = UpdateRatios(self.optimizer)
        with ExitStack() as around:
            if log and self.released is not None:  # the weights move in the backward
                around.enter_context(ratios.around_step())
            mean = self.accumulate_gradients()
            if read or self.loss is None or self.device.type == "cpu":
                self.loss = self.parallel.mean(mean.item())
            norm = self._clip(log)
            if log and self.released is None:
                around.enter_context(ratios.around_step())
            self.optimizer.step()
        if self.released is not None and self.config.clip > 0:
            norm = self.released.grad_norm
        scalars: dict[str, float] = {}
        if log:
            scalars = {} if norm is None else {"train/gradient_norm": whole(norm).item()}
            scalars |= {f"update_ratio/{k}": v for k, v in ratios.ratios.items()}
            for group in self.optimizer.param_groups:
                scalars[f"lr/{group.get('role', 'all')}"] = float(group["lr"])
        if self.restarts is not None:
            self.restarts.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        return self.loss, scalars

    def _loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        if self.graphed:
            torch.compiler.cudagraph_mark_step_begin()
        loss: Tensor = self.forward(self._moved(inputs), self._moved(labels))
        return loss

    def _moved(self, tokens: Tensor) -> Tensor:
        """On the device, without waiting for what it is at."""
        if self.device.type == "cpu":
            return tokens
        return tokens.pin_memory().to(self.device, non_blocking=True)

    def _clip(self, log: bool) -> Tensor | None:
        """Clip the gradients; their norm, where it is asked for. None where they are released."""
        if self.released is not None:
            return None
        if self.config.clip > 0:
            return nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(grads) if log else None

    @torch.no_grad()
    def evaluate(self, split: str) -> float:
        """Mean loss a token over ``eval_tokens`` of a split (``valid`` or ``test``)."""
        total, count = 0.0, 0
        for x, y in self._windows(split):
            rows, weight = self.parallel.rows(len(x))
            with self.autocast():
                loss = self._loss(x[rows], y[rows])
            total += loss.item() * y.numel() * weight
            count += y.numel()
        return self.parallel.mean(total) / count

    def results(self, test: bool) -> dict[str, Any]:
        """Return what the run's row has of the trained model: its losses; None: not finite."""
        valid = self.evaluate("valid")
        tested = self.evaluate("test") if test and math.isfinite(valid) else math.nan
        losses = {"valid_loss": valid, "test_loss": tested}
        return {name: loss if math.isfinite(loss) else None for name, loss in losses.items()}

    def _windows(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        config, tokens = self.config, getattr(self.corpus, split)
        return iterate_eval(tokens, config.batch_size, config.seq_len, config.eval_tokens)

    def state_bytes(self) -> tuple[int, int]:
        """Bytes of the parameters and of the optimizer's state tensors, as they are held.

        With the parameters count the positions of sparse parts.
        """
        params = sum(p.numel() * p.element_size() for p in self.model.parameters())
        params += support_bytes(self.model)
        tensors = [t for s in self.optimizer.state.values() for t in s.values()]
        state = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
        return params, state

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on: formats, settings, text, every parameter's role."""
        names = {p: name for name, p in self.model.named_parameters()}
        roles = {
            names[p]: f"{role_of(p, group)} {list(p.shape)}"
            for group in self.optimizer.param_groups
            for p in group["params"]
        }
        versions = {"format": FORMAT, "optimzoo": optimzoo.__version__}
        return {**versions, **fingerprint(self.config, self.corpus), **roles}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the run goes on from."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
            "restarts": self.restarts.state_dict() if self.restarts is not None else {},
            "progress": json.dumps([self.step, self.seconds, self.curve, self.valid_curve]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; the state is whole, however many processes share the run."""
        self.parallel.load(self.model, self.optimizer, state)
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]
        if self.restarts is not None:
            self.restarts.load_state_dict(state["restarts"])
        self.step, self.seconds, curve, valid = json.loads(state["progress"])
        self.curve, self.valid_curve = [tuple(x) for x in curve], [tuple(x) for x in valid]

    def save(self) -> None:
        """Write a checkpoint, if this run has a folder."""
        if self.checkpoints is None:
            return
        state = self.parallel.gather(self.state_dict())
        if self.parallel.leads:
            self.checkpoints.save(self.step, state, self.identity())

    def resume(self, *, skip_damaged: bool = False) -> bool:
        """Continue from the folder's newest checkpoint, if there is one.

        Raises:
            ValueError: it is damaged (and not to be passed over), or of a run with other settings.
        """
        if self.checkpoints is None:
            return False
        found = self.checkpoints.newest(self.identity(), skip_damaged=skip_damaged)
        if found is not None:
            self.load_state_dict(found[1])
        self.parallel.barrier()  # all have read
        if self.parallel.leads:
            self.checkpoints.settle(found[0] if found is not None else None)
        return found is not None
