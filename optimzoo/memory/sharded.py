"""Shards of the first of several processes under FSDP2, without the others."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextmanager
def pretended_mesh(processes: int) -> Iterator[Any]:
    """Yield a device mesh of ``processes`` processes, all but this one pretended.

    Raises:
        ValueError: a process group exists already.
    """
    if dist.is_initialized():
        raise ValueError("shards pretend a process group, and this process is in a real one")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield init_device_mesh("cpu", (processes,))
    finally:
        dist.destroy_process_group()


def shard_of(param: Tensor, dtype: torch.dtype, mesh: Any) -> nn.Parameter:
    """Return a parameter sharded along dimension 0, with a gradient, as the first process has it.

    The first process has the most rows, ⌈rows / processes⌉.
    """
    from torch.distributed.tensor import DTensor, Shard

    def part() -> Tensor:
        shape = (-(-param.shape[0] // mesh.size()), *param.shape[1:])
        local = torch.empty(shape, dtype=dtype)
        whole: dict[str, Any] = {"shape": param.shape, "stride": param.stride()}
        shard: Tensor = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, **whole)
        return shard

    shadow = nn.Parameter(part())
    shadow.grad = part()
    return shadow


def shard_model(model: nn.Module, blocks: list[nn.Module], mesh: Any) -> None:
    """Apply ``fully_shard`` to each block and then to the whole model, in place."""
    from torch.distributed.fsdp import fully_shard

    for module in (*blocks, model):
        fully_shard(module, mesh=mesh)
