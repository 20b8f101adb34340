"""The zoo's methods on a small Llama, or on one weight."""

import io

import torch
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
    param_groups,
)
from optimzoo.models.llama import Llama, LlamaConfig

LOW = {"rank": 5, "update_proj_gap": 4}
METHODS = {
    "galore": (GaLore, {**LOW, "lr": 0.02, "scale": 1.0}),
    "natural_galore": (NaturalGaLore, {**LOW, "lr": 0.02, "scale": 1.0, "history": 3}),
    "fira": (Fira, {**LOW, "lr": 0.02}),
    "apollo": (APOLLO, {**LOW, "lr": 0.02}),
    "apollo_mini": (APOLLOMini, {"update_proj_gap": 4, "lr": 0.01}),
    "swan": (SWAN, {"lr": 0.005}),
    "sinkgd": (SinkGD, {"lr": 0.005, "alpha": 1.0}),
    "stable_spam": (StableSPAM, {"update_proj_gap": 10, "lr": 0.01}),
    "muon": (Muon, {"lr": 0.01, "other_lr": 0.01}),
    "rmnp": (RMNP, {"lr": 0.01, "other_lr": 0.01}),
}


def llama(dtype=torch.float32, tied=False):
    return Llama(LlamaConfig(97, 24, 37, 2, 2, tie_word_embeddings=tied), seed=3).to(dtype)


def make(name, model, **hyper):
    cls, own = METHODS[name]
    groups = param_groups(model) if isinstance(model, nn.Module) else model
    return cls(groups, **{**own, **hyper})


def train(model, optimizer, steps):
    tokens = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def reloaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def one_weight(name, start, **hyper):
    """A hidden weight of its own, and its optimizer."""
    weight = nn.Parameter(start.clone())
    layout = {k: hyper.pop(k) for k in ("stacked", "transposed") if k in hyper}
    return weight, make(name, [{"params": [weight], "role": "hidden", **layout}], **hyper)
