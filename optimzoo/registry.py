"""Registry of the optimizers by name, and the function that makes them."""

import difflib
import fnmatch
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, ParamsT

from optimzoo.core.group_rates import watch
from optimzoo.core.optimizer import RoleOptimizer
from optimzoo.core.rounded import Rounded
from optimzoo.flattened import refuse_flattened
from optimzoo.optimizers.adams import AdamS
from optimzoo.optimizers.apollo import APOLLO, APOLLOMini
from optimzoo.optimizers.fira import Fira
from optimzoo.optimizers.galore import GaLore
from optimzoo.optimizers.muon import Muon
from optimzoo.optimizers.natural_galore import NaturalGaLore
from optimzoo.optimizers.scale import SCALE
from optimzoo.optimizers.stable_spam import StableSPAM
from optimzoo.optimizers.swan import SWAN
from optimzoo.roles import param_groups


@dataclass(frozen=True)
class OptimInfo:
    """Record of one optimizer.

    Attributes:
        name: the name for :func:`create_optimizer`.
        make: the class.
        description: one line.
        source: paper or documentation.
        main_roles: the roles that train at `lr`; the rest train at `other_lr`.
        other_lr: the class's argument for `other_lr`; `None` sets the `lr` of those groups.
        state: state, as text for the tables.
        aliases: other names.
    """

    name: str
    make: Callable[..., Optimizer]
    description: str
    source: str
    main_roles: tuple[str, ...] = ("hidden",)
    other_lr: str | None = None
    state: str = ""
    aliases: tuple[str, ...] = ()


def _torch(name: str, cls: str, description: str, state: str) -> OptimInfo:
    source = f"torch.optim.{cls}"
    return OptimInfo(name, getattr(torch.optim, cls), description, source, state=state)


_INFOS = [
    OptimInfo(
        "scale",
        SCALE,
        "column-normalised SGD, momentum on the output head alone",
        "arXiv 2506.16659",
        state="1 x head",
    ),
    OptimInfo(
        "muon",
        Muon,
        "orthogonalised momentum on hidden weights, AdamW on the rest",
        "kellerjordan.github.io/posts/muon",
        other_lr="other_lr",
        state="1 x hidden + 2 x rest",
    ),
    OptimInfo(
        "natural_galore",
        NaturalGaLore,
        "GaLore on natural gradients (Woodbury)",
        "arXiv 2410.16029",
        state="low rank: (2 + s) r x longer side + r x shorter side; 2 x rest",
    ),
    OptimInfo(
        "galore",
        GaLore,
        "Adam in the gradient's leading subspace",
        "arXiv 2403.03507",
        state="low rank: 2 r x longer side + r x shorter side; 2 x rest",
    ),
    OptimInfo(
        "fira",
        Fira,
        "GaLore plus the scaled residual",
        "arXiv 2410.01623",
        state="low rank: 2 r x longer side + r x shorter side; 2 x rest",
    ),
    OptimInfo(
        "apollo",
        APOLLO,
        "Adam's channel scaling, estimated in a random subspace",
        "arXiv 2412.05270",
        state="low rank: 2 r x longer side; 2 x rest",
    ),
    OptimInfo(
        "apollo_mini",
        APOLLOMini,
        "APOLLO at rank 1 with one scale a tensor",
        "arXiv 2412.05270",
        state="2 x longer side; 2 x rest",
    ),
    OptimInfo(
        "swan",
        SWAN,
        "stateless row normalisation and whitening",
        "arXiv 2412.13148",
        state="none; 2 x rest",
    ),
    OptimInfo(
        "stable_spam",
        StableSPAM,
        "Adam with adaptive clipping and momentum reset",
        "arXiv 2502.17055",
        state="2 x",
    ),
    OptimInfo(
        "adams",
        AdamS,
        "CAST's Adam with a ramped L1 decay to N:M sparsity (not the others called AdamS)",
        "arXiv 2509.25996",
        state="2 x + 1 bit x hidden",
        aliases=("cast_adams",),
    ),
    _torch("sgd", "SGD", "stochastic gradient descent", "none (1 x with momentum)"),
    _torch("adamw", "AdamW", "Adam with decoupled weight decay", "2 x"),
    _torch("adam", "Adam", "adaptive moments", "2 x"),
    _torch("nadam", "NAdam", "Adam with Nesterov momentum", "2 x"),
    _torch("radam", "RAdam", "rectified Adam", "2 x"),
    _torch("adamax", "Adamax", "Adam with the infinity norm", "2 x"),
    _torch("adagrad", "Adagrad", "accumulated squared gradients", "1 x"),
    _torch("adadelta", "Adadelta", "running averages of squares of gradients and steps", "2 x"),
    _torch("rmsprop", "RMSprop", "running average of squared gradients", "1 x"),
    _torch("asgd", "ASGD", "averaged SGD", "1 x"),
    _torch("rprop", "Rprop", "sign-based steps, for full batches", "2 x"),
    _torch("adafactor", "Adafactor", "factored second moment", "rows + columns"),
]
_REGISTRY = {info.name: info for info in _INFOS}
_ALIASES = {alias: info.name for info in _INFOS for alias in info.aliases}


def list_optimizers(pattern: str = "*") -> list[str]:
    """Return the names that match a shell pattern, sorted: ``list_optimizers("ada*")``."""
    return sorted(name for name in _REGISTRY if fnmatch.fnmatch(name, pattern))


def get_info(name: str) -> OptimInfo:
    """Return the record of one optimizer.

    Raises:
        ValueError: an unknown name; the message has the nearest ones.
    """
    key = name.lower().replace("-", "_")
    key = _ALIASES.get(key, key)
    if key not in _REGISTRY:
        near = difflib.get_close_matches(key, [*_REGISTRY, *_ALIASES], n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "see list_optimizers()"
        raise ValueError(f"unknown optimizer {name!r}; {hint}")
    return _REGISTRY[key]


def hyperparameters(info: OptimInfo) -> list[str]:
    """Return the names of the hyperparameters that :func:`create_optimizer` takes for a method."""
    accepted = [p for p in inspect.signature(info.make).parameters if p != "params"]
    return accepted + _rounding_of_torch(accepted)


def _rounding_of_torch(accepted: list[str]) -> list[str]:
    return [] if "rounding" in accepted else ["rounding", "seed"]


def create_optimizer(
    name: str,
    model_or_params: nn.Module | ParamsT,
    *,
    lr: float | None = None,
    other_lr: float | None = None,
    **hyper: Any,
) -> Optimizer:
    """Make an optimizer by name.

    The vectors of a model (norms, biases) get no weight decay (:func:`optimzoo.param_groups`). Bare
    parameters decay as in torch.

    Args:
        name: one of :func:`list_optimizers`.
        model_or_params: a model (sorted by :func:`optimzoo.param_groups`), groups, or parameters.
        lr: learning rate of the hidden weights (`OptimInfo.main_roles`).
        other_lr: learning rate of the rest (SCALE's vectors, if `vector_lr` is given, take that);
            default: the method's own default, or `lr`.
        **hyper: the method's other hyperparameters; torch's optimizers take `rounding` and `seed`
            too, as ours do: rounded so they step weight by weight, with float32 state.

    Raises:
        ValueError: an unknown name or hyperparameter, one without a default that is missing
            (`adams` has two), `other_lr` for parameters without roles (Muon alone splits those by
            shape).
    """
    info = get_info(name)
    accepted = hyperparameters(info)
    for key in hyper:
        if key not in accepted:
            raise ValueError(
                f"{info.name} has no hyperparameter {key!r}; it takes {', '.join(accepted)}"
            )
    needed = [
        p.name
        for p in inspect.signature(info.make).parameters.values()
        if p.default is p.empty and p.kind is p.KEYWORD_ONLY and p.name not in hyper
    ]
    if needed:
        raise ValueError(f"{info.name} has no default for {' and '.join(needed)}; give it")
    if lr is not None:
        hyper["lr"] = lr
    groups: Any = model_or_params
    if isinstance(groups, nn.Module):
        groups = param_groups(groups)
    elif not isinstance(groups, torch.Tensor):  # copied, because torch writes into the groups
        groups = [dict(g) if isinstance(g, dict) else g for g in groups]
    if isinstance(groups, list):
        _refuse_flattened(groups)
    if other_lr is not None and info.other_lr is not None:
        hyper[info.other_lr] = other_lr
    elif other_lr is not None:
        if not all(isinstance(g, dict) and g.get("role") for g in groups):
            raise ValueError("other_lr needs roles; pass a model or optimzoo.param_groups(model)")
        own = {*info.main_roles, *(["vector"] if hyper.get("vector_lr") is not None else [])}
        groups = [g if g["role"] in own else {"lr": other_lr, **g} for g in groups]
    rounds = _rounding_of_torch(list(inspect.signature(info.make).parameters))
    rounding = {key: hyper.pop(key) for key in rounds if key in hyper}
    if rounding.get("rounding", "nearest") != "nearest":
        make: Any = info.make
        return Rounded(groups, make, hyper, **rounding)
    optimizer = info.make(groups, **hyper)
    if not isinstance(optimizer, RoleOptimizer):
        watch(optimizer)
    return optimizer


def _refuse_flattened(groups: list[Any]) -> None:
    """Refuse parameters of FSDP1 and DeepSpeed, for torch's optimizers too."""
    items: list[Any] = []
    for group in groups:
        params = group.get("params") if isinstance(group, dict) else group
        items += params if isinstance(params, list) else [params]
    pairs = [
        item if isinstance(item, tuple) else (f"parameter {i}", item)
        for i, item in enumerate(items)
    ]
    refuse_flattened([param for _, param in pairs], [str(name) for name, _ in pairs])
