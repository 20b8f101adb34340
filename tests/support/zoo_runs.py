"""The zoo beside its NumPy oracles: the same weights, gradients and schedule for both."""

import inspect
import math
from typing import Any

import numpy as np
import torch
from reference.muon_numpy import MuonReference, RmnpReference
from reference.natural_galore_numpy import NaturalGaLoreReference
from reference.spectral_numpy import SinkgdReference, StableSpamReference, SwanReference
from reference.subspace_numpy import ApolloReference, FiraReference, GaLoreReference
from torch import nn

from optimzoo import (
    APOLLO,
    RMNP,
    SWAN,
    APOLLOMini,
    Fira,
    GaLore,
    Muon,
    NaturalGaLore,
    SinkGD,
    StableSPAM,
)
from optimzoo.subspace.projector import gaussian

GAP, STEPS = 10, 31  # refreshes at 1, 11 and 21 of each weight's own steps

HIDDEN = {
    "tall": (12, 7),
    "wide": (7, 12),
    "square": (9, 9),
    "row": (1, 7),
    "column": (7, 1),
    "odd_tall": (129, 5),
    "odd_wide": (5, 129),
    "conv": (6, 2, 3, 2),
    "tall_stack": (3, 8, 5),
    "wide_stack": (2, 5, 8),
}
REST = {"embedding": (13, 6), "head": (13, 6), "vector": (7,), "scalar": ()}
ROLES = {"embedding": "embedding", "head": "head", "vector": "vector", "scalar": "vector"}
# Last, so that what is drawn for the others by their places stays.
SHAPES = {**HIDDEN, **REST, "depthwise": (6, 1, 4)}
HIDDEN["depthwise"] = SHAPES["depthwise"]
STACKS = frozenset({"tall_stack", "wide_stack"})

REFERENCES = {
    GaLore: GaLoreReference,
    NaturalGaLore: NaturalGaLoreReference,
    Fira: FiraReference,
    APOLLO: ApolloReference,
    APOLLOMini: ApolloReference,
    SWAN: SwanReference,
    SinkGD: SinkgdReference,
    StableSPAM: StableSpamReference,
    Muon: MuonReference,
    RMNP: RmnpReference,
}


def draw(*seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers that are exact in float32, so that every run starts from the same."""
    return np.asarray(np.random.default_rng(seed).normal(size=shape), dtype=np.float32)


def gradient(name: str, step: int) -> np.ndarray | None:
    """A steady part and noise, of a size that jumps; missing now and then, some at the start."""
    index = list(SHAPES).index(name)
    if (5 * step + 3 * index) % 11 == 0:
        return None
    shape = SHAPES[name]
    steady, noise = draw(index, shape=shape), draw(index, step + 1, shape=shape)
    return (steady + noise) * np.float32(2.0 ** (3 * math.sin(step)))


def schedule(step: int) -> float:
    """Warm-up, then a cosine."""
    return min((step + 1) / 5, 0.55 + 0.45 * math.cos(math.pi * step / STEPS))


def weights(dtype: torch.dtype, names: Any = SHAPES) -> dict[str, nn.Parameter]:
    start = {name: draw(99, i, shape=SHAPES[name]) for i, name in enumerate(SHAPES)}
    return {name: nn.Parameter(torch.tensor(start[name], dtype=dtype)) for name in names}


def groups(params: dict[str, nn.Parameter], other_lr: float) -> list[dict[str, Any]]:
    """One group for each layout of the hidden weights, and one for each of the other roles."""
    sorted_names: dict[tuple[str, bool], list[str]] = {}
    for name in params:
        sorted_names.setdefault((ROLES.get(name, "hidden"), name in STACKS), []).append(name)
    result = []
    for (role, stacked), names in sorted_names.items():
        group = {"params": [params[n] for n in names], "param_names": names, "role": role}
        rate = {} if role == "hidden" else {"lr": other_lr}
        result.append({**group, "stacked": stacked, **rate})
    return result


def state_bases(optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter]) -> Any:
    """What the oracle calls a basis: the one that the optimizer keeps for a weight or a slice."""

    def basis(key: str, step: int) -> Any:
        name, _, slice_ = key.partition("[")
        state = optimizer.state[params[name]]
        found = [state[k] for k in ("projector_left", "projector_right") if k in state]
        arrays = [(x[int(slice_[:-1])] if slice_ else x).double().numpy() for x in found]
        return tuple(arrays) if len(arrays) == 2 else arrays[0]

    return basis


def state_omega(optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter]) -> Any:
    """APOLLO's Omega, drawn from the seed that the optimizer keeps."""

    def omega(key: str, step: int) -> np.ndarray:
        param = params[key.partition("[")[0]]
        shape = param.shape[-2:] if "[" in key else (param.shape[0], param[0].numel())
        rank = optimizer.param_groups[0]["rank"]
        seed = int(optimizer.state[param]["projector_seed"])
        return gaussian(seed, min(shape), rank, param).double().numpy()

    return omega


def low_rank_start(columns: int, rank: int) -> np.ndarray:
    """What Muon's factors of its momentum start from."""
    return gaussian(0, columns, rank, torch.empty(0, dtype=torch.float64)).numpy()


def compare(
    make: Any,
    hyper: dict[str, Any],
    dtype: torch.dtype,
    *,
    names: Any = SHAPES,
    oracle: dict[str, Any] | None = None,
    lr: float = 0.01,
    other_lr: float = 0.02,
) -> tuple[dict[str, float], dict[str, float]]:
    """Run both: the largest distance between them as a part of the way gone, and that way.

    The way is the oracle's displacement since the start, at the end as a part of the weight.
    """
    params = weights(dtype, names)
    start = {n: p.detach().double().numpy().copy() for n, p in params.items()}
    optimizer = make(groups(params, other_lr), lr=lr, **hyper)
    ours = {
        "fused",
        "lr",
        "foreach",
        "capturable",
        "seed",
        "history_dtype",
        "rounding",
        "state_bits",
    }
    known = {*inspect.signature(make).parameters, *hyper, "maximize"} - ours
    options = {k: v for k, v in {**optimizer.defaults, **hyper}.items() if k in known}
    kind = options.pop("projector", None)
    if make in (GaLore, NaturalGaLore, Fira):
        options["kind"] = kind if kind in ("svd", "power") else "given"
        options["given"] = options["signs"] = state_bases(optimizer, params)
    elif make in (APOLLO, APOLLOMini):
        options["omega"] = state_omega(optimizer, params)
    elif make is Muon:
        options["start"] = low_rank_start
    reference = REFERENCES[make](
        start,
        set(names) & set(HIDDEN),
        stacked=STACKS & set(names),
        lr=lr,
        other_lr=other_lr,
        **{**options, **(oracle or {})},
    )
    worst, gone = dict.fromkeys(params, 0.0), {}
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step) * (lr if group["role"] == "hidden" else other_lr)
        grads = {name: gradient(name, step) for name in params}
        for name, p in params.items():
            g = grads[name]
            p.grad = None if g is None else torch.tensor(g, dtype=dtype)
        optimizer.step()
        given = {name: g for name, g in grads.items() if g is not None}
        reference.step(given, lr_factor=schedule(step))
        for name, p in params.items():
            expected = reference.params[name]
            distance = np.linalg.norm(p.detach().double().numpy() - expected)
            travelled = np.linalg.norm(expected - start[name])
            rounding = 1e-3 * np.linalg.norm(start[name])  # in float32 a small step has little else
            worst[name] = max(worst[name], float(distance / (travelled + rounding)))
            if step == STEPS - 1:
                gone[name] = float(travelled / np.linalg.norm(start[name]))
    return worst, gone
