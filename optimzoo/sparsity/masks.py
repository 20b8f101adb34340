"""N:M masks: which n of every m consecutive inputs of a weight are kept, and their packed form."""

import itertools

import torch
from torch import Tensor

from optimzoo.kernels import dispatch, native


def check_nm(n: int, m: int) -> None:
    """Refuse a pattern that is not n of m.

    Raises:
        ValueError: n is not from 1 to m.
    """
    if not 1 <= n <= m:
        raise ValueError(f"Invalid n:m: {n}:{m}; n must be from 1 to m")


def grouped(weight: Tensor, m: int, *, transposed: bool = False, stacked: bool = False) -> Tensor:
    """View ``weight`` as ``[..., groups, m]``, a group being m consecutive inputs of one output.

    Args:
        weight: ``[out, in]``; above two dimensions it is flattened to ``[out, -1]``.
        m: size of a group.
        transposed: the weight is ``[in, out]`` (GPT-2's Conv1D).
        stacked: the weight is a stack of matrices ``[..., out, in]``.

    Raises:
        ValueError: the number of inputs is not a multiple of m.
    """
    matrix = weight if stacked or weight.ndim == 2 else weight.flatten(1)
    if transposed:
        matrix = matrix.mT
    inputs = matrix.shape[-1]
    if inputs % m:
        raise ValueError(f"{inputs} inputs are not a multiple of m={m}; leave this weight out")
    return matrix.unflatten(-1, (inputs // m, m))


def nm_mask(
    weight: Tensor, n: int, m: int, *, transposed: bool = False, stacked: bool = False
) -> Tensor:
    """Return the mask of the n largest magnitudes of every group of m consecutive inputs.

    Exactly n of a group are kept: of equal magnitudes the lower index. NaN counts as infinite, so
    that it is not hidden. Each group takes m (m − 1) / 2 comparisons and no sort.

    Args:
        weight: see :func:`grouped`.
        n: how many of a group are kept.
        m: size of a group.
        transposed: see :func:`grouped`.
        stacked: see :func:`grouped`.

    Returns:
        A bool tensor of the weight's shape.

    Raises:
        ValueError: n is not from 1 to m; the number of inputs is not a multiple of m.
    """
    check_nm(n, m)
    groups = grouped(weight.detach(), m, transposed=transposed, stacked=stacked)
    sizes = [x.abs().nan_to_num(nan=torch.inf, posinf=torch.inf) for x in groups.unbind(-1)]
    beaten_by = [torch.zeros_like(x, dtype=torch.int16) for x in sizes]
    for low, high in itertools.combinations(range(m), 2):
        low_wins = sizes[low] >= sizes[high]
        beaten_by[high] += low_wins
        beaten_by[low] += ~low_wins
    mask = torch.stack([count < n for count in beaten_by], dim=-1).flatten(-2)
    return (mask.mT if transposed else mask).reshape(weight.shape)


def is_nm(
    weight: Tensor, n: int, m: int, *, transposed: bool = False, stacked: bool = False
) -> bool:
    """Return whether no group of m inputs has more than n values other than zero."""
    groups = grouped(weight.detach(), m, transposed=transposed, stacked=stacked)
    return bool(((groups != 0).sum(-1) <= n).all())


def pack(mask: Tensor) -> Tensor:
    """Pack a bool tensor into bits: uint8 ``[rows, ⌈rest / 8⌉]``, lowest bit first.

    Rows are those of dim 0 and each starts a new byte, so that a packed mask sharded along dim 0 is
    that of the weight sharded along dim 0.
    """
    rows = mask.reshape(mask.shape[0], mask[:1].numel())
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8))
    bits = padded.unflatten(1, (padded.shape[1] // 8, 8)).to(torch.uint8)
    return (bits << _places(mask)).sum(-1, dtype=torch.uint8)


def packed_mask(
    weight: Tensor, n: int, m: int, *, transposed: bool = False, stacked: bool = False
) -> Tensor:
    """Return ``pack(nm_mask(...))``, in one pass over the weight where there is a kernel for it."""
    check_nm(n, m)
    grouped(weight, m, transposed=transposed, stacked=stacked)
    weight = weight.detach()
    plain = (
        type(weight) in dispatch.PLAIN and weight.device.type == "cpu" and weight.is_contiguous()
    )
    fits = not transposed and m in (2, 4, 8) and weight.dtype in dispatch.TYPES
    if plain and fits and dispatch.backend("cpu") is not None:
        return native.CPU.nm_mask(weight, n, m)
    return pack(nm_mask(weight, n, m, transposed=transposed, stacked=stacked))


def unpack(bits: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return the bool tensor of ``shape`` that :func:`pack` has packed into ``bits``."""
    flat = (bits.unsqueeze(-1) >> _places(bits)).bitwise_and_(1).to(torch.bool).flatten(1)
    width = torch.Size(shape)[1:].numel()
    return flat[:, :width].reshape(shape)


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
