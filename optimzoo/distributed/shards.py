"""How the processes hold a weight, and what completes what each of them has of it."""

import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from optimzoo.distributed.collectives import all_reduce_


def local_part(tensor: Tensor, like: Any = None) -> Tensor:
    """The part of a sharded tensor that this process holds, in place; others as they are.

    Args:
        tensor: a parameter, its gradient or a tensor of its state.
        like: the parameter of a gradient, which is brought into the parameter's placement.
    """
    sharded: Any = tensor
    if not hasattr(sharded, "to_local"):
        return tensor
    if like is not None and tuple(sharded.placements) != tuple(like.placements):
        sharded = sharded.redistribute(like.device_mesh, like.placements)  # still to be summed, say
    part: Tensor = sharded.to_local()
    return part


@dataclass(frozen=True)
class Shards:
    """The cut of a weight seen as a matrix ``[..., m, n]``; none for a plain tensor.

    Dimensions have letters: ``m`` rows, ``n`` columns, ``s`` the one that stacks matrices. Each
    dimension of the device mesh cuts at most one of them. A cut stack is nobody's concern: each of
    its matrices is whole.

    Attributes:
        mesh: the weight's device mesh; None for a plain tensor.
        size: the shape of the weight.
        placements: the weight's, one a dimension of the mesh.
        cuts: the letter that each dimension of the mesh cuts; empty where it cuts none.
        lengths: of each letter's dimension, in the whole weight.
        spans: of each letter that is cut, the first index here and how many.
    """

    mesh: Any = None
    size: tuple[int, ...] = ()
    placements: tuple[Any, ...] = ()
    cuts: tuple[str, ...] = ()
    lengths: Mapping[str, int] = field(default_factory=dict)
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, param: Tensor, *, transposed: bool = False, stacked: bool = False) -> "Shards":
        """The cut of a parameter.

        Raises:
            RuntimeError: a weight above two dimensions that is cut inside of a row.
        """
        if not hasattr(param, "device_mesh"):
            return WHOLE
        sharded: Any = param
        mesh, placements = sharded.device_mesh, tuple(sharded.placements)
        letters = _letters(param.ndim, transposed, stacked)
        cuts = []
        for i, placement in enumerate(placements):
            dim = getattr(placement, "dim", None)
            cuts.append("" if dim is None or mesh.size(i) == 1 else letters[dim])
            if cuts[-1] == "?":
                raise RuntimeError(
                    f"a weight {list(param.shape)} is cut along dimension {dim}, inside of the "
                    "rows of its matrix; shard it along dimension 0"
                )
        lengths = {x: param.shape[letters.index(x)] for x in letters if x != "?"}
        spans = _spans(mesh, placements, cuts, lengths)
        return cls(mesh, tuple(param.shape), placements, tuple(cuts), lengths, spans)

    @property
    def T(self) -> "Shards":
        """The cut of the transposed matrix."""
        if self.mesh is None:
            return self
        other = {"m": "n", "n": "m"}
        return replace(
            self,
            cuts=tuple(other.get(x, x) for x in self.cuts),
            lengths={other.get(x, x): size for x, size in self.lengths.items()},
            spans={other.get(x, x): span for x, span in self.spans.items()},
        )

    def cut(self, letters: str = "mn") -> bool:
        """Whether one of these dimensions is cut."""
        return any(x in letters for x in self.cuts if x)

    def groups(self, letters: str = "mn") -> list[Any]:
        """The process groups among which these dimensions are cut."""
        return [self.mesh.get_group(i) for i, x in enumerate(self.cuts) if x and x in letters]

    def shape(self, local: torch.Size) -> torch.Size:
        """The shape of the whole matrix of which this process has one of shape ``local``."""
        named = ("s" + "." * len(local))[: len(local) - 2] + "mn" if len(local) > 1 else "m"
        return torch.Size(
            self.lengths[x] if x in self.spans else n for x, n in zip(named, local, strict=False)
        )

    def sum_(self, tensors: Sequence[Tensor], over: str = "mn") -> None:
        """Complete, in place, sums that each process has made over its part of a dimension."""
        for group in self.groups(over):
            all_reduce_(tensors, group)

    def norm(
        self, x: Tensor, order: float = 2, *, dim: int | tuple[int, ...], over: str = ""
    ) -> Tensor:
        """The norm along ``dim``, kept, in at least float32, completed ``over`` cut dimensions."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if order == math.inf and x.numel() == 0:  # torch has no maximum of nothing
            shape = [1 if i in _positive(dim, x.ndim) else n for i, n in enumerate(x.shape)]
            length = x.new_zeros(shape, dtype=wide)
        else:
            length = torch.linalg.vector_norm(x, order, dim=dim, keepdim=True, dtype=wide)
        if not self.cut(over):
            return length
        if order == math.inf:
            self.max_([length], over)
            return length
        squares = length.square()
        self.sum_([squares], over)
        return squares.sqrt()

    def max_(self, tensors: Sequence[Tensor], over: str = "mn") -> None:
        """Complete, in place, maxima."""
        for group in self.groups(over):
            all_reduce_(tensors, group, largest=True)

    def part(self, whole: Tensor, letter: str = "m", dim: int = -2) -> Tensor:
        """What belongs here of a tensor that every process has whole."""
        if letter not in self.spans:
            return whole
        return whole.narrow(dim, *self.spans[letter])

    def gather(self, part: Tensor, letter: str = "m", dim: int = -2) -> Tensor:
        """The inverse of :meth:`part`, for what is small: one sum, the same bits everywhere."""
        if letter not in self.spans:
            return part
        shape = list(part.shape)
        shape[dim] = self.lengths[letter]
        whole = part.new_zeros(shape)
        whole.narrow(dim, *self.spans[letter]).copy_(part)
        self.sum_([whole], letter)
        return whole

    def times(self, matrix: Tensor, columns: Tensor) -> Tensor:
        """``matrix @ columns``, whole from whole ``columns`` ``[..., n, r]``: one all-reduce."""
        product = matrix @ self.part(columns, "n")
        self.sum_([product], "n")
        return self.gather(product)

    def hold(self, local: Tensor, letters: str) -> Tensor:
        """A state tensor for the checkpoint: sharded as far as ``letters`` name cut dimensions.

        What every process has alike stays a plain tensor. ``letters`` names the last dimensions, a
        dot those that the weight does not have; before them come those of the stack.
        """
        if self.mesh is None or local.ndim == 0:
            return local
        stack = "s" + "." * (local.ndim - len(letters) - 1) if local.ndim > len(letters) else ""
        named = (stack + letters)[-local.ndim :]
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
        held: Tensor = DTensor.from_local(
            local.contiguous(), self.mesh, placements, run_check=False, **whole
        )
        return held

    @contextmanager
    def opened(
        self, state: MutableMapping[str, Any], letters: Mapping[str, str]
    ) -> Iterator[MutableMapping[str, Any]]:
        """The state as plain tensors, what this process has of it; new ones are held afterwards.

        Args:
            state: of the parameter.
            letters: of each key that follows a dimension of the weight, see :meth:`hold`.
        """
        if self.mesh is None:
            yield state
            return
        inner = {key: local_part(value) for key, value in state.items()}
        before = dict(inner)
        yield inner
        for key, value in inner.items():
            if value is not before.get(key):
                state[key] = self.hold(value, letters.get(key, "")) if key in letters else value


WHOLE = Shards()


def sum_packed(tensors: Sequence[Tensor], shards: Sequence[Shards], over: Sequence[str]) -> None:
    """:meth:`Shards.sum_` for the tensors of many weights: one all-reduce a process group."""
    packed: dict[int, tuple[Any, list[Tensor]]] = {}
    for tensor, shard, letters in zip(tensors, shards, over, strict=True):
        for group in shard.groups(letters):
            packed.setdefault(id(group), (group, []))[1].append(tensor)
    for group, some in packed.values():
        all_reduce_(some, group)


def _positive(dim: int | tuple[int, ...], ndim: int) -> set[int]:
    return {i % ndim for i in ((dim,) if isinstance(dim, int) else dim)}


def _letters(ndim: int, transposed: bool, stacked: bool) -> str:
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
    """Where the part of this process begins in each dimension that is cut, and its length."""
    coordinate = mesh.get_coordinate()
    spans: dict[str, tuple[int, int]] = {}
    # Strided shards (FSDP2 over tensor parallelism) cut what the plain ones have left.
    order = sorted(range(len(cuts)), key=lambda i: hasattr(placements[i], "split_factor"))
    for i in order:
        letter = cuts[i]
        if letter:
            start, size = spans.get(letter, (0, lengths[letter]))
            chunk = -(-size // mesh.size(i))
            skipped = min(coordinate[i] * chunk, size)
            spans[letter] = (start + skipped, min(chunk, size - skipped))
    return spans
