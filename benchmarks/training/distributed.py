"""Data-parallel training of one model with torch.distributed.

``torchrun --nproc-per-node N -m benchmarks train ... --parallel ddp`` starts the processes. Each
takes its rows of the same batches, and gradients are averaged: the run equals that of one process,
up to rounding.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

KINDS = ("none", "ddp", "fsdp")
T = TypeVar("T")


@dataclass(frozen=True)
class Parallel:
    """Process group of a run as one rank sees it; by default a single process.

    Attributes:
        kind: ``none``; ``ddp``, every rank has the whole model; ``fsdp``, rows of each weight.
        rank: of this process.
        size: number of ranks.
    """

    kind: str = "none"
    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Return whether this rank writes files and shows progress."""
        return self.rank == 0

    def wrap(self, model: Any) -> Callable[..., Any]:
        """Return the forward to call: DDP's, or that of the model, sharded in place by FSDP."""
        if self.kind == "ddp":
            with warnings.catch_warnings():  # newer torch has another name for broadcast_buffers
                warnings.simplefilter("ignore", FutureWarning)
                # DDP lays its buckets out anew after the first step, unless it looks for unused
                # parameters: the order of the sums, and a resumed run's bits, would depend on it.
                return nn.parallel.DistributedDataParallel(
                    model, broadcast_buffers=False, find_unused_parameters=True
                )
        if self.kind == "fsdp":
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
            for block in model.model.layers:
                fully_shard(block, mp_policy=policy)
            fully_shard(model, mp_policy=policy)
        return model

    def rows(self, count: int) -> tuple[slice, float]:
        """Return this rank's slice of ``count`` rows, and the weight of their mean in `mean`.

        A rank without rows takes the first with weight 0, since all ranks must call the forward.
        """
        local_count = len(range(self.rank, count, self.size))
        rows = slice(self.rank, None, self.size) if local_count else slice(0, 1)
        return rows, local_count * self.size / count

    def local_gradients(self, forward: Any, last: bool) -> AbstractContextManager[Any]:
        """Return the context of a micro-batch's backward: only the last averages gradients."""
        wait = self.kind == "ddp" and not last
        return forward.no_sync() if wait else nullcontext()

    def mean(self, value: float) -> float:
        """Return the mean of ``value`` over all ranks."""
        if self.size == 1:
            return value
        return self._sum(value) / self.size

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is true on any rank."""
        return flag if self.size == 1 else self._sum(float(flag)) > 0

    def barrier(self) -> None:
        """Wait until all ranks have reached this call."""
        self.any(False)

    def first(self, make: Callable[[], T]) -> T:
        """Call ``make`` on rank 0, then on the others, which use its cache. Return its result."""
        if not self.leads:
            self.barrier()
        result = make()
        if self.leads:
            self.barrier()
        return result

    def _sum(self, value: float) -> float:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return float(total)

    def gather(self, state: Any) -> Any:
        """Return ``state`` with sharded tensors gathered to rank 0; every rank must call this."""
        if isinstance(state, Mapping):
            return {key: self.gather(value) for key, value in state.items()}
        if isinstance(state, list | tuple):
            return type(state)(self.gather(value) for value in state)
        if not hasattr(state, "full_tensor"):
            return state
        full = whole(state)
        return full.cpu() if self.leads else None

    def load(self, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Load an unsharded state into ``model`` and ``optimizer``; each rank takes its shards."""
        weights, saved, sharded = state["model"], state["optimizer"], dict[Any, Any]()
        if self.kind == "fsdp":
            from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

            # Takes a step without gradients, if none was taken: how the state is cut is known then.
            get_optimizer_state_dict(model, optimizer)
            sharded = optimizer.state_dict()["state"]
            params = model.state_dict()
            weights = {name: _placed(value, params[name]) for name, value in weights.items()}
        values = {
            index: {
                key: _placed(value, sharded.get(index, {}).get(key)) for key, value in full.items()
            }
            for index, full in saved["state"].items()
        }
        optimizer.load_state_dict({**saved, "state": values})
        model.load_state_dict(weights)  # last: that step may have touched them


ALONE = Parallel()


def _placed(value: Any, like: Any) -> Any:
    """Copy ``value``, a loaded tensor or number, and shard it as ``like`` is."""
    if not isinstance(value, Tensor):
        return value
    if not hasattr(like, "device_mesh"):
        return value.clone()
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def whole(tensor: Any) -> Any:
    """Gather a sharded tensor; return others unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextmanager
def start(kind: str) -> Iterator[Parallel]:
    """Join the process group of ``torchrun`` for the duration of the context.

    Raises:
        ValueError: torchrun has started no process, or several for ``kind`` none.
    """
    started = int(os.environ.get("WORLD_SIZE", "0"))
    if kind == "none":
        if started > 1:
            raise ValueError(
                f"{started} processes would all train the same; add --parallel ddp or fsdp"
            )
        yield Parallel()
        return
    if not started:
        raise ValueError(
            f"--parallel {kind} needs torchrun: torchrun --nproc-per-node N -m benchmarks train ..."
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    _meet("nccl" if torch.cuda.is_available() else "gloo")
    yield Parallel(kind, dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()  # not after an error: the others are not there to answer


def _meet(backend: str) -> None:
    """Create the process group from the processes of this start alone.

    torchrun keeps one store for all its starts (pytorch issue 135712): restarted processes would
    find the addresses of killed ones there, and wait for them.
    """
    if os.environ.get("GROUP_WORLD_SIZE") != "1":  # machines count their starts each by itself
        dist.init_process_group(backend)
        return
    store, rank, size = next(dist.rendezvous("env://"))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefixed = dist.PrefixStore(f"start-{start}", store)
    dist.init_process_group(backend, store=prefixed, rank=rank, world_size=size)
