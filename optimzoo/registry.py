"""Registry of the optimizers by name, and the function that makes them."""

import difflib
import fnmatch
import inspect
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, ParamsT

from optimzoo.core.group_rates import watch
from optimzoo.core.optimizer import RoleOptimizer
from optimzoo.core.record import RECORDS, OptimInfo, register
from optimzoo.core.role_options import (
    RENAMED,
    RoleOptions,
    RoleRates,
    check_role_options,
    with_role_options,
)
from optimzoo.core.rounded import Rounded
from optimzoo.flattened import refuse_flattened
from optimzoo.gradient_stabilizer import stabilize as stabilized
from optimzoo.optimizers import METHODS  # noqa: F401  (registers them)
from optimzoo.roles import ROLES, param_groups


def _torch(name: str, cls: str, description: str, state: str) -> None:
    register(name, description, source=f"torch.optim.{cls}", state=state)(getattr(torch.optim, cls))


_torch("sgd", "SGD", "stochastic gradient descent", "none (1 x with momentum)")
_torch("adamw", "AdamW", "Adam with decoupled weight decay", "2 x")
_torch("adam", "Adam", "adaptive moments", "2 x")
_torch("nadam", "NAdam", "Adam with Nesterov momentum", "2 x")
_torch("radam", "RAdam", "rectified Adam", "2 x")
_torch("adamax", "Adamax", "Adam with the infinity norm", "2 x")
_torch("adagrad", "Adagrad", "accumulated squared gradients", "1 x")
_torch("adadelta", "Adadelta", "running averages of squares of gradients and steps", "2 x")
_torch("rmsprop", "RMSprop", "running average of squared gradients", "1 x")
_torch("asgd", "ASGD", "averaged SGD", "1 x")
_torch("rprop", "Rprop", "sign-based steps, for full batches", "2 x")
_torch("adafactor", "Adafactor", "factored second moment", "rows + columns")
# What torch's own optimizers take beside their hyperparameters.
_ROUNDING = ("rounding", "seed")
_ALIASES = {alias: info.name for info in RECORDS.values() for alias in info.aliases}


def list_optimizers(pattern: str = "*") -> list[str]:
    """Return the names that match a shell pattern, sorted: ``list_optimizers("ada*")``."""
    return sorted(name for name in RECORDS if fnmatch.fnmatch(name, pattern))


def get_info(name: str) -> OptimInfo:
    """Return the record of one optimizer.

    Raises:
        ValueError: an unknown name; the message has the nearest ones.
    """
    key = name.lower().replace("-", "_")
    key = _ALIASES.get(key, key)
    if key not in RECORDS:
        near = difflib.get_close_matches(key, [*RECORDS, *_ALIASES], n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "see list_optimizers()"
        raise ValueError(f"unknown optimizer {name!r}; {hint}")
    return RECORDS[key]


def hyperparameters(info: OptimInfo) -> list[str]:
    """Return the names of the hyperparameters that :func:`create_optimizer` takes for a method."""
    accepted = [
        p.name
        for p in inspect.signature(info.make).parameters.values()
        if p.name != "params" and p.kind is not p.VAR_KEYWORD
    ]
    shared = getattr(info.make, "_options", RoleRates).__annotations__
    accepted += [name for name in shared if name not in accepted]
    return [*accepted, *(() if _is_ours(info) else _ROUNDING), "stabilize"]


def _is_ours(info: OptimInfo) -> bool:
    return isinstance(info.make, type) and issubclass(info.make, RoleOptimizer)


def create_optimizer(
    name: str,
    model_or_params: nn.Module | ParamsT,
    *,
    lr: float | None = None,
    stabilize: bool = False,
    **hyper: Any,
) -> Optimizer:
    """Make an optimizer by name.

    The vectors of a model (norms, biases) get no weight decay (:func:`optimzoo.param_groups`). Bare
    parameters decay as in torch.

    Args:
        name: one of :func:`list_optimizers`.
        model_or_params: a model (sorted by :func:`optimzoo.param_groups`), groups, or parameters.
        lr: learning rate; of the hidden weights, where `embedding_lr`, `head_lr`, `vector_lr` or
            `other_lr` (:class:`~optimzoo.core.role_options.RoleOptions`) name others.
        stabilize: whether :func:`optimzoo.stabilize` replaces the gradients' norms before each
            step.
        **hyper: the method's other hyperparameters; torch's optimizers take `embedding_lr`,
            `head_lr` and `vector_lr`, and `rounding` and `seed` too: rounded stochastically, they
            step weight by weight, with float32 state.

    Raises:
        ValueError: an unknown name or hyperparameter, one without a default that is missing
            (`adams` has two), a rate of a role for parameters without roles (Muon and RMNP split
            those by shape).
    """
    info = get_info(name)
    accepted = hyperparameters(info)
    for key in hyper:
        if key not in accepted:
            if key in RENAMED or key in RoleOptions.__annotations__:
                check_role_options(info.name, {key: hyper[key]}, ROLES)
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
    optimizer = _make(info, model_or_params, hyper)
    return stabilized(optimizer) if stabilize else optimizer


def _make(
    info: OptimInfo, model_or_params: nn.Module | ParamsT, hyper: dict[str, Any]
) -> Optimizer:
    """Make the optimizer, from hyperparameters that are known to be its own."""
    groups: Any = model_or_params
    if isinstance(groups, nn.Module):
        groups = param_groups(groups)
    elif not isinstance(groups, torch.Tensor):  # copied, because torch writes into the groups
        groups = [dict(g) if isinstance(g, dict) else g for g in groups]
    if _is_ours(info):
        instance: Optimizer = info.make(groups, **hyper)
        return instance
    for group in groups:
        style = group.get("weight_decay_style") if isinstance(group, dict) else None
        if style not in (None, "decoupled"):
            raise ValueError(f"weight_decay_style={style!r}: {info.name} is torch's; leave it out")
    rates = {key: hyper.pop(key, None) for key in RoleRates.__annotations__}
    rates = check_role_options(info.name, rates, ROLES)
    if rates:
        groups = [g if isinstance(g, dict) else {"params": [g]} for g in groups]
        groups = [with_role_options(group, rates, ROLES) for group in groups]
    rounding = {key: hyper.pop(key) for key in _ROUNDING if key in hyper}
    make: Any = info.make
    if rounding.get("rounding", "nearest") != "nearest":
        return Rounded(groups, make, hyper, **rounding)
    optimizer: Optimizer = make(groups, **hyper)
    for group in optimizer.param_groups:
        refuse_flattened(group["params"], group.get("param_names", ()))
    watch(optimizer)
    return optimizer
