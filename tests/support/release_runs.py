"""Training runs with and without optimizer-in-backward."""

import torch
from torch import nn
from toy import toy
from zoo_models import llama as zoo_llama

from optimzoo import create_optimizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATTERN = {"adams": {"n": 3, "m": 6}}  # groups of the weights' sizes


def llama(dtype=torch.float32):
    return zoo_llama(dtype).to(DEVICE)


def make(name, model, **hyper):
    return create_optimizer(
        name, model, **(toy(name, rank=5, lr=1e-3) | PATTERN.get(name, {}) | hyper)
    )


def tokens(step):
    draw = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(step))
    return draw.to(DEVICE)


def loss_of(model, step):
    batch = tokens(step)
    return model(batch[:, :-1], batch[:, 1:])


def train(model, optimizer, steps, *, clip=None, released=None, scheduler=None):
    """The norms that were clipped."""
    norms = []
    for step in steps:
        loss_of(model, step).backward()
        if clip and released is None:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        if clip and released is not None:
            norms.append(released.grad_norm.item())
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
    return norms


def assert_equal(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def distance(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(((p - q).norm() / p.norm()).item() for p, q in pairs)
