"""The zoo's methods on a small Llama, or on one weight."""

import io

import torch
from torch import nn
from toy import MATRIX_METHODS, toy

from optimzoo import param_groups
from optimzoo.models.llama import Llama, LlamaConfig
from optimzoo.registry import get_info

METHODS = {name: (get_info(name).make, toy(name, rank=5)) for name in MATRIX_METHODS}


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
