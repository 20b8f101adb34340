"""Roles of parameters: hidden weight, embedding, output head, or vector.

A memory-efficient optimizer treats these four differently, and sending a parameter to the wrong
rule is the most common mistake made with one. :func:`param_groups` sorts a model's parameters into
ordinary ``torch.optim`` groups that carry a ``role``; :func:`optimzoo.describe` shows them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from optimzoo.flattened import refuse_flat_weight, refuse_flattened, refuse_flattened_modules

ROLES = ("hidden", "embedding", "head", "vector")
MATRIX_ROLES = ("hidden", "embedding", "head")

Override = str | Mapping[str, Any]
Overrides = Mapping[str, Override] | Iterable[tuple[str, Override]]

# The last part of the module path of an output head, for models that do not name theirs by method
# (`get_output_embeddings`) or by shape (one output per row of the input embedding).
_HEAD_NAMES = re.compile(r"(^|\.)(lm_head|embed_out|unembed|output_layer|head|score|classifier)$")
_EMBEDDING_NAMES = re.compile(r"(embed|wpe|wte|pos_emb)", re.IGNORECASE)
# Tables that every step reads whole, or nearly: of positions, of kinds of tokens.
_POSITION_NAMES = re.compile(
    r"(^|[._])(wpe|pos|positions?|positional|token_type)([._]|$)|relative_attention_bias",
    re.IGNORECASE,
)
# Where `torch.nn.utils.parametrize` keeps the tensor of a module: PATH.parametrizations.TENSOR.
_PARAMETRIZED = re.compile(r"(?:^|\.)parametrizations\.([^.]+)\.original$")
# Layers whose weight is a matrix, or a stack or a table of rows.
_LAYERS = (nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)
# PEFT's adapters of an embedding, kept in dictionaries: rows of the table, and its A [rank, vocab].
_EMBEDDING_ADAPTER = re.compile(r"(^|\.)(lora_embedding_A|trainable_tokens_delta)(\.|$)")
# Vectors in spite of their two dimensions: biases of stacked experts, Mamba's A, scales of blocks.
_VECTOR_NAMES = re.compile(r"(bias|A_log|^scale$)")


def param_groups(model: nn.Module, overrides: Overrides = ()) -> list[dict[str, Any]]:
    """Sort the trainable parameters of ``model`` into groups by role.

    Roles, found by module type first and by name second:

    - ``embedding``: weights of ``nn.Embedding``, shape ``[vocab, d]``, and PEFT's adapters of one;
    - ``head``: the weight of the output layer, shape ``[vocab, d]``. A head tied to the embedding
      is one parameter (found by identity); its role is ``head``;
    - ``hidden``: every other parameter of two dimensions and up;
    - ``vector``: the rest (norms and biases of any shape, a lone row such as a class token), and
      parameters their model marks ``_no_weight_decay``.

    A weight under ``torch.nn.utils.parametrize`` keeps its role.

    Vectors get ``weight_decay=0``, as in nanoGPT, timm and Hugging Face's ``Trainer``, unless an
    override gives them another. The other groups take the optimizer's.

    Every group also says how its weights lie: ``transposed`` for ``[in, out]`` (GPT-2's Conv1D) and
    for an embedding ``[d, vocab]``, ``stacked`` for ``[n, out, in]`` (mixture-of-experts weights;
    each slice is one matrix).

    Args:
        model: any module; wrappers of DDP and ``torch.compile`` are looked through.
        overrides: ordered ``{regex: role}`` or ``{regex: {"role": ..., "lr": ..., ...}}``. The
            regex is searched in the parameter's name (in each name, if it is tied); the first that
            matches wins; options other than ``role`` become options of the group.

    Returns:
        Groups with ``params``, ``param_names``, ``role``, ``transposed``, ``stacked``, ``tied``
        (vectors: ``weight_decay`` too), for any torch optimizer. Every trainable parameter is in
        exactly one of them.

    Raises:
        ValueError: a pattern that matches no trainable parameter, an unknown role, a model
            without trainable parameters, or with weights that FSDP1 or DeepSpeed has flattened.
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"param_groups takes the model, whose names and modules say the roles, not a "
            f"{type(model).__name__} of parameters"
        )
    refuse_flattened_modules(model)
    rules = _compile(overrides)
    names = _names(model)
    refuse_flattened(names, [aliases[0] for aliases in names.values()])
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter; "
            "set requires_grad before building the groups"
        )
    facts_by_param = _find_roles(model)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    used: set[int] = set()
    for param, aliases in names.items():
        group, order = dict(facts_by_param[param]), -1
        for i, (pattern, options) in enumerate(rules):
            if any(pattern.search(name) for name in aliases):
                if options.get("role") == "embedding":  # [in, out] is how an embedding lies
                    group["transposed"] = False
                group, order = {**group, **options}, i
                used.add(i)
                break
        if group["role"] == "vector":
            group.setdefault("weight_decay", 0.0)
        key = (ROLES.index(group["role"]), group["transposed"], group["stacked"], order)
        group = groups.setdefault(key, {"params": [], "param_names": [], **group})
        group["params"].append(param)
        group["param_names"].append(aliases[0])
    for i, (pattern, _) in enumerate(rules):
        if i not in used:
            raise ValueError(
                f"override {pattern.pattern!r} decides no trainable parameter: it matches none, or "
                f"an earlier one took them all; a name looks like {next(iter(names.values()))[0]!r}"
            )
    return [groups[key] for key in sorted(groups)]


def role_of(param: Tensor, group: Mapping[str, Any]) -> str:
    """Return the role of ``param`` in its group; by shape where the group has none."""
    return group.get("role") or ("hidden" if param.ndim >= 2 else "vector")


def matrix_view(tensor: Tensor, *, stacked: bool = False) -> Tensor:
    """View ``tensor`` as a matrix ``[out, -1]``, or as a stack of matrices ``[..., out, in]``."""
    return tensor if stacked or tensor.ndim == 2 else tensor.flatten(1)


def is_position_name(name: str) -> bool:
    """Return whether an embedding's name is that of positions or token types, not of tokens."""
    return bool(_POSITION_NAMES.search(name))


def input_dim(role: str, *, transposed: bool) -> int:
    """Return the dimension of a weight's inputs, along which a paper's column runs.

    ``nn.Linear`` and the head are ``[out, in]``; an ``nn.Embedding`` weight ``[vocab, d]`` is
    ``[in, out]``. Transposed, each is the other.
    """
    return -2 if transposed != (role == "embedding") else -1


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is `transformers`' Conv1D (GPT-2), whose weight is [in, out]."""
    names = {cls.__name__ for cls in type(module).__mro__}  # a parametrized one is a subclass
    return "Conv1D" in names and not isinstance(module, nn.Conv1d)


def weight_of(module: Any) -> nn.Parameter | None:
    """Return the parameter that is, or is behind, ``module.weight``; None if there is none."""
    if parametrize.is_parametrized(module, "weight"):
        return getattr(module.parametrizations.weight, "original", None)
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, nn.Parameter) else None


def _compile(overrides: Overrides) -> list[tuple[re.Pattern[str], dict[str, Any]]]:
    pairs = overrides.items() if isinstance(overrides, Mapping) else overrides
    rules = []
    for pattern, options in pairs:
        options = {"role": options} if isinstance(options, str) else dict(options)
        if "role" in options and options["role"] not in ROLES:
            raise ValueError(
                f"override {pattern!r} asks for the role {options['role']!r}; "
                f"the roles are {', '.join(ROLES)}"
            )
        try:
            rules.append((re.compile(pattern), options))
        except re.error as error:
            raise ValueError(f"override {pattern!r} is not a regular expression: {error}") from None
    return rules


def _unwrap(model: nn.Module) -> nn.Module:
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Return each trainable parameter with all its names, the checkpoint's own name first."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, param in _unwrap(model).named_parameters(remove_duplicate=False):
        if param.requires_grad:
            names.setdefault(param, []).append(name.replace("_orig_mod.", ""))
    return names


def _find_roles(model: nn.Module) -> dict[nn.Parameter, dict[str, Any]]:
    model = _unwrap(model)
    head = _find_head(model)
    facts_by_param: dict[nn.Parameter, dict[str, Any]] = {}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        for name, param in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            parametrized = _PARAMETRIZED.search(full)
            if parametrized:  # the weight of the module two levels up
                path = full[: parametrized.start()]
                module = modules[path]
                full = f"{path}.{parametrized[1]}" if path else parametrized[1]
            elif name == "weight" and (isinstance(module, _LAYERS) or is_conv1d(module)):
                refuse_flat_weight(full, param, module)
            facts = _facts(module, full, param)
            if param is head:
                facts["role"] = "head"
                facts["tied"] = facts["tied"] or isinstance(module, nn.Embedding)
            if param in facts_by_param:  # a second owner of a tied weight
                facts["tied"] |= facts_by_param[param]["tied"]
            facts_by_param[param] = facts
    return facts_by_param


def _facts(module: nn.Module, name: str, param: nn.Parameter) -> dict[str, Any]:
    facts = {"role": "hidden", "transposed": False, "stacked": False, "tied": False}
    own_name = name.rsplit(".", 1)[-1]
    if param.ndim < 2 or getattr(param, "_no_weight_decay", False):
        facts["role"] = "vector"
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        facts["role"] = "embedding"
    elif adapter := _EMBEDDING_ADAPTER.search(name):
        facts["role"] = "embedding"
        facts["transposed"] = adapter[2] == "lora_embedding_A"
    elif is_conv1d(module):
        facts["transposed"] = True
    elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        pass
    elif (
        isinstance(module, nn.LayerNorm | nn.RMSNorm)
        or _VECTOR_NAMES.search(own_name)
        or param.numel() == max(param.shape)  # one line, such as a class token [1, 1, d]
    ):
        facts["role"] = "vector"
    elif _EMBEDDING_NAMES.search(own_name):
        facts["role"] = "embedding"
        facts["stacked"] = param.ndim == 3  # [1, positions, d]
    elif param.ndim == 3:
        facts["stacked"] = True
        facts["transposed"] = bool(getattr(module, "is_transposed", False))
    return facts


def _find_head(model: nn.Module) -> nn.Parameter | None:
    named = getattr(model, "get_output_embeddings", None)
    weight = weight_of(named()) if callable(named) else None
    if weight is not None:
        return weight
    linears = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) or is_conv1d(module)
    ]
    tables = [
        module.num_embeddings
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and not is_position_name(path)
    ]
    vocabulary = max(tables, default=0)
    by_shape = [m for _, m in linears if getattr(m, "out_features", None) == vocabulary]
    by_name = [m for path, m in linears if _HEAD_NAMES.search(path)]
    candidates: Sequence[nn.Module] = [m for m in by_shape if m in by_name] or by_name or by_shape
    return weight_of(candidates[-1]) if candidates else None


def check_role(group: Mapping[str, Any], names: Sequence[str] = ()) -> None:
    """Refuse, at construction, a group that no role-aware optimizer can train."""
    role = group.get("role")
    if role is not None and role not in ROLES:
        raise ValueError(f"unknown role {role!r}; the roles are {', '.join(ROLES)}")
    refuse_flattened(group["params"], names)
    for i, param in enumerate(group["params"]):
        label = names[i] if i < len(names) else f"parameter {i}"
        if torch.is_complex(param):
            raise ValueError(f"complex parameters are not supported: {label} is {param.dtype}")
        if role in MATRIX_ROLES and param.ndim < 2:
            raise ValueError(
                f"{label} has shape {tuple(param.shape)}, but the role {role!r} needs two "
                "dimensions or more; give it the role 'vector'"
            )
