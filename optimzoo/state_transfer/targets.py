"""What a new optimizer keeps of one parameter, and how old moments become that."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, _get_scalar_dtype

from optimzoo.core.adam import init_adam_state, step_as_tensor
from optimzoo.core.matrix_optimizer import MatrixOptimizer, as_matrix
from optimzoo.core.momentum_optimizer import MomentumOptimizer
from optimzoo.core.other_rules import OTHER_RULES
from optimzoo.core.rounded import Rounded
from optimzoo.distributed import Shards, local_part
from optimzoo.lowbit import at_least_float32, dequantized_moments, moment_dtype
from optimzoo.optimizers.adams import AdamS
from optimzoo.optimizers.scale import SCALE, has_momentum
from optimzoo.optimizers.stable_spam import StableSPAM, init_moments
from optimzoo.roles import role_of
from optimzoo.state_transfer.formats import Moments

TORCH = (torch.optim.Adam, torch.optim.AdamW, torch.optim.Muon, torch.optim.SGD)


@dataclass(frozen=True)
class Target:
    """State of one parameter as a first step finds it, and what its entries mean.

    Attributes:
        state: the state in the optimizer, with zeros.
        first: key of the first moment, "" where the rule has none.
        second: key of the second moment, `factors` for its means over rows and columns, or "".
        count: key of the count of the moments' steps, or "".
        betas: decay rates whose powers the rule divides the moments by.
        first_scale: what multiplies an average to give the rule's first moment.
        as_matrix: whether the moments are laid out as the rule's matrix, not as the parameter.
        normalized: whether the rule averages gradients that it has divided by their norm.
    """

    state: dict[str, Any]
    first: str = ""
    second: str = ""
    count: str = ""
    betas: tuple[float, float] | None = None
    first_scale: float = 1.0
    as_matrix: bool = False
    normalized: bool = False


def target_of(new: Optimizer, p: Tensor, group: dict[str, Any]) -> Target | str:
    """Create a parameter's state with zeros, or return why the rule has no use for moments."""
    if isinstance(new, SCALE):
        return _scale(new, p, group)
    if isinstance(new, AdamS):
        if group["sparse"] and role_of(p, group) == "hidden":
            return "AdamS counts its moments and its ramp in one, from the first step"
        return _adam(new.state[p], p, group, at_least_float32(p))
    if isinstance(new, MatrixOptimizer):
        return _matrix(new, p, group)
    if isinstance(new, Rounded):
        return _torch(new, new._make, p, group, at_least_float32(p))
    return _torch(new, type(new), p, group, p.dtype)


def _adam(state: dict[str, Any], p: Tensor, group: dict[str, Any], dtype: torch.dtype) -> Target:
    init_adam_state(state, p, capturable=group["capturable"], dtype=dtype)
    betas = group["other_betas" if "other_betas" in group else "betas"]
    return Target(state, "exp_avg", "exp_avg_sq", "step", betas)


def _scale(new: SCALE, p: Tensor, group: dict[str, Any]) -> Target | str:
    if role_of(p, group) == "vector":
        return _adam(new.state[p], p, group, at_least_float32(p))
    if not has_momentum(group):
        return "SCALE keeps no moments of it"
    new._init_average(new.state[p], p, group)
    return Target(new.state[p], "exp_avg")


def _matrix(new: MatrixOptimizer, p: Tensor, group: dict[str, Any]) -> Target | str:
    state, name = new.state[p], type(new).__name__
    if isinstance(new, StableSPAM):
        return _stable_spam(new, p, group)
    if new._is_own(p, group):
        if not isinstance(new, MomentumOptimizer):
            return f"{name}'s own rule has no use for moments of whole gradients"
        new.init_state(p, state, group)
        if "momentum_buffer" not in state:
            return "a momentum of low rank starts anew"
        return Target(state, "momentum_buffer")
    if group["other"] == "adam" or role_of(p, group) == "vector":
        new._init_other(p, group)
        return Target(state, "exp_avg", "exp_avg_sq", "step", group["betas"])
    OTHER_RULES[group["other"]].init_state(p, state, group)
    if group["other"] == "scale":
        return Target(state, "exp_avg") if state else "SCALE's rule keeps no moments of it"
    if hasattr(p, "device_mesh"):
        return "the factors of a sharded second moment start anew"
    state["step"] = 0
    step_as_tensor(state, p, capturable=group["capturable"])
    return Target(state, "", "factors", "step", group["betas"])


def _stable_spam(new: StableSPAM, p: Tensor, group: dict[str, Any]) -> Target:
    state, weight = new.state[p], as_matrix(local_part(p), group)
    for key in ("step", "moment_step"):
        state[key] = 0
        step_as_tensor(state, p, capturable=group["capturable"], key=key)
    shards = Shards.of(p, **_layout(group))
    dims = new.state_dims(group, shards.shape(weight.shape))
    with shards.local_state(state, dims) as local:
        init_moments(local, weight, moment_dtype(weight, group))
    keys = ("exp_avg", "exp_avg_sq", "moment_step")
    return Target(state, *keys, group["betas"], as_matrix=True, normalized=True)


def _torch(
    new: Optimizer, make: type[Optimizer], p: Tensor, group: dict[str, Any], dtype: torch.dtype
) -> Target | str:
    if issubclass(make, torch.optim.Adam):
        state, fused = new.state[p], bool(group["fused"])
        device = p.device if group["capturable"] or fused else "cpu"
        state["step"] = torch.zeros((), dtype=_get_scalar_dtype(is_fused=fused), device=device)
        keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        for key in keys if group["amsgrad"] else keys[:2]:
            state[key] = torch.zeros_like(p, dtype=dtype)
        return Target(state, "exp_avg", "exp_avg_sq", "step", group["betas"])
    if not group["momentum"]:
        return "SGD without momentum keeps no moments"
    scale = 1.0
    if issubclass(make, torch.optim.SGD):
        scale = (1 - group["dampening"]) / (1 - group["momentum"])
    new.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=dtype)
    return Target(new.state[p], "momentum_buffer", first_scale=scale)


def fill(target: Target, moments: Moments, p: Tensor, group: dict[str, Any]) -> list[str]:
    """Write old moments into the state; return how they were converted."""
    state, notes = target.state, []
    factors: list[Any] = [moments.first_scale * target.first_scale, 1.0]
    if abs(factors[0] - 1.0) < 1e-9 or not target.first:
        factors[0] = 1.0
    else:
        notes.append(f"times {factors[0]:.3g}: a sum and an average")
    if target.betas is not None and moments.betas is not None:
        ratios = [
            1.0 if old == new else (1 - new**moments.steps) / (1 - old**moments.steps)
            for old, new in zip(moments.betas, map(float, target.betas), strict=True)
        ]
        factors = [factor * ratio for factor, ratio in zip(factors, ratios, strict=True)]
        notes += ["rescaled for other betas"] * any(ratio != 1.0 for ratio in ratios)
    if target.normalized and not moments.stabilized:
        unit = 1 / _gradient_norm(target, moments, p, group)
        factors = [factors[0] * unit, factors[1] * unit.square()]
        notes.append("over the gradient's norm, which the rule divides by")
    if target.first and moments.first is not None:
        notes += _put(state[target.first], _laid_out(moments.first, target, group), factors[0])
    if target.second and moments.second is not None:
        second = _laid_out(moments.second, target, group)
        if target.second == "factors":
            second = as_matrix(second, group).to(at_least_float32(second)) * factors[1]
            state["row_var"], state["col_var"] = second.mean(-1), second.mean(-2)
            notes.append("means over rows and columns")
        else:
            notes += _put(state[target.second], second, factors[1])
        if "max_exp_avg_sq" in state:  # of AMSGrad; without one the moment is the largest yet
            largest = second if moments.largest is None else local_part(moments.largest)
            _put(state["max_exp_avg_sq"], largest, factors[1])
    if target.count:
        state[target.count].fill_(moments.steps)
    if group.get("state_bits") == 8:
        with dequantized_moments(state, 8, None):
            pass
        notes += ["to 8-bit codes"] * any(key.endswith("_codes") for key in state)
    return list(dict.fromkeys(notes))


def _put(place: Tensor, moment: Tensor, factor: Any) -> list[str]:
    """Copy a moment times a factor; return what became of it, if not the same numbers."""
    place = local_part(place)
    if not isinstance(factor, float) or factor != 1.0:
        moment = moment.to(at_least_float32(moment)) * factor
    place.copy_(moment)
    narrower = torch.promote_types(place.dtype, moment.dtype) != place.dtype
    return [f"rounded to {str(place.dtype).removeprefix('torch.')}"] * narrower


def _laid_out(moment: Tensor, target: Target, group: dict[str, Any]) -> Tensor:
    moment = local_part(moment)
    return as_matrix(moment, group) if target.as_matrix else moment


def _layout(group: Mapping[str, Any]) -> dict[str, bool]:
    return {key: bool(group.get(key)) for key in ("transposed", "stacked")}


def _gradient_norm(target: Target, moments: Moments, p: Tensor, group: dict[str, Any]) -> Tensor:
    """Return the root mean square of the gradient's norm, ``√Σ v̂``, of each matrix of a stack."""
    assert moments.second is not None
    squares = _laid_out(moments.second, target, group).to(at_least_float32(p))
    if target.as_matrix:
        shards = Shards.of(p, **_layout(group))
        stack = squares.ndim > 2
        total = squares.sum((-2, -1), keepdim=True) if stack else squares.sum()
        shards.sum_([total], "mn")
    else:
        total = squares.sum()
        Shards.of(p).sum_([total], "smn")
    if moments.betas is not None:
        total = total / (1 - moments.betas[1] ** moments.steps)
    return total.clamp_min(torch.finfo(total.dtype).tiny).sqrt()
