"""All optimizers of the registry by name, and how tests make one."""

from optimzoo import create_optimizer, list_optimizers

NAMES = list_optimizers()
# What has no default, and a pattern that fits every shape.
REQUIRED = {"adams": {"l1": 1e-3, "total_steps": 100, "n": 1, "m": 1}}


def create(name, params, **hyper):
    return create_optimizer(name, params, **{**REQUIRED.get(name, {}), **hyper})


def others(rate):
    """A rate for each role but the hidden weights."""
    return dict.fromkeys(("embedding_lr", "head_lr", "vector_lr"), rate)
