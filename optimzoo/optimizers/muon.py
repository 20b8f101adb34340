"""Muon on the hidden weights, AdamW on the rest: torch's own two, behind one optimizer."""

from typing import Any

import torch
from torch.optim import AdamW
from torch.optim.optimizer import ParamsT

from optimzoo.optimizers.base import check_lr
from optimzoo.optimizers.by_role import ByRole
from optimzoo.roles import ROLES


class Muon(ByRole):
    """``torch.optim.Muon`` for ``roles`` and ``torch.optim.AdamW`` for the others.

    State, in bytes a parameter: the weight's own size for Muon's roles, twice that for the others.

    Args:
        params: groups from :func:`optimzoo.param_groups`, or bare parameters (split by shape).
        lr: Muon's learning rate.
        momentum: Muon's momentum.
        weight_decay: Muon's decoupled weight decay.
        nesterov: Nesterov momentum.
        ns_steps: Newton–Schulz iterations.
        adjust_lr_fn: `None` or `original` (× √max(1, rows/columns)), or `match_rms_adamw`.
        other_lr: AdamW's learning rate.
        other_betas: AdamW's betas.
        other_eps: AdamW's eps.
        other_weight_decay: AdamW's weight decay.
        roles: the roles that Muon trains; the SCALE paper's memory table counts all three matrices.

    Raises:
        ValueError: a weight of Muon's roles that is not 2-D; a hyperparameter out of range.
        RuntimeError: torch is older than 2.9, which has no Muon.

    Source: kellerjordan.github.io/posts/muon; the defaults of AdamW are those of its repository.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2e-2,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        other_lr: float = 3e-4,
        other_betas: tuple[float, float] = (0.9, 0.95),
        other_eps: float = 1e-10,
        other_weight_decay: float = 0.0,
        roles: tuple[str, ...] = ("hidden",),
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(f"torch {torch.__version__} has no Muon; install torch>=2.9")
        check_lr(other_lr, "other_lr")
        unknown = set(roles) - set(ROLES)
        if unknown:
            raise ValueError(f"unknown role {unknown.pop()!r}; the roles are {', '.join(ROLES)}")
        muon: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        adamw: dict[str, Any] = {
            "lr": other_lr,
            "betas": other_betas,
            "eps": other_eps,
            "weight_decay": other_weight_decay,
        }
        torch.optim.Muon([torch.zeros(1, 1)], **muon)  # torch checks the hyperparameters
        AdamW([torch.zeros(1)], **adamw)
        rules = {r: (torch.optim.Muon, muon) if r in roles else (AdamW, adamw) for r in ROLES}
        super().__init__(params, rules)
