"""Pruning at the end of CAST: with the optimizer's last masks, scales folded, pattern checked."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from optimzoo.distributed import local_part
from optimzoo.sparsity.masks import is_nm, unpack
from optimzoo.sparsity.scaling import fold_scale

SMALL = 1e-2  # of a weight's norm: what CAST's ramp leaves to be cut is below it


@dataclass(frozen=True)
class MaskedWeight:
    """Weight with the mask that an optimizer keeps of it, both this process's shard."""

    name: str
    weight: Tensor
    mask: Tensor
    n: int
    m: int
    layout: dict[str, bool]


def masked_weights(model: nn.Module, optimizer: Optimizer) -> list[MaskedWeight]:
    """Return the weights of ``model`` that ``optimizer`` masks, with the masks of the last update.

    The optimizer may be any whose state has `mask` (see :func:`pack`) and whose groups have n and
    m; `transposed` and `stacked` are read where there are such options.

    Raises:
        ValueError: the optimizer has no masks, or a mask of a weight that the model does not have.
    """
    names = {p: name for name, p in model.named_parameters()}
    weights = []
    for group in optimizer.param_groups:
        layout = {k: bool(group.get(k, False)) for k in ("transposed", "stacked")}
        for p in group["params"]:
            bits = optimizer.state.get(p, {}).get("mask")
            if bits is None:
                continue
            if p not in names:
                shape = list(p.shape)
                raise ValueError(f"a masked weight {shape} is no parameter of this model")
            name = names[p].replace("parametrizations.weight.original", "weight")
            weight = local_part(p.detach())
            mask = unpack(local_part(bits), weight.shape)
            weights.append(MaskedWeight(name, weight, mask, group["n"], group["m"], layout))
    if not weights:
        raise ValueError(f"{type(optimizer).__name__} has no masks yet; take a step with AdamS")
    return weights


@torch.no_grad()
def finalize(model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
    """Prune ``model`` in place: set weights outside the last masks to 0, and fold the scales.

    Afterwards the model is made of ordinary parameters, its state dict is that of the dense model,
    and every masked weight is exactly n of m. The optimizer cannot go on: its state belongs to the
    weights before the folding.

    Warns once if more than 1 % of a weight's norm is cut: then the model is not the trained one.

    Returns:
        For each sparse weight, by name, the share of its norm that was cut: ``‖W_cut‖ / ‖W‖``; for
        a sharded weight, that of this process's shard.

    Raises:
        ValueError: see :func:`masked_weights`; the model is then as it was.
        RuntimeError: a weight that is not n of m in the end.
    """
    cut = {}
    for item in masked_weights(model, optimizer):
        cut[item.name] = _cut_share(item)
        item.weight.masked_fill_(~item.mask, 0)
    _warn_of_large(cut)
    for module in list(model.modules()):
        fold_scale(module)
    for item in masked_weights(model, optimizer):  # a folded weight is the same parameter object
        if not is_nm(item.weight, item.n, item.m, **item.layout):
            raise RuntimeError(f"{item.name} is not {item.n}:{item.m}; was it changed by a hook?")
    return cut


def _cut_share(item: MaskedWeight) -> float:
    dtype = torch.promote_types(item.weight.dtype, torch.float32)
    whole = torch.linalg.vector_norm(item.weight, dtype=dtype)
    return float(torch.linalg.vector_norm(item.weight[~item.mask], dtype=dtype) / (whole or 1.0))


def _warn_of_large(cut: dict[str, float]) -> None:
    worst = max(cut, key=lambda name: cut[name])
    large = sum(share > SMALL for share in cut.values())
    if large:
        warnings.warn(
            f"finalize sets weights to 0 that are not small: {cut[worst]:.1%} of the norm of "
            f"{worst}, and above {SMALL:.1%} in {large} of {len(cut)} weights; train to the end of "
            "the ramp, with a learning rate that falls to 0 and a sum of lr · ramp above the "
            "weights",
            stacklevel=4,
        )


def to_semi_structured(model: nn.Module) -> list[str]:
    """Convert the 2:4 layers of a finalized model, in place, to the format of sparse tensor cores.

    For inference, ``torch.sparse.to_sparse_semi_structured`` converts `nn.Linear` weights that are
    2:4 and of a shape and dtype (float16, bfloat16, int8) that torch supports.

    Returns:
        The paths of the layers.

    Raises:
        RuntimeError: a model that is not on a CUDA device; no layer that can be stored so.
    """
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.in_features % 4 == 0
        and is_nm(module.weight, 2, 4)
    }
    if not layers:
        raise RuntimeError(f"{type(model).__name__} has no 2:4 linear layer; finalize it first")
    devices = {module.weight.device.type for module in layers.values()}
    if devices != {"cuda"}:
        raise RuntimeError(
            f"2:4 layers on {' and '.join(sorted(devices))}: semi-structured weights need CUDA "
            "(compute capability 8.0 or newer); elsewhere a pruned model runs as a dense one"
        )
    from torch.sparse import to_sparse_semi_structured

    done = []
    for path, module in layers.items():
        try:
            weight = to_sparse_semi_structured(module.weight.detach())
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise RuntimeError(f"{path} {list(module.weight.shape)}: {reason}") from None
        module.weight = nn.Parameter(weight, requires_grad=False)
        done.append(path)
    return done
