"""Sharding of a weight over processes, and the reductions that cross its shards."""

import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from optimzoo.distributed.collectives import all_reduce_

_PLAIN = (Tensor, torch.nn.Parameter)  # looked at first: a missing attribute takes time


def local_part(tensor: Tensor, like: Any = None) -> Tensor:
    """Return this process's shard of a tensor, without a copy; a plain tensor as it is.

    Args:
        tensor: a parameter, its gradient or a tensor of its state.
        like: the parameter of a gradient, which is redistributed to the parameter's placements.
    """
    sharded: Any = tensor
    if type(tensor) in _PLAIN or not hasattr(sharded, "to_local"):
        return tensor
    if like is not None and tuple(sharded.placements) != tuple(like.placements):
        sharded = sharded.redistribute(like.device_mesh, like.placements)  # such as a partial sum
    part: Tensor = sharded.to_local()
    return part


@dataclass(frozen=True)
class Shards:
    """Sharding of a weight seen as a matrix ``[..., m, n]``; empty for a plain tensor.

    Dimensions have names: ``m`` rows, ``n`` columns, ``s`` the one that stacks matrices. Each
    dimension of the device mesh shards at most one of them. A sharded stack needs no communication:
    each of its matrices is whole.

    Attributes:
        mesh: the weight's device mesh; None for a plain tensor.
        size: the shape of the weight.
        placements: the weight's placements, one per dimension of the mesh.
        cuts: the dimension that each dimension of the mesh shards; empty where it shards none.
        lengths: length of each dimension in the whole weight, by name.
        spans: first index and length of this process's shard, for each sharded dimension.
    """

    mesh: Any = None
    size: tuple[int, ...] = ()
    placements: tuple[Any, ...] = ()
    cuts: tuple[str, ...] = ()
    lengths: Mapping[str, int] = field(default_factory=dict)
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, param: Tensor, *, transposed: bool = False, stacked: bool = False) -> "Shards":
        """Return the sharding of a parameter.

        Raises:
            RuntimeError: a weight above two dimensions that is sharded inside of a row.
        """
        if type(param) in _PLAIN or not hasattr(param, "device_mesh"):
            return UNSHARDED
        sharded: Any = param
        mesh, placements = sharded.device_mesh, tuple(sharded.placements)
        dims = _dims(param.ndim, transposed, stacked)
        cuts = []
        for i, placement in enumerate(placements):
            dim = getattr(placement, "dim", None)
            cuts.append("" if dim is None or mesh.size(i) == 1 else dims[dim])
            if cuts[-1] == "?":
                raise RuntimeError(
                    f"a weight {list(param.shape)} is cut along dimension {dim}, inside of the "
                    "rows of its matrix; shard it along dimension 0"
                )
        lengths = {x: param.shape[dims.index(x)] for x in dims if x != "?"}
        spans = _spans(mesh, placements, cuts, lengths)
        return cls(mesh, tuple(param.shape), placements, tuple(cuts), lengths, spans)

    @property
    def transposed(self) -> "Shards":
        """Return the sharding of the transposed matrix."""
        if self.mesh is None:
            return self
        other = {"m": "n", "n": "m"}
        return replace(
            self,
            cuts=tuple(other.get(x, x) for x in self.cuts),
            lengths={other.get(x, x): size for x, size in self.lengths.items()},
            spans={other.get(x, x): span for x, span in self.spans.items()},
        )

    def is_sharded(self, dims: str = "mn") -> bool:
        """Return whether one of these dimensions is sharded."""
        return any(x in dims for x in self.cuts if x)

    def groups(self, dims: str = "mn") -> list[Any]:
        """Return the process groups over which these dimensions are sharded."""
        return [self.mesh.get_group(i) for i, x in enumerate(self.cuts) if x and x in dims]

    def shape(self, local: torch.Size) -> torch.Size:
        """Return the shape of the whole matrix whose shard here has the shape ``local``."""
        named = ("s" + "." * len(local))[: len(local) - 2] + "mn" if len(local) > 1 else "m"
        return torch.Size(
            self.lengths[x] if x in self.spans else n for x, n in zip(named, local, strict=False)
        )

    def sum_(self, tensors: Sequence[Tensor], over: str = "mn") -> None:
        """All-reduce, in place, sums that each process has taken over its shard."""
        for group in self.groups(over):
            all_reduce_(tensors, group)

    def norm(
        self, x: Tensor, order: float = 2, *, dim: int | tuple[int, ...], over: str = ""
    ) -> Tensor:
        """Return the norm along ``dim``, kept, in at least float32, over all shards of ``over``."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if order == math.inf and x.numel() == 0:  # torch has no maximum of nothing
            shape = [1 if i in _positive(dim, x.ndim) else n for i, n in enumerate(x.shape)]
            length = x.new_zeros(shape, dtype=wide)
        else:
            length = torch.linalg.vector_norm(x, order, dim=dim, keepdim=True, dtype=wide)
        if not self.is_sharded(over):
            return length
        if order == math.inf:
            self.max_([length], over)
            return length
        squares = length.square()
        self.sum_([squares], over)
        return squares.sqrt()

    def max_(self, tensors: Sequence[Tensor], over: str = "mn") -> None:
        """All-reduce, in place, maxima that each process has taken over its shard."""
        for group in self.groups(over):
            all_reduce_(tensors, group, largest=True)

    def local_slice(self, whole: Tensor, axis: str = "m", dim: int = -2) -> Tensor:
        """Return this process's slice of a tensor that every process has whole."""
        if axis not in self.spans:
            return whole
        return whole.narrow(dim, *self.spans[axis])

    def gather(self, part: Tensor, axis: str = "m", dim: int = -2) -> Tensor:
        """Return the whole tensor of each process's slice; ``part`` itself if it is not cut.

        It takes an all-reduce for each mesh dimension that cuts ``axis``; all get the same bits.
        """
        if axis not in self.spans:
            return part
        shape = list(part.shape)
        shape[dim] = self.lengths[axis]
        whole = part.new_zeros(shape)
        whole.narrow(dim, *self.spans[axis]).copy_(part)
        self.sum_([whole], axis)
        return whole

    def matmul(self, matrix: Tensor, columns: Tensor) -> Tensor:
        """Return the whole ``matrix @ columns`` from whole ``columns`` ``[..., n, r]``."""
        product = matrix @ self.local_slice(columns, "n")
        self.sum_([product], "n")
        return self.gather(product)

    def to_dtensor(self, local: Tensor, dims: str) -> Tensor:
        """Wrap a state tensor in a DTensor, sharded where ``dims`` name sharded dimensions.

        A tensor that is the same on every process stays plain. ``dims`` name the last
        dimensions, a dot one that the weight does not have; those of a stack come before them.
        """
        if self.mesh is None or local.ndim == 0:
            return local
        stack = "s" + "." * (local.ndim - len(dims) - 1) if local.ndim > len(dims) else ""
        named = (stack + dims)[-local.ndim :]
        if not any(x and x in named for x in self.cuts):
            return local
        from torch.distributed.tensor import DTensor, Replicate

        placements = [
            _along(placement, named.index(x)) if x and x in named else Replicate()
            for placement, x in zip(self.placements, self.cuts, strict=True)
        ]
        shape = [
            self.lengths[x] if x in self.spans else n
            for x, n in zip(named, local.shape, strict=True)
        ]
        stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        whole: dict[str, Any] = {"shape": torch.Size(shape), "stride": tuple(stride)}
        tensor: Tensor = DTensor.from_local(
            local.contiguous(), self.mesh, placements, run_check=False, **whole
        )
        return tensor

    @contextmanager
    def local_state(
        self, state: MutableMapping[str, Any], dims: Mapping[str, str]
    ) -> Iterator[MutableMapping[str, Any]]:
        """Yield the state as plain local tensors; :meth:`to_dtensor` new ones afterwards.

        Args:
            state: the parameter's state.
            dims: by key of the state, the ``dims`` of :meth:`to_dtensor`.
        """
        if self.mesh is None:
            yield state
            return
        inner = {key: local_part(value) for key, value in state.items()}
        before = dict(inner)
        yield inner
        for key, value in inner.items():
            if value is not before.get(key):
                state[key] = self.to_dtensor(value, dims.get(key, "")) if key in dims else value


UNSHARDED = Shards()


def sum_packed(tensors: Sequence[Tensor], shards: Sequence[Shards], over: Sequence[str]) -> None:
    """Apply :meth:`Shards.sum_` to tensors of many weights, by one all-reduce per process group."""
    packed: dict[int, tuple[Any, list[Tensor]]] = {}
    for tensor, shard, dims in zip(tensors, shards, over, strict=True):
        for group in shard.groups(dims):
            packed.setdefault(id(group), (group, []))[1].append(tensor)
    for group, some in packed.values():
        all_reduce_(some, group)


def _positive(dim: int | tuple[int, ...], ndim: int) -> set[int]:
    return {i % ndim for i in ((dim,) if isinstance(dim, int) else dim)}


def _dims(ndim: int, transposed: bool, stacked: bool) -> str:
    if ndim < 2:
        return "m" * ndim
    if ndim > 2 and not stacked:
        return "m" + "?" * (ndim - 1)
    return "s" * (ndim > 2) + "?" * (ndim - 3) + ("nm" if transposed else "mn")


def _along(placement: Any, dim: int) -> Any:
    factor = getattr(placement, "split_factor", None)  # FSDP2 over tensor parallelism
    return type(placement)(dim) if factor is None else type(placement)(dim, split_factor=factor)


def _spans(
    mesh: Any, placements: Sequence[Any], cuts: Sequence[str], lengths: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """Return the first index and the length of this process's shard of each sharded dimension."""
    coordinate = mesh.get_coordinate()
    spans: dict[str, tuple[int, int]] = {}
    # Strided shards (FSDP2 over tensor parallelism) cut what the plain ones have left.
    order = sorted(range(len(cuts)), key=lambda i: hasattr(placements[i], "split_factor"))
    for i in order:
        axis = cuts[i]
        if axis:
            start, size = spans.get(axis, (0, lengths[axis]))
            chunk = -(-size // mesh.size(i))
            skipped = min(coordinate[i] * chunk, size)
            spans[axis] = (start + skipped, min(chunk, size - skipped))
    return spans
