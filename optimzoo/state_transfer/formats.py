"""Moments of a running optimizer's state, as torch, bitsandbytes and this library store them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimzoo.lowbit import STEP, dequantize

# Under this key bitsandbytes' `state_dict()` hides from FSDP what is not of the parameter's shape.
_WRAPPED = "__bnb_optimizer_quant_state__"
_FIRST, _SECOND = ("exp_avg", "momentum_buffer", "state1"), ("exp_avg_sq", "state2")
NORMALIZED = ("norm_avg_sq", "grad_norm_avg")  # of Stable-SPAM, of GradientStabilizer
KNOWN = {
    *("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"),
    # torch's others
    *("mu_product", "exp_inf", "sum", "square_avg", "grad_avg", "acc_delta", "prev", "step_size"),
    *("eta", "mu", "ax", "row_var", "col_var", "variance"),
    # this library's
    *(f"{key}_{part}" for key in ("exp_avg", "exp_avg_sq") for part in ("codes", "scale")),
    *("momentum_buffer_codes", "momentum_buffer_scale", "moment_step", "mask", STEP),
    *("momentum_left", "momentum_right"),
    *("projector_left", "projector_right", "projector_seed", "update_norm", "singular_vector"),
    *("history", "history_scale", "gram", "max_avg", "norm_avg", "norm_avg_sq"),
    *("grad_norm_avg", "grad_norm_avg_sq", "grad_norm_step"),
    # bitsandbytes'
    *("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2", "max1", "max2"),
    *("new_max1", "new_max2", "gnorm_vec", "unorm_vec"),
}
_CHUNK = 1 << 20  # elements at a time, a multiple of every block


@dataclass(frozen=True)
class Moments:
    """Moments of one parameter's gradient, of its shape.

    Attributes:
        steps: how many gradients they are of.
        betas: decay rates of the averages, None where the rule names none.
        first: average of the gradient, or, times `first_scale`, what becomes one; None: there is
            none that could be used.
        first_key: its name in the state.
        first_scale: what multiplies `first` to make it a sum with weights ``(1 − β) βⁱ``.
        second: average of the gradient's square, or None.
        second_key: its name in the state.
        largest: AMSGrad's maximum of `second`, or None.
        lacking: why `first` or `second` is None.
        decayed: whether the old weight decay was a part of the gradient.
        stabilized: whether the gradients had been divided by their norms.
        coded: whether they were stored as 8-bit codes.
    """

    steps: float = 0.0
    betas: tuple[float, float] | None = None
    first: Tensor | None = None
    first_key: str = ""
    first_scale: float = 1.0
    second: Tensor | None = None
    second_key: str = ""
    largest: Tensor | None = None
    lacking: str = ""
    decayed: bool = False
    stabilized: bool = False
    coded: bool = False


def unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter's state with what bitsandbytes wraps for FSDP beside the rest."""
    flat = {key: value for key, value in state.items() if key != _WRAPPED and value is not None}
    return {**flat, **state.get(_WRAPPED, {})}


def check_state(state: Mapping[str, Any], param: Tensor, name: str) -> None:
    """Refuse state of an unknown format, of another shape, or cut another way than its parameter.

    Raises:
        ValueError: see above.
    """
    for key in state:
        if key not in KNOWN:
            raise ValueError(
                f"unknown state {key!r} of {name}: adopt_state reads the formats of torch, "
                "bitsandbytes and optimzoo"
            )
    if any(key.startswith("projector_") for key in state) or "norm_avg_sq" in state:
        return  # laid out by the rule, not as the parameter
    for key in (*_FIRST, *_SECOND, *(f"{key}_codes" for key in (*_FIRST, *_SECOND))):
        value = state.get(key)
        if value is None:
            continue
        if value.shape != param.shape:
            raise ValueError(
                f"{key} of {name} is {list(value.shape)}, the parameter {list(param.shape)}: the "
                "state is of another model, or its parameters are in another order"
            )
        cuts = [_cut(tensor) for tensor in (value, param)]
        if cuts[0] != cuts[1]:
            layouts = [str(cut[1:]) if cut else "not sharded" for cut in cuts]
            raise ValueError(
                f"{key} of {name} is {layouts[0]}, the parameter {layouts[1]}: adopt from the "
                "optimizer of the sharded model itself"
            )


def _cut(tensor: Any) -> tuple[Any, ...]:
    return (tensor.device_mesh, *tensor.placements) if hasattr(tensor, "device_mesh") else ()


def read_moments(state: Mapping[str, Any], group: Mapping[str, Any]) -> Moments:
    """Return what a parameter's state says of its gradients, 8-bit codes in float32.

    Args:
        state: the parameter's, of :func:`unwrapped`.
        group: its group's options, which say how a `momentum_buffer` is averaged.
    """
    steps = float(state.get("step", 0))
    if not state:
        return Moments(lacking="no state: no gradient so far, or a rule without any")
    if "step" in state and steps == 0:
        return Moments(lacking="no step was counted so far")
    if any(key.startswith("projector_") for key in state):
        return Moments(lacking="the old moments are of low rank, in a subspace")
    if "momentum_left" in state:
        return Moments(lacking="the old momentum is of low rank, in factors")
    if "norm_avg_sq" in state:
        return Moments(lacking="the old moments are of Stable-SPAM's normalised gradients")
    key, scale, lacking = _first(state, group)
    second = next((k for k in _SECOND if {k, f"{k}_codes"} & state.keys()), "")
    if "mask" in state and second:
        second, lacking = "", "AdamS's second moment is of its modified first one"
    betas = group.get("other_betas", group.get("betas"))
    coupled = group.get("decoupled_weight_decay") is False or "dampening" in group
    return Moments(
        steps=steps,
        betas=None if betas is None else (float(betas[0]), float(betas[1])),
        first=_tensor(state, key) if key else None,
        first_key=key,
        first_scale=scale,
        second=_tensor(state, second) if second else None,
        second_key=second,
        largest=state.get("max_exp_avg_sq"),
        lacking=lacking or ("" if second else "there is no second moment"),
        decayed=coupled and bool(group.get("weight_decay")),
        stabilized="grad_norm_avg" in state,
        coded=any(f"{k}_codes" in state or f"absmax{k[-1]}" in state for k in (key, second) if k),
    )


def _first(state: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[str, float, str]:
    """Return the first moment's key and scale; or no key, and why there is none."""
    if {"exp_avg", "exp_avg_codes"} & state.keys():
        return "exp_avg", 1.0, ""
    if {"state1", "state2"} <= state.keys():
        return "state1", 1.0, ""
    if "state1" in state:
        return "", 1.0, "one state of bitsandbytes may be a mean or a square"
    if not {"momentum_buffer", "momentum_buffer_codes"} & state.keys():
        return "", 1.0, f"nothing is read of {', '.join(sorted(state))}"
    if "square_avg" in state:
        return "", 1.0, "RMSprop's momentum is of updates, not of gradients"
    if "adjust_lr_fn" in group:  # torch's Muon, this library's Muon and RMNP
        return "momentum_buffer", 1.0, ""
    if "dampening" not in group:
        return "", 1.0, "a momentum_buffer of an unknown rule may be a sum or a mean"
    if group["dampening"] >= 1:
        return "", 1.0, "with dampening=1 the momentum has the first gradient alone"
    scale = (1 - group["momentum"]) / (1 - group["dampening"])
    return "momentum_buffer", float(scale), ""


def _tensor(state: Mapping[str, Any], key: str) -> Tensor:
    """Return a moment in floating point."""
    if f"{key}_codes" in state:
        return dequantize(state[f"{key}_codes"], state[f"{key}_scale"])
    value: Tensor = state[key]
    if value.dtype != torch.uint8:
        return value
    number = key.removeprefix("state")
    if f"absmax{number}" not in state:
        raise ValueError(
            f"{key} has codes without absmax{number}: bitsandbytes' block_wise=False is not read"
        )
    return dequantize_blocks(value, state[f"qmap{number}"], state[f"absmax{number}"])


def dequantize_blocks(codes: Tensor, values: Tensor, absmax: Tensor) -> Tensor:
    """Return the float32 numbers of bitsandbytes' block-wise codes.

    Element ``i`` of a block ``b``, of the row-major elements, is ``values[codes[i]] · absmax[b]``.

    Args:
        codes: uint8, of the parameter's shape.
        values: 256 numbers, those of the codes.
        absmax: the largest magnitude of each block; as many as there are blocks, of 64 to 4,096
            elements (2,048 in older versions, 256 since).

    Raises:
        ValueError: a number of blocks that no such length gives.
    """
    count = codes.numel()
    lengths = [1 << i for i in range(12, 5, -1)]
    length = next((n for n in lengths if -(-count // n) == absmax.numel()), 0)
    if not length:
        raise ValueError(
            f"{absmax.numel()} blocks of {count} codes: none of bitsandbytes' block lengths, "
            f"{lengths[-1]} to {lengths[0]}, gives that"
        )
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    flat, result = codes.reshape(-1), out.view(-1)
    values, absmax = values.float().to(codes.device), absmax.float().to(codes.device)
    for at in range(0, count, _CHUNK):
        part = values[flat[at : at + _CHUNK].int()]
        scale = absmax[at // length :][: -(-part.numel() // length)].repeat_interleave(length)
        result[at : at + _CHUNK] = part * scale[: part.numel()]
    return out
