"""Low-rank weights of a run, from `RunConfig.lowrank` and `optimzoo.lowrank`."""

from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from benchmarks.training.models import make_model
from optimzoo import param_groups
from optimzoo.lowrank import ReLoRA, Restarts, convert

_CONVERSION = ("rank", "kind", "alpha", "sparsity", "targets")
_CLOCKS: dict[str, type[Restarts] | type[ReLoRA]] = {"restarts": Restarts, "relora": ReLoRA}


def check(lowrank: Any) -> None:
    """Validate a value of `RunConfig.lowrank`.

    Raises:
        ValueError: not an object, an unknown key, no rank, or two kinds of restarts.
    """
    if not isinstance(lowrank, dict):
        raise ValueError(f"lowrank is {lowrank!r}; it must be an object, as {{'rank': 32}}")
    keys = (*_CONVERSION, *_CLOCKS, "freeze")
    for key in lowrank:
        if key not in keys:
            raise ValueError(f"lowrank has no key {key!r}; it takes {', '.join(keys)}")
    if lowrank and "rank" not in lowrank:
        raise ValueError("lowrank needs a rank")
    if all(key in lowrank for key in _CLOCKS):
        raise ValueError("lowrank takes restarts or relora, not both")


def convert_model(model: nn.Module, lowrank: dict[str, Any], seed: int) -> None:
    """Convert a model's hidden weights as `lowrank` says; an empty one changes nothing.

    With `freeze` the factors alone are trained.
    """
    if not lowrank:
        return
    options = {key: lowrank[key] for key in _CONVERSION if key in lowrank}
    convert(model, **options, seed=seed)
    for group in param_groups(model) if lowrank.get("freeze") else []:
        if group["role"] != "hidden":
            for p in group["params"]:
                p.requires_grad_(False)


def on_meta(name: str, lowrank: dict[str, Any] | None = None) -> nn.Module:
    """Return a run's model on the meta device, with low-rank hidden weights if asked for."""
    model = make_model(name, device="meta")
    convert_model(model, lowrank or {}, seed=0)
    return model


def make_restarts(
    model: nn.Module, optimizer: Optimizer, lowrank: dict[str, Any]
) -> Restarts | ReLoRA | None:
    """Create the restarts that `lowrank` asks for, or return None."""
    for key, cls in _CLOCKS.items():
        if key in lowrank:
            try:
                return cls(model, optimizer, **lowrank[key])
            except TypeError as error:
                raise ValueError(f"{key} {lowrank[key]} does not fit: {error}") from error
    return None
