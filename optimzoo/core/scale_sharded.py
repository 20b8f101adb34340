"""SCALE's step on weights whose norms or spectrum are sharded over several processes."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimzoo.core.optimizer import scalar_lr
from optimzoo.core.rule import take_into_average
from optimzoo.core.update import signed_decay
from optimzoo.distributed import Shards, local_part, map_whole_matrices, sum_packed
from optimzoo.lowbit import RngKey, fp32_working_copy
from optimzoo.roles import input_dim, matrix_view

# scale._single_tensor_scale
Rule = Callable[..., None]


class Part(NamedTuple):
    """This process's shard of a weight, and the dimension that is reduced, 0 for both."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor | None
    shards: Shards
    dim: int
    group: dict[str, Any]
    rng_key: RngKey | None


def cut_part(
    p: Tensor, state: dict[str, Any], group: dict[str, Any], rng_key: RngKey | None
) -> Part | None:
    """Return the shard of a weight that processes must step together, else None."""
    if not hasattr(p, "device_mesh") or p.grad is None:
        return None
    shards = Shards.of(p, stacked=bool(group["stacked"]))
    dim = 0
    if group["normalize"] in ("column", "row"):
        dim = input_dim(group["role"] or "hidden", transposed=group["transposed"])
        dim = dim if group["normalize"] == "column" else -3 - dim
    letters = {0: "mn", -1: "n", -2: "m"}[dim]
    if group["normalize"] == "sign" or not shards.is_sharded(letters):
        return None
    average = local_part(state["exp_avg"]) if "exp_avg" in state else None
    return Part(local_part(p), local_part(p.grad, like=p), average, shards, dim, group, rng_key)


def step_parts(parts: Iterable[Part], rule: Rule, spectral: Callable[..., Tensor]) -> None:
    """Take one SCALE step, with one all-reduce of all squared norms per process group.

    Args:
        parts: the shards of all groups.
        rule: applies an update, given its direction.
        spectral: returns the direction of a whole matrix, for `normalize="spectral"`.
    """
    summed: list[Part] = []
    whole: list[Part] = []
    for part in parts:
        (whole if part.dim == 0 else summed).append(part)
    sources = [_averaged(part) for part in summed]
    wide = [torch.promote_types(g.dtype, torch.float32) for g in sources]
    squares = [
        torch.linalg.vector_norm(g, dim=part.dim, keepdim=True, dtype=dtype).square()
        for g, part, dtype in zip(sources, summed, wide, strict=True)
    ]
    letters = ["n" if part.dim == -1 else "m" for part in summed]
    sum_packed(squares, [part.shards for part in summed], letters)
    for part, grad, square in zip(summed, sources, squares, strict=True):
        length = square.sqrt()
        if part.group["norm"] == "rms":
            length = length / math.sqrt(max(part.shards.shape(grad.shape)[part.dim], 1))
        _write(part, grad / length.clamp_min(part.group["eps"]), rule)
    matrices = [_averaged(part) for part in whole]
    norm = whole[0].group["norm"] if whole else "rms"
    for i, direction in map_whole_matrices(
        lambda grad: spectral(grad, norm=norm), matrices, [part.shards for part in whole]
    ):
        _write(whole[i], direction, rule)


def _averaged(part: Part) -> Tensor:
    """Return the gradient, or the updated momentum where the weight has one, as a matrix."""
    grad = -part.grad if part.group["maximize"] else part.grad
    if part.exp_avg is not None and part.group["momentum"] != 0:
        grad, momentum = grad.to(part.exp_avg.dtype), part.group["momentum"]
        grad = take_into_average(grad, part.exp_avg, momentum, nesterov=part.group["nesterov"])
    return matrix_view(grad, stacked=bool(part.group["stacked"]))


def _write(part: Part, direction: Tensor, rule: Rule) -> None:
    update = direction.view_as(part.weight)
    lr, decay = scalar_lr(part.group), signed_decay(part.group)
    with fp32_working_copy(part.weight, part.rng_key) as weight:
        rule([weight], [part.grad], [None], lambda _: [update], lr, 0.0, decay)
