"""Choice of the weights that become sparse, their groups, and CAST's weight scaling."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from optimzoo.roles import is_conv1d, param_groups, weight_of
from optimzoo.sparsity.masks import check_nm, grouped


class WeightScale(nn.Module):
    """``W[r, c] · A[r, c // (in / blocks)]``: a learnable factor for each block of a row's inputs.

    A parametrization of a weight ``[out, in]`` (`transposed`: ``[in, out]``). The blocks are
    contiguous, and ``A`` is ``[out, blocks]``, of ones at first.

    Source: arXiv 2509.25996, Eq. 11 and 12; how the paper cuts a row is ambiguous, contiguous
    blocks are our choice.
    """

    def __init__(self, weight: Tensor, blocks: int, *, transposed: bool = False) -> None:
        super().__init__()
        self.blocks, self.transposed = blocks, transposed
        rows = weight.shape[1 if transposed else 0]
        self.scale = nn.Parameter(weight.new_ones(rows, blocks))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the scaled weight."""
        if self.transposed:
            return (weight.unflatten(0, (self.blocks, -1)) * self.scale.mT[:, None]).flatten(0, 1)
        return (weight.unflatten(1, (self.blocks, -1)) * self.scale[:, :, None]).flatten(1)


def linear_targets(model: nn.Module, targets: str | None = None) -> dict[str, nn.Module]:
    """Return the linear layers (GPT-2's Conv1D too) that are to become sparse, by their path.

    Args:
        model: any module.
        targets: a regex, searched in the path; default: every hidden layer, so neither the
            embedding nor the output head.

    Raises:
        ValueError: no layer is found.
    """
    hidden = {p for g in param_groups(model) if g["role"] == "hidden" for p in g["params"]}
    layers = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) or is_conv1d(module):
            named = targets is not None and re.search(targets, path)
            if named or (targets is None and weight_of(module) in hidden):
                layers[path] = module
    if not layers:
        problem = (
            "no hidden linear layer" if targets is None else f"no linear layer like {targets!r}"
        )
        raise ValueError(f"{type(model).__name__} has {problem}; name them with targets='REGEX'")
    return layers


def sparse_groups(model: nn.Module, targets: str | None = None) -> list[dict[str, Any]]:
    """Return :func:`optimzoo.param_groups` with `sparse=True` for :func:`linear_targets`.

    Layers that ``targets`` names are hidden weights here, the output head too if it is named; the
    other hidden weights get `sparse=False`, so that :class:`optimzoo.AdamS` trains them with Adam.
    """
    chosen = {weight_of(m): m for m in linear_targets(model, targets).values()}
    result = []
    for group in param_groups(model):
        pairs = list(zip(group["params"], group["param_names"], strict=True))
        for sparse, role in ((True, "hidden"), (False, group["role"])):
            part = [(p, name) for p, name in pairs if (p in chosen) is sparse]
            if part:
                lists = {"params": [p for p, _ in part], "param_names": [name for _, name in part]}
                result.append({**group, "role": role, "sparse": sparse, **lists})
    return result


def prepare(
    model: nn.Module,
    n: int = 2,
    m: int = 4,
    *,
    scale_blocks: int = 2,
    targets: str | None = None,
) -> list[str]:
    """Make the target layers ready for CAST: check them, and add the learnable weight scaling.

    In place: each weight becomes a torch parametrization with a :class:`WeightScale`, which
    :func:`finalize` folds in. The model computes what it did. Build the optimizer afterwards.

    Args:
        model: any module.
        n: how many of m consecutive inputs will be kept.
        m: size of a group.
        scale_blocks: factors of a row; 0: no scaling. 2 in the paper's LLaMA runs.
        targets: see :func:`linear_targets`.

    Returns:
        The paths of the target layers.

    Raises:
        ValueError: no target; a target whose inputs are not a multiple of m or of the blocks, that
            is scaled already, or whose weight another layer has too. The model is then as it was.
    """
    check_nm(n, m)
    if scale_blocks < 0:
        raise ValueError(f"Invalid scale_blocks: {scale_blocks}; it must be >= 0 (0: no scaling)")
    layers = linear_targets(model, targets)
    for path, module in layers.items():
        weight, transposed = weight_of(module), is_conv1d(module)
        assert weight is not None
        try:
            inputs = grouped(weight, m, transposed=transposed).shape[1] * m
        except ValueError as error:
            raise ValueError(f"{path} {list(weight.shape)}: {error} (targets='REGEX')") from None
        if scale_blocks and inputs % scale_blocks:
            raise ValueError(f"{path} has {inputs} inputs, not a multiple of {scale_blocks} blocks")
        if scale_of(module) is not None:
            raise ValueError(f"{path} is scaled already; prepare a model once")
    if scale_blocks:
        _refuse_shared(model, layers)
    for module in layers.values() if scale_blocks else ():
        weight = weight_of(module)
        assert weight is not None
        scale = WeightScale(weight.detach(), scale_blocks, transposed=is_conv1d(module))
        parametrize.register_parametrization(module, "weight", scale)
    return list(layers)


def _refuse_shared(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse a target whose weight has a second owner: its factors would be folded into both."""
    names: dict[Tensor, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    for path, module in layers.items():
        owners = names[weight_of(module)]  # type: ignore[index]
        if len(owners) > 1:
            raise ValueError(
                f"{path} shares its weight ({', '.join(owners)}); leave it out with targets, or "
                "take scale_blocks=0"
            )


def scale_of(module: nn.Module) -> Tensor | None:
    """Return the factors of a layer that :func:`prepare` has scaled, else None."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    added: Any = module.parametrizations
    added = added.weight
    return next((part.scale for part in added if isinstance(part, WeightScale)), None)


@torch.no_grad()
def fold_scale(module: nn.Module) -> None:
    """Multiply a layer's factors into its weight, which becomes an ordinary parameter again."""
    if scale_of(module) is not None:
        # A deep copy shares the class that torch made for the module, and takes `weight` from it.
        shared = type(module)
        module.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
