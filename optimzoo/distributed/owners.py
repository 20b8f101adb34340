"""Functions of whole matrices, each computed by one of the processes that share the matrix."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from optimzoo.distributed.collectives import all_to_all
from optimzoo.distributed.shards import Shards

Function = Callable[[Tensor], Tensor]


def map_whole_matrices(
    function: Function, matrices: Sequence[Tensor], shards: Sequence[Shards]
) -> Iterator[tuple[int, Tensor]]:
    """Apply ``function`` to whole matrices, of which every process passes and gets its shard.

    Sharded matrices are dealt out, as many at a time as there are processes: each process gathers
    one, computes, and sends the shards back. So nothing is computed twice, the result has the bits
    of one process, and a process sends each of its shards once and receives it once. A process
    holds one whole matrix at a time.

    Args:
        function: a function that keeps the shape.
        matrices: this process's shards, ``[..., m, n]``.
        shards: how they are sharded.

    Yields:
        Each matrix's index and this process's shard of the result, in at least float32.

    Raises:
        RuntimeError: a matrix that is sharded along more than one dimension of its mesh.
    """
    dealt: dict[tuple[int, torch.dtype], list[int]] = {}
    for i, (matrix, shard) in enumerate(zip(matrices, shards, strict=True)):
        if shard.is_sharded():
            dealt.setdefault((id(_group(shard)), matrix.dtype), []).append(i)
        else:
            yield i, function(matrix).to(_wide(matrix))
    for indices in dealt.values():
        size = _group(shards[indices[0]]).size()
        for start in range(0, len(indices), size):
            some = indices[start : start + size]
            parts = _deal(function, [matrices[i] for i in some], [shards[i] for i in some])
            yield from zip(some, parts, strict=True)


def _group(shard: Shards) -> Any:
    groups = shard.groups()
    if len(groups) > 1:
        raise RuntimeError(
            f"a weight {list(shard.size)} is cut along {len(groups)} dimensions of its mesh; a "
            "rule of whole matrices takes one: shard it with FSDP2 alone, or choose another method"
        )
    return groups[0]


def _wide(matrix: Tensor) -> torch.dtype:
    return torch.promote_types(matrix.dtype, torch.float32)


def _deal(function: Function, parts: list[Tensor], shards: list[Shards]) -> list[Tensor]:
    group = _group(shards[0])
    world, rank = group.size(), torch.distributed.get_rank(group)
    empty = parts[0].new_empty(0)
    shapes = [_part_shapes(p, s, world) for p, s in zip(parts, shards, strict=True)]
    mine = shapes[rank] if rank < len(parts) else [torch.Size([0])] * world
    sent = [*parts, *[empty] * (world - len(parts))]
    received = all_to_all(sent, [shape.numel() for shape in mine], group)
    results = [empty.to(_wide(empty))] * world
    if rank < len(parts):
        dim = -2 if shards[rank].is_sharded("m") else -1
        pieces = [t.view(shape) for t, shape in zip(received, mine, strict=True)]
        result = function(torch.cat(pieces, dim)).to(_wide(empty))
        results = list(result.split([shape[dim] for shape in mine], dim))
    sizes = [part.numel() for part in sent]
    returned = all_to_all(results, sizes, group)[: len(parts)]
    return [t.view(part.shape) for t, part in zip(returned, parts, strict=True)]


def _part_shapes(part: Tensor, shard: Shards, world: int) -> list[torch.Size]:
    """Return the shape of each process's shard."""
    axis, dim = ("m", -2) if shard.is_sharded("m") else ("n", -1)
    length = shard.lengths[axis]
    chunk = -(-length // world)
    shapes = []
    for i in range(world):
        shape = list(part.shape)
        shape[dim] = max(0, min(chunk, length - i * chunk))
        shapes.append(torch.Size(shape))
    return shapes
