"""Options of every method for small models, with which a loss falls within a few steps."""

from typing import Any

SUBSPACE = {"rank": 4, "update_proj_gap": 4}
TOY: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.01},
    "sgd": {"lr": 0.1, "momentum": 0.9},
    "scale": {"lr": 0.01, "other_lr": 0.02},
    "muon": {"lr": 0.01, "other_lr": 0.01},
    "rmnp": {"lr": 0.01, "other_lr": 0.01},
    "galore": {**SUBSPACE, "lr": 0.02, "scale": 1.0},
    "natural_galore": {**SUBSPACE, "lr": 0.02, "scale": 1.0, "history": 3},
    "fira": {**SUBSPACE, "lr": 0.02},
    "apollo": {**SUBSPACE, "lr": 0.02},
    "apollo_mini": {"lr": 0.005, "update_proj_gap": 4},
    "swan": {"lr": 0.005},
    "sinkgd": {"lr": 0.005, "alpha": 1.0},
    "stable_spam": {"lr": 0.01, "update_proj_gap": 4},
    "adams": {"lr": 0.005, "l1": 0.1, "total_steps": 15, "mask_every": 4},
}
MATRIX_METHODS = [name for name in TOY if name not in ("adamw", "sgd", "scale", "adams")]


def toy(name: str, *, rank: int = 4, gap: int = 4, **changes: Any) -> dict[str, Any]:
    """Return a method's options.

    Args:
        name: of the method; torch's others have none of their own.
        rank: of a subspace, where the method has one.
        gap: steps between two refreshes, resets or masks, where the method has them.
        changes: other options.
    """
    own = TOY.get(name, {})
    given = {"rank": rank, "update_proj_gap": gap, "mask_every": gap}
    return own | {key: value for key, value in given.items() if key in own} | changes


def run_config(name: str, **given: Any) -> dict[str, Any]:
    """Return them as `RunConfig` takes them."""
    options = toy(name, **given)
    rates = {key: options.pop(key) for key in ("lr", "other_lr") if key in options}
    return {**rates, "hyper": options}
