"""Simulated peak of a training step, by category, from shapes alone: no weights and no GPU."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import Optimizer
from torch.utils.checkpoint import checkpoint

from optimzoo.gradient_release import release as step_in_backward
from optimzoo.memory.fake import Values, as_in_training, cuda_choices, fake_copy
from optimzoo.memory.sharded import pretended_mesh, shard_model
from optimzoo.memory.tracker import MODEL, PARAMETERS, STATE, STEP, WORKSPACES, Peak, Tracker
from optimzoo.registry import create_optimizer, get_info
from optimzoo.roles import param_groups

Step = Callable[[nn.Module], Tensor]
MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]
_CUDA_BLOCK = 512  # bytes: what CUDA's caching allocator rounds up to
# cuBLAS keeps 32 MiB a thread on Hopper (8 MiB before): the forward and the backward thread's.
_CUDA_WORKSPACES = 2 * 32 * 2**20


@dataclass(frozen=True)
class Simulation:
    """Result of :func:`simulate`.

    Attributes:
        peak: the highest of ``steps``.
        steps: the peak of the `first` step, which makes the state, of the `next`, and of one that
            refreshes the projectors, `refresh`, where the method has any.
    """

    peak: Peak
    steps: dict[str, Peak]


def simulate(
    model: nn.Module,
    optimizer: str | MakeOptimizer,
    *,
    batch: int = 1,
    seq: int = 256,
    step: Step | None = None,
    dtype: torch.dtype | None = None,
    checkpointing: bool = False,
    release: bool = False,
    micro_batches: int = 1,
    shards: int = 1,
    device: str = "cpu",
    **hyper: Any,
) -> Simulation:
    """Return the peak bytes of training steps of ``model`` with ``optimizer``, on fake tensors.

    Every operation of forward, backward and optimizer step runs on shapes alone, and each tensor
    counts from the operation that makes it to its last use. So whatever allocates is counted:
    state, a projector's refresh, multi-tensor temporaries, gradients that wait. What an operation
    holds inside itself (a factorisation's workspace) is not.

    Args:
        model: any module, on any device or on ``meta``; it is copied as shapes, and not touched.
        optimizer: a name of the registry, or a function from parameter groups to an optimizer.
        batch: sequences per micro-batch.
        seq: tokens per sequence.
        step: function from the model to its loss, if it does not take `input_ids` and `labels`.
        dtype: dtype of floating-point parameters and buffers; default: as the model has them.
        checkpointing: recompute each block in the backward pass (:func:`checkpoint_blocks`).
        release: step in the backward pass (:func:`optimzoo.release`).
        micro_batches: backward passes per step; with two and more, gradients wait for the next.
        shards: processes under FSDP2, each with its own ``batch``; the peak is that of the first.
            Each block is wrapped by ``fully_shard``, and then the whole model.
        device: `cpu`, or `cuda`: what torch and our kernels choose on a GPU, sizes as its allocator
            rounds them, and cuBLAS's workspaces.
        **hyper: hyperparameters, where ``optimizer`` is a name.

    Raises:
        ValueError: a module that cannot run on fake tensors (the message says why), an unknown
            optimizer, ``release`` with several micro-batches, ``shards`` below one.
    """
    if isinstance(optimizer, str):
        get_info(optimizer)  # an unknown name fails at once
    if release and micro_batches > 1:
        raise ValueError(
            f"release steps at the first gradient, and micro_batches={micro_batches} gives several"
        )
    step = step or language_model_step(batch, seq)
    session = Session(model, dtype, device, checkpointing=checkpointing, shards=shards)
    with session:
        if not release:
            session.run_model(step, min(micro_batches, 2))
        groups = param_groups(session.model)
        if isinstance(optimizer, str):
            instance = create_optimizer(optimizer, groups, **hyper)
        else:
            instance = optimizer(groups)
        steps = session.run_released(instance, step) if release else session.run_steps(instance)
    return Simulation(max(steps.values(), key=lambda peak: peak.bytes), steps)


class Session:
    """Simulation of one model: its copy on fake tensors, and the tracker of their bytes."""

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None,
        device: str,
        *,
        checkpointing: bool = False,
        shards: int = 1,
    ) -> None:
        if shards < 1:
            raise ValueError(f"Invalid shards: {shards}; it must be at least 1")
        if device not in ("cpu", "cuda"):
            raise ValueError(f"cannot simulate device {device!r}; it must be cpu or cuda")
        self.cuda, self.shards, self.mesh = device == "cuda", shards, None
        self.name = type(model).__name__
        self.tracker = Tracker(block=_CUDA_BLOCK if self.cuda else 1)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._values = Values(lambda: self.tracker.stepping)
        with self._explained():
            self.model = fake_copy(model, self._fake, dtype)
        if checkpointing:
            checkpoint_blocks(self.model)

    def __enter__(self) -> "Session":
        self._contexts = ExitStack()
        try:
            self._enter()
        except BaseException:
            self._contexts.close()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._contexts.__exit__(*error)

    def _enter(self) -> None:
        enter = self._contexts.enter_context
        if self.shards > 1:
            self.mesh = enter(pretended_mesh(self.shards))
        if self.cuda:
            enter(cuda_choices())
        enter(as_in_training())
        enter(self._fake)
        enter(self._values)
        if self.mesh is not None and any(True for _ in self.model.parameters()):
            with self._explained():
                shard_model(self.model, blocks_of(self.model), self.mesh)
        enter(self.tracker)
        self.tracker.count(self.model.buffers())
        self.tracker.count(self.model.parameters(), PARAMETERS)

    def run_model(self, step: Step, passes: int = 1) -> Peak:
        """Run forward and backward and return their peak; gradients stay."""
        with self._explained():
            for _ in range(passes):
                step(self.model).backward()
        return self.tracker.peak(MODEL)

    def run_released(self, optimizer: Optimizer, step: Step) -> dict[str, Peak]:
        """Run steps whose gradients are applied in the backward pass; return their peaks."""
        with ExitStack() as released:  # what is not removed keeps its weights alive
            self.tracker.bracket(
                self.model.parameters(),
                lambda: released.enter_context(step_in_backward(optimizer)),
            )
            steps = {}
            for name in _prepare_steps(optimizer):
                self.tracker.restart()
                self.run_model(step)
                with self._explained():
                    optimizer.step()
                steps[name] = self.on_device(self.tracker.peak())
        return steps

    def run_steps(self, optimizer: Optimizer) -> dict[str, Peak]:
        """Run the optimizer's steps; return their peaks, each with the passes before it."""
        tracker = self.tracker
        passes, state_bytes, steps = tracker.peak(MODEL), tracker.held(optimizer), {}
        for name in _prepare_steps(optimizer):
            tracker.restart()
            with self._explained():
                optimizer.step()
            # The state stays while the model runs, and nothing else of a step does.
            both = (passes.plus(STATE, state_bytes), tracker.peak(STEP))
            steps[name] = self.on_device(max(both, key=lambda peak: peak.bytes))
            state_bytes = tracker.held(optimizer)
        return steps

    def on_device(self, peak: Peak) -> Peak:
        """Return the peak with the workspaces of the device's libraries added."""
        return peak.plus(WORKSPACES, _CUDA_WORKSPACES) if self.cuda else peak

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{self.name} cannot be simulated on fake tensors: {first}; "
                "measure a real step instead (optimzoo.memory.measure)"
            ) from error


def _prepare_steps(optimizer: Optimizer) -> Iterator[str]:
    """Yield names of steps; before `refresh`, let every group refresh its projector each step."""
    yield "first"
    yield "next"
    groups = [g for g in optimizer.param_groups if "update_proj_gap" in g]
    for group in groups:
        group["update_proj_gap"] = 1
    if groups:
        yield "refresh"


def language_model_step(batch: int, seq: int) -> Step:
    """Return a function from a language model to its loss on ``batch`` x ``seq`` tokens.

    The model is called as Hugging Face's are, with `input_ids` and `labels`, and returns the loss
    or an object with the attribute `loss`.
    """

    def loss_of(model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        tokens = torch.zeros(batch, seq, dtype=torch.long, device=device)
        result = model(input_ids=tokens, labels=tokens)
        loss = result if isinstance(result, Tensor) else result.loss
        return loss

    return loss_of


def checkpoint_blocks(model: nn.Module) -> None:
    """Replace each block's ``forward`` by one that is recomputed in the backward pass.

    Blocks are the elements of the outermost ``nn.ModuleList``s (or ``nn.Sequential``s).

    Raises:
        ValueError: there are none.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList of blocks to checkpoint; "
            "checkpoint inside its forward and leave checkpointing off"
        )
    for block in blocks:
        block.forward = _recomputed(block.forward)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the elements of the outermost ``nn.ModuleList``s and ``nn.Sequential``s."""
    blocks: list[nn.Module] = []
    pending = [model]
    while pending:
        module = pending.pop()
        children = list(module.children())
        if isinstance(module, nn.ModuleList | nn.Sequential):
            blocks += children
        else:
            pending += children
    return blocks


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    # A partial, not a closure: a copy of the model then runs its own forward.
    return partial(checkpoint, forward, use_reentrant=False)
