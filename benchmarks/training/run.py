"""One training run: model, optimizer, step, evaluation and state."""

import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import optimzoo
from benchmarks.common.files import write_atomic
from benchmarks.data.batches import Batches, iterate_eval
from benchmarks.data.corpus import Corpus
from benchmarks.training.checkpoint import FORMAT, Checkpoints
from benchmarks.training.config import RunConfig, fingerprint, lr_factor, resolve_precision
from benchmarks.training.distributed import ALONE, Parallel, whole
from benchmarks.training.low_rank_model import convert_model, make_restarts, on_meta
from benchmarks.training.models import load_weights, make_model
from benchmarks.training.own import create_own, is_own
from optimzoo.lowrank import support_bytes
from optimzoo.models import Llama, get_config, is_config
from optimzoo.roles import ROLES, role_of


def make_optimizer(config: RunConfig, model: nn.Module) -> Optimizer:
    """Create the run's optimizer on a model's weights."""
    groups = optimzoo.param_groups(model)
    for group in groups:
        group.update(config.groups.get(group["role"], {}))
    rates: dict[str, Any] = {"lr": config.lr}
    if config.other_lr is not None:  # else the method's own
        names = [f"{role}_lr" for role in ROLES if role != "hidden"]
        rates |= {name: config.other_lr for name in names if name not in config.hyper}
    try:
        if is_own(config.optimizer):
            return create_own(config.optimizer, groups, **rates, **config.hyper)
        return optimzoo.create_optimizer(config.optimizer, groups, **rates, **config.hyper)
    except TypeError as error:
        raise ValueError(f"hyper {config.hyper} does not fit: {error}") from error


def refuse_early(config: RunConfig) -> None:
    """Create model and optimizer on the meta device, to raise their errors before text is read.

    An optimizer of one's own, which may read its weights, gets those of a small Llama.
    """
    model: nn.Module = on_meta(config.model, config.lowrank)
    if is_own(config.optimizer):
        model = Llama(get_config("pico"))
    make_optimizer(config, model)


class Run:
    """One training run: model, optimizer, schedule, data and progress.

    ``out`` is the folder of its ``checkpoints``, if any; ``parallel`` its process group.
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
        if is_config(config.model) and parallel.kind == "fsdp":
            raise ValueError(f"model {config.model} cannot be sharded; take --parallel ddp")
        if config.release and parallel.kind != "none":
            raise ValueError(f"release is for one process; leave out --parallel {parallel.kind}")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = resolve_precision(config)
        self.model = make_model(config.model, corpus.vocab_size, seed=config.seed)
        if config.weights:
            load_weights(self.model, Path(config.weights))
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
        """Return the autocast context of this run's precision."""
        if self.precision != "bf16-autocast":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def accumulate_gradients(self) -> Tensor:
        """Run forward and backward over this rank's rows of the batch; return the mean loss."""
        inputs, labels = self.batches[self.step]
        total = torch.zeros((), device=self.device)
        parts = self.config.accumulate
        batches = zip(inputs.chunk(parts), labels.chunk(parts), strict=True)
        for part, (x, y) in enumerate(batches, 1):
            rows, weight = self.parallel.rows(len(x))
            context: Any = self.parallel.local_gradients(self.replica, part == parts)
            if self.released is not None and part < parts:
                context = self.released.paused()
            with context:
                with self.autocast():
                    loss = self._loss(x[rows], y[rows]) * weight / parts
                loss.backward()
            total += loss.detach()
        return total

    def train_step(self, log: bool, *, read: bool = True) -> tuple[float, dict[str, float]]:
        """Take one optimizer step; return the loss and, with ``log``, the scalars to log.

        Without ``read`` the loss may be that of an earlier step, to avoid waiting for a GPU.
        """
        updates: dict[str, float] = {}
        with ExitStack() as around:
            if log and self.released is not None:  # the weights move in the backward
                updates = around.enter_context(optimzoo.update_statistics(self.optimizer))
            mean = self.accumulate_gradients()
            if read or self.loss is None or self.device.type == "cpu":
                self.loss = self.parallel.mean(mean.item())
            norm = self._clip(log)
            if log and self.released is None:
                updates = around.enter_context(optimzoo.update_statistics(self.optimizer))
            self.optimizer.step()
        if self.released is not None and self.config.clip > 0:
            norm = self.released.grad_norm
        scalars: dict[str, float] = {}
        if log:
            scalars = {} if norm is None else {"train/gradient_norm": whole(norm).item()}
            for name, value in updates.items():
                role, _, what = name.partition("/")
                if what == "update_to_weight":
                    scalars[f"update_ratio/{role}"] = value
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
        return self.forward(self._moved(inputs), self._moved(labels))

    def _moved(self, tokens: Tensor) -> Tensor:
        """Copy tokens to the device without synchronizing."""
        if self.device.type == "cpu":
            return tokens
        return tokens.pin_memory().to(self.device, non_blocking=True)

    def _clip(self, log: bool) -> Tensor | None:
        """Clip the gradients and return their norm; None if it is not needed, or released."""
        if self.released is not None:
            return None
        if self.config.clip > 0:
            return nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(grads) if log else None

    @torch.no_grad()
    def evaluate(self, split: str) -> float:
        """Return the mean loss per token over ``eval_tokens`` of a split, "valid" or "test"."""
        total, count = 0.0, 0
        for x, y in self._windows(split):
            rows, weight = self.parallel.rows(len(x))
            with self.autocast():
                loss = self._loss(x[rows], y[rows])
            total += loss.item() * y.numel() * weight
            count += y.numel()
        return self.parallel.mean(total) / count

    def results(self, test: bool) -> dict[str, Any]:
        """Return the trained model's losses for the run's row; None for one that is not finite."""
        valid = self.evaluate("valid")
        tested = math.nan
        if test and math.isfinite(valid):
            same = self.corpus.test is self.corpus.valid
            tested = valid if same else self.evaluate("test")
        losses = {"valid_loss": valid, "test_loss": tested}
        return {name: loss if math.isfinite(loss) else None for name, loss in losses.items()}

    def _windows(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        config, tokens = self.config, getattr(self.corpus, split)
        return iterate_eval(tokens, config.batch_size, config.seq_len, config.eval_tokens)

    def state_bytes(self) -> tuple[int, int]:
        """Return the bytes of the parameters and of the optimizer's state tensors.

        The indices of sparse weights count as parameters.
        """
        params = sum(p.numel() * p.element_size() for p in self.model.parameters())
        params += support_bytes(self.model)
        tensors = [t for s in self.optimizer.state.values() for t in s.values()]
        state = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
        return params, state

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint must share with this run: format, settings, text, all roles."""
        names = {p: name for name, p in self.model.named_parameters()}
        roles = {
            names[p]: f"{role_of(p, group)} {list(p.shape)}"
            for group in self.optimizer.param_groups
            for p in group["params"]
        }
        versions = {"format": FORMAT, "optimzoo": optimzoo.__version__}
        return {**versions, **fingerprint(self.config, self.corpus), **roles}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the run resumes from."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
            "restarts": self.restarts.state_dict() if self.restarts is not None else {},
            "progress": json.dumps([self.step, self.seconds, self.curve, self.valid_curve]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load an unsharded state, whatever the number of ranks."""
        self.parallel.load(self.model, self.optimizer, state)
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]
        if self.restarts is not None:
            self.restarts.load_state_dict(state["restarts"])
        self.step, self.seconds, curve, valid = json.loads(state["progress"])
        self.curve, self.valid_curve = [tuple(x) for x in curve], [tuple(x) for x in valid]

    def save(self) -> None:
        """Write a checkpoint if the run has a folder."""
        if self.checkpoints is None:
            return
        state = self.parallel.gather(self.state_dict())
        if self.parallel.leads:
            self.checkpoints.save(self.step, state, self.identity())

    def save_weights(self, path: Path) -> None:
        """Write the model's weights, unsharded, to a file."""
        state = self.parallel.gather(self.model.state_dict())
        if self.parallel.leads:
            buffer = io.BytesIO()
            torch.save({name: tensor.cpu() for name, tensor in state.items()}, buffer)
            write_atomic(path, buffer.getvalue())

    def resume(self, *, skip_damaged: bool = False) -> bool:
        """Load the folder's newest checkpoint, and set damaged ones aside; False if there is none.

        Raises:
            ValueError: it is damaged (and not to be skipped), or of a run with other settings.
        """
        if self.checkpoints is None:
            return False
        newest = self.checkpoints.newest(self.identity(), skip_damaged=skip_damaged)
        if newest is not None:
            self.load_state_dict(newest[1])
        self.parallel.barrier()  # all have read
        if self.parallel.leads:
            self.checkpoints.prune_after_resume(None if newest is None else newest[0])
        return newest is not None
