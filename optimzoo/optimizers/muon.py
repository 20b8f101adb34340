"""Muon on the hidden weights, AdamW on the rest: torch's own two, behind one optimizer."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.optimizer import ParamsT

from optimzoo.core.optimizer import check_lr
from optimzoo.core.per_role import ByRole
from optimzoo.distributed import Shards, by_owners, local_part
from optimzoo.roles import ROLES
from optimzoo.subspace.newton_schulz import orthogonalize


class ShardedMuon(getattr(torch.optim, "Muon", object)):  # type: ignore[misc]
    """``torch.optim.Muon``, but for sharded weights and for weights on a CPU.

    Sharded, torch's own step sums Gram matrices that each process has rounded to bfloat16. Here
    momentum and decay stay with each process's part, and each weight is orthogonalised whole, by
    one of them. On a CPU torch orthogonalises in bfloat16 too: a CPU without its instructions takes
    a hundred times as long. Here it is float32 at least, the same iteration without that rounding.
    """

    param_groups: list[dict[str, Any]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:
            for group in groups:
                given = [p for p in group["params"] if p.grad is not None]
                ours = [p for p in given if p.device.type == "cpu" or Shards.of(p).cut()]
                known = {id(p) for p in ours}
                rest = [p for p in group["params"] if id(p) not in known]
                self.param_groups = [{**group, "params": rest}]
                super().step()
                self._step_ours(ours, group)
        finally:
            self.param_groups = groups
        return loss

    def _step_ours(self, params: list[Tensor], group: dict[str, Any]) -> None:
        updates = []
        for p in params:
            if p.grad.is_sparse:  # type: ignore[union-attr]
                raise RuntimeError("Muon does not support sparse gradients")
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            grad, mean = local_part(p.grad, like=p), local_part(state["momentum_buffer"])  # type: ignore[arg-type]
            mean.lerp_(grad.to(mean.dtype), 1 - group["momentum"])
            updates.append(grad.lerp(mean, group["momentum"]) if group["nesterov"] else mean)

        def orthogonal(update: Tensor) -> Tensor:
            """Where one step of torch's, of size 1 and without momentum, takes a weight of 0."""
            if update.device.type == "cpu":
                numbers = {"steps": group["ns_steps"], "eps": group["eps"]}
                numbers["coefficients"] = group["ns_coefficients"]
                return -_adjusted(update.shape, group) * orthogonalize(update, **numbers)
            names = ("nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
            alone = {
                **{k: group[k] for k in names},
                "lr": 1.0,
                "momentum": 0.0,
                "weight_decay": 0.0,
            }
            weight = torch.zeros_like(update)
            weight.grad = update
            torch.optim.Muon([weight], **alone).step()
            return weight

        lr = float(group["lr"])
        for i, step in by_owners(orthogonal, updates, [Shards.of(p) for p in params]):
            weight = local_part(params[i])
            weight.mul_(1 - lr * group["weight_decay"]).add_(step.to(weight.dtype), alpha=lr)


def _adjusted(shape: torch.Size, group: dict[str, Any]) -> float:
    """What torch multiplies a matrix's learning rate by."""
    if group["adjust_lr_fn"] == "match_rms_adamw":
        return 0.2 * math.sqrt(max(shape))
    return math.sqrt(max(1.0, shape[0] / shape[1]))


class Muon(ByRole):
    """``torch.optim.Muon`` for ``roles`` and ``torch.optim.AdamW`` for the others.

    State, in bytes a parameter: the weight's own size for Muon's roles, twice that for the others;
    under float16 weights in float32.

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
        other_weight_decay: AdamW's weight decay; vectors of `param_groups` have none.
        roles: the roles that Muon trains; the SCALE paper's memory table counts all three matrices.
        rounding: of weights of 16 bits: `nearest`, or `stochastic`, which has the unrounded result
            as its expectation and keeps the state in float32.
        seed: of stochastic rounding.

    Raises:
        ValueError: a weight of Muon's roles that is not 2-D; a hyperparameter out of range.
        RuntimeError: torch is older than 2.9, which has no Muon.

    On a CPU the Newton–Schulz iteration is in float32 at least, where torch's rounds to bfloat16.

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
        rounding: str = "nearest",
        seed: int = 0,
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
        rules = {r: (ShardedMuon, muon) if r in roles else (AdamW, adamw) for r in ROLES}
        super().__init__(params, rules, rounding=rounding, seed=seed)
