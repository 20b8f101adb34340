"""Conversion of a model's linear layers to low-rank ones in place, with an audit, and back."""

import copy
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from optimzoo.lowrank.layers import (
    FactoredLinear,
    LoRALinear,
    LowRankLinear,
    SparseLowRankLinear,
)
from optimzoo.lowrank.refactorize import factored_layers
from optimzoo.roles import is_conv1d, param_groups

KINDS: dict[str, type[FactoredLinear]] = {
    "low_rank": LowRankLinear,
    "sltrain": SparseLowRankLinear,
    "lora": LoRALinear,
}


@dataclass(frozen=True)
class Converted:
    """Record of one converted layer: its name, kind, shape and what it holds.

    Attributes:
        name: its name in the model.
        kind: a key of `KINDS`.
        shape: (out, in).
        rank: rank of the product.
        before: number of parameters of the dense layer.
        trained: number of trainable parameters now.
        held: number of all parameters now, the frozen ones included.
        bytes_before: bytes of the dense layer's parameters.
        bytes_held: bytes of the parameters and of the sparse part's positions now.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    rank: int
    before: int
    trained: int
    held: int
    bytes_before: int
    bytes_held: int


class Audit(list[Converted]):
    """Audit of :func:`convert`, one record per layer; as text, one line per shape and rank."""

    def __str__(self) -> str:
        by_shape: dict[tuple[Any, ...], list[Converted]] = {}
        for record in self:
            by_shape.setdefault((record.kind, record.shape, record.rank), []).append(record)
        lines = [f"{'layers':>6}  {'out x in':<15}{'rank':>6}{'parameters':>28}  example"]
        for (_, (rows, columns), rank), records in by_shape.items():
            counts = f"{_total(records, 'before'):,} -> {_total(records, 'held'):,}"
            shape = f"{rows} x {columns}"
            lines.append(f"{len(records):>6}  {shape:<15}{rank:>6}{counts:>28}  {records[0].name}")
        lines.append(
            f"{len(self)} layers to {self[0].kind}: {_total(self, 'before'):,} parameters -> "
            f"{_total(self, 'held'):,} ({_total(self, 'trained'):,} trained), "
            f"{_total(self, 'bytes_before'):,} bytes -> {_total(self, 'bytes_held'):,}"
        )
        return "\n".join(lines)


def _total(records: list[Converted], name: str) -> int:
    return sum(getattr(record, name) for record in records)


def convert(
    model: nn.Module,
    rank: int,
    kind: str = "low_rank",
    targets: str | None = None,
    *,
    sparsity: float = 0.03,
    alpha: float = 32.0,
    seed: int = 0,
) -> Audit:
    """Replace a model's hidden linear layers by low-rank ones, in place.

    Targets are the ``nn.Linear`` and the `transformers` ``Conv1D`` whose weight has the role
    ``hidden`` (:func:`optimzoo.param_groups`): never an embedding or the output head, and nothing
    that is frozen already. Names, biases and place in the model stay; a layer that is used at
    several places stays one layer.

    ``low_rank`` and ``sltrain`` are for training from the start: the dense weight is dropped, the
    new ones are drawn. ``lora`` keeps it, frozen. Make the optimizer afterwards: ``param_groups``
    gives the factors the role ``hidden`` (``vector`` at rank 1, where they are lines) and the
    values of a sparse part the role ``vector``.

    Args:
        model: any module.
        rank: rank r of every layer.
        kind: ``low_rank``, ``sltrain`` or ``lora``.
        targets: a regex, searched in the layers' names; default: all of them.
        sparsity: share of the entries that the sparse part has (``sltrain``).
        alpha: the scale of the product is alpha / r.
        seed: seed of the draws, which are made on the CPU in the order of the layers.

    Returns:
        The audit; print it.

    Raises:
        ValueError: nothing matched (with the nearest names), a layer that is converted already, a
            rank that a layer cannot have (named), two layers that share a weight. The model is
            unchanged then.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    options: dict[str, Any] = {"alpha": alpha}
    if kind == "sltrain":
        options["sparsity"] = sparsity
    chosen = _targets(model, targets)
    # All are made on meta first: an error in one is raised before any is replaced.
    new = {old: _on_meta(name, old, KINDS[kind], rank, options) for name, old in chosen.items()}
    generator = torch.Generator("cpu").manual_seed(seed)
    audit = Audit()
    for name, old in chosen.items():
        _fill(new[old], old, generator)
        audit.append(_record(name, kind, old, new[old]))
    _replace(model, new)
    return audit


@torch.no_grad()
def merge(model: nn.Module) -> int:
    """Replace every low-rank layer by the dense one it stands for, in place.

    The weight, s B A with the sparse or frozen part, is made in float32 (float64 stays) and cast
    to the factors' type. A converted ``Conv1D`` becomes one again.

    Returns:
        The number of layers.

    Raises:
        ValueError: the model has no low-rank layer, or is one itself.
    """
    layers = factored_layers(model)
    if "" in layers:
        name = type(model).__name__
        raise ValueError(f"{name} cannot replace itself; merge the module that holds it")
    _replace(model, {layer: _dense(layer) for layer in layers.values()})
    return len(layers)


def support_bytes(model: nn.Module) -> int:
    """Return the bytes of all sparse parts' positions, which are no parameters of the model."""
    layers = [m for m in model.modules() if isinstance(m, SparseLowRankLinear)]
    return sum(layer.indices.numel() * layer.indices.element_size() for layer in layers)


def _targets(model: nn.Module, pattern: str | None) -> dict[str, nn.Module]:
    groups = param_groups(model)
    hidden = {p for group in groups if group["role"] == "hidden" for p in group["params"]}
    linear: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        # Of a subclass with a forward of its own, W x is not what it computes.
        plain = is_conv1d(module) or (
            isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        )
        if plain and name and not parametrize.is_parametrized(module):
            linear |= {name: module} if module.weight in hidden else {}
    try:
        chosen = {n: m for n, m in linear.items() if re.search(pattern or "", n)}
    except re.error as error:
        raise ValueError(f"targets {pattern!r} is not a regular expression: {error}") from None
    names = [n for n, m in model.named_modules() if isinstance(m, FactoredLinear)]
    converted = [n for n in names if re.search(pattern or "", n)]
    if converted:
        raise ValueError(f"{converted[0]} is converted already; merge(model) first")
    if not chosen:
        near = difflib.get_close_matches(pattern or "", linear, n=3, cutoff=0.0)
        hint = f"near are {', '.join(near)}" if near else "it has no hidden linear layer"
        raise ValueError(f"targets {pattern!r} match no linear layer; {hint}")
    owners: dict[Any, str] = {}
    for name, module in linear.items():
        other = owners.setdefault(module.weight, name)
        if other != name and (name in chosen or other in chosen):
            raise ValueError(f"{other} and {name} share a weight; leave them out with targets")
    return chosen


def _on_meta(
    name: str, old: Any, cls: type[FactoredLinear], rank: int, options: dict[str, Any]
) -> FactoredLinear:
    rows, columns = _shape(old)
    place = {"device": "meta", "dtype": old.weight.dtype}
    try:
        return cls(columns, rows, rank, bias=old.bias is not None, **place, **options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _shape(layer: Any) -> tuple[int, int]:
    rows, columns = layer.weight.shape
    return (columns, rows) if is_conv1d(layer) else (rows, columns)


@torch.no_grad()
def _fill(layer: FactoredLinear, old: Any, generator: torch.Generator) -> None:
    """Allocate a layer on meta, and set its values and the old layer's bias."""
    weight: Tensor = old.weight.detach()
    layer.bias = None  # the old one takes its place; and draws nothing
    layer.to_empty(device=weight.device)
    layer.reset_parameters(generator)
    layer.bias = old.bias
    layer.was_conv1d = is_conv1d(old)
    if isinstance(layer, LoRALinear):
        layer.frozen.copy_(weight.mT if layer.was_conv1d else weight)
    layer.train(old.training)


def _replace(model: nn.Module, new: Mapping[Any, nn.Module]) -> None:
    """Put each new module wherever its old one is used."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new[module])


def _record(name: str, kind: str, old: nn.Module, layer: FactoredLinear) -> Converted:
    before, after = list(old.parameters()), list(layer.parameters())
    return Converted(
        name,
        kind,
        (layer.out_features, layer.in_features),
        layer.rank,
        before=sum(p.numel() for p in before),
        trained=sum(p.numel() for p in after if p.requires_grad),
        held=sum(p.numel() for p in after),
        bytes_before=sum(p.numel() * p.element_size() for p in before),
        bytes_held=sum(p.numel() * p.element_size() for p in after) + support_bytes(layer),
    )


def _dense(layer: FactoredLinear) -> nn.Module:
    """Return the ``nn.Linear`` or ``Conv1D`` with the layer's weight and the same bias object."""
    exact = torch.promote_types(layer.A.dtype, torch.float32)
    weight = copy.deepcopy(layer).to(exact).weight.to(layer.A.dtype)
    dense: Any = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    if layer.was_conv1d:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            dense = Conv1D(layer.out_features, layer.in_features)
        weight = weight.mT.contiguous()
    dense.weight = nn.Parameter(weight)
    dense.bias = layer.bias
    return dense.train(layer.training)
