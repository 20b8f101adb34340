"""Sizes of an optimizer's steps by role, for any logger."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from optimzoo.distributed import Shards, local_part, sum_packed
from optimzoo.lowbit import at_least_float32
from optimzoo.roles import role_of


@contextmanager
def update_statistics(optimizer: Optimizer) -> Iterator[dict[str, float]]:
    r"""Measure what a step does to the weights of each role; fill the dictionary at the end.

    For the weights ``W`` of a role before the context and ``ΔW``, what they change by in it::

        ROLE/weight_rms         √(mean W²)
        ROLE/update_rms         √(mean ΔW²)
        ROLE/update_to_weight   ‖ΔW‖ / ‖W‖

    over all elements of all weights of the role, decay included. Of a group without a role it is
    that of the shape, `hidden` or `vector`, so that the optimizer may be any of torch's::

        with optimzoo.update_statistics(optimizer) as statistics:
            optimizer.step()
        logger.log(statistics)

    Under :func:`optimzoo.release` the weights move during the backward, which is then inside. So
    that every process takes part in the sums, sharded weights are measured on all of them.

    It costs a copy of the weights while the context is open, a float32 temporary of the largest of
    them, three passes over memory, and one read by the host: measure now and then. Only sharded
    weights need communication, an all-reduce of two numbers a weight.

    Args:
        optimizer: optimizer, of this library or not, whose parameters are measured.

    Yields:
        A dictionary, empty until the context is left without an exception.
    """
    weights = [(role_of(p, group), p) for group in optimizer.param_groups for p in group["params"]]
    before = [local_part(p.detach()).clone() for _, p in weights]
    statistics: dict[str, float] = {}
    yield statistics
    with torch.no_grad():
        statistics.update(_compared(weights, before))


def _compared(weights: list[tuple[str, Tensor]], before: list[Tensor]) -> dict[str, float]:
    squares = [_squares(local_part(p), old) for (_, p), old in zip(weights, before, strict=True)]
    params = [p for _, p in weights]
    sum_packed(squares, [Shards.of(p) for p in params], ["smn"] * len(params))
    statistics = {}
    for role in dict.fromkeys(role for role, _ in weights):
        of_role = [i for i, (weight_role, _) in enumerate(weights) if weight_role == role]
        device = squares[of_role[0]].device  # a model may be on several
        sums = torch.stack([squares[i].to(device) for i in of_role]).sum(0).tolist()
        count = max(sum(params[i].numel() for i in of_role), 1)
        update, weight = (total**0.5 for total in sums)
        statistics[f"{role}/weight_rms"] = weight / count**0.5
        statistics[f"{role}/update_rms"] = update / count**0.5
        statistics[f"{role}/update_to_weight"] = update / max(weight, 1e-12)
    return statistics


def _squares(weight: Tensor, before: Tensor) -> Tensor:
    """Return the sums of squares of the change of a weight and of the weight before it."""
    wide = at_least_float32(before)
    change = weight.detach().to(wide) - before
    norms = [torch.linalg.vector_norm(x, dtype=wide) for x in (change, before)]
    return torch.stack(norms).square()
