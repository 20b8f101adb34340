"""GradientStabilizer: gradient norms replaced by a ratio of their moments (arXiv 2502.17055v3)."""

import math
from collections import defaultdict
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from optimzoo.core.validation import check_betas
from optimzoo.distributed import UNSHARDED, Shards, local_part, sum_packed
from optimzoo.flattened import refuse_flattened
from optimzoo.lowbit import LOW, at_least_float32

# Names in an optimizer's state; Stable-SPAM has its own `norm_avg`.
MOMENTS = ("grad_norm_avg", "grad_norm_avg_sq", "grad_norm_step")
AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


def stabilize(
    optimizer: AnyOptimizer, *, gamma1: float = 0.6, gamma2: float = 0.999, eps: float = 1e-12
) -> AnyOptimizer:
    """Attach a :class:`GradientStabilizer` to an optimizer and return that optimizer.

    Examples:
        >>> optimizer = optimzoo.stabilize(torch.optim.AdamW(model.parameters(), lr=1e-3))
    """
    GradientStabilizer(optimizer, gamma1=gamma1, gamma2=gamma2, eps=eps)
    return optimizer


class GradientStabilizer:
    r"""Replace each gradient's norm, before every step, by one that a spike cannot raise far.

    For each tensor's gradient, with ``t`` from 1 and a and b from 0::

        a ← γ₁ a + (1 − γ₁) ‖g‖,    â = a / (1 − γ₁ᵗ)
        b ← γ₂ b + (1 − γ₂) ‖g‖²,   b̂ = b / (1 − γ₂ᵗ)
        g ← g / ‖g‖ · â / (√b̂ + eps)

    The new norm is near 1 where norms are steady. At a spike, however high, it is below 15.9 at the
    defaults; b remembers the spike for several times 1 / (1 − γ₂) steps, in which norms are small.
    Methods whose step grows with the gradient (SGD) need another learning rate. The gradient may
    have been clipped before; weight decay comes after, in the optimizer, which may be any of this
    library, of torch or of others.

    A gradient of zero, or whose squared norm is not finite, stays as it is and does not count.

    State: three numbers a tensor (float32 at least), ``grad_norm_avg``, ``grad_norm_avg_sq`` and
    ``grad_norm_step``, in the optimizer's own state, so that its checkpoints have them. γ and eps
    are not saved. As hooks in torch, this is not part of a copy or a pickle of the optimizer.

    Args:
        optimizer: optimizer whose gradients are stabilized; it stays what it is.
        gamma1: decay rate of the norm's mean.
        gamma2: decay rate of the norm's second moment.
        eps: added to the root.

    Raises:
        TypeError: not a torch optimizer, or a wrapper around one.
        ValueError: LBFGS, ``differentiable=True``, an optimizer that is stabilized already,
            parameters of FSDP1 or DeepSpeed, an option out of range, a state that was loaded before
            into 16 bits.
        RuntimeError: a sparse gradient, at ``step``.

    Source: arXiv 2502.17055v3; formula, order and defaults are those of the authors' code,
    TianjinYellow/GradientStabilizer (v2 has 0.7 and 0.9). There the norm under FSDP is that of a
    shard, here of the whole gradient; and a factor beyond float16's range is no infinity here.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        gamma1: float = 0.6,
        gamma2: float = 0.999,
        eps: float = 1e-12,
    ) -> None:
        _check(optimizer)
        check_betas((gamma1,), "gamma1")
        check_betas((gamma2,), "gamma2")
        if not eps > 0:
            raise ValueError(f"Invalid eps value: {eps}; it must be > 0")
        for state in optimizer.state.values():
            if MOMENTS[0] in state and state[MOMENTS[0]].dtype in LOW:
                raise ValueError(
                    f"the norms in the state are in {state[MOMENTS[0]].dtype}, to which torch has "
                    "cast them; stabilize the optimizer before load_state_dict"
                )
        self.gamma1, self.gamma2, self.eps = gamma1, gamma2, eps
        self._fresh: dict[Tensor, dict[str, Tensor]] = {}
        self._loading: dict[str, Any] = {}
        self._handles = [
            optimizer.register_step_pre_hook(self.before_step),
            optimizer.register_step_post_hook(self.after_step),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    def remove(self) -> None:
        """Leave the optimizer's gradients as they are from now on."""
        for handle in self._handles:
            handle.remove()

    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Rescale the gradients, those of a closure after it has run."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._rescale(optimizer)
            return None

        def evaluate() -> Any:
            loss = closure()
            self._rescale(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], evaluate, *args[2:]), kwargs
        return args, {**kwargs, "closure": evaluate}

    def after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Move the moments of parameters seen for the first time into the optimizer's state.

        Before the step it would be too soon: an optimizer takes an empty state for its first step.
        """
        for param, moments in self._fresh.items():
            optimizer.state[param].update(moments)
        self._fresh = {}

    @torch.no_grad()
    def _rescale(self, optimizer: Optimizer) -> None:
        batches: dict[Any, list[Tensor]] = defaultdict(list)
        for param in chain.from_iterable(group["params"] for group in optimizer.param_groups):
            grad = param.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise RuntimeError(
                    "GradientStabilizer does not support sparse gradients; "
                    "build the embedding with sparse=False"
                )
            batches[grad.device, at_least_float32(grad).to_real()].append(param)
        for (_, dtype), params in batches.items():
            self._rescale_batch(optimizer, params, dtype)

    def _rescale_batch(
        self, optimizer: Optimizer, params: list[Tensor], dtype: torch.dtype
    ) -> None:
        """Rescale gradients of one device without a read by the host."""
        states = [self._moments(optimizer, p, dtype) for p in params]
        avg, avg_sq, step = (torch.stack([state[key] for state in states]) for key in MOMENTS)
        norm = _norms(params, dtype)
        # A GradScaler may leave unscaling, and the check for infinities, to a fused optimizer.
        if (scale := getattr(optimizer, "grad_scale", None)) is not None:
            norm = norm / scale.to(norm)
        counts = norm.square().isfinite() & (norm > 0)
        if (found_inf := getattr(optimizer, "found_inf", None)) is not None:
            counts &= found_inf.to(norm.device) == 0
        new = avg.lerp(norm, 1 - self.gamma1), avg_sq.lerp(norm.square(), 1 - self.gamma2), step + 1
        size = new[0] / _correction(self.gamma1, new[2])
        root = (new[1] / _correction(self.gamma2, new[2])).sqrt() + self.eps
        factor = torch.where(counts, size / root / norm, 1.0)
        for key, after, before in zip(MOMENTS, new, (avg, avg_sq, step), strict=True):
            values = torch.where(counts, after, before).unbind()
            torch._foreach_copy_([state[key] for state in states], values)
        grads = [_real(local_part(p.grad)) for p in params]  # type: ignore[arg-type]
        # Of one dimension a factor takes part in type promotion: 1 / ‖g‖ may leave float16's range.
        shaped = [f.view((1,) * g.ndim) for f, g in zip(factor.unbind(), grads, strict=True)]
        torch._foreach_mul_(grads, shaped)

    def _moments(
        self, optimizer: Optimizer, param: Tensor, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        state: dict[str, Tensor] = optimizer.state.get(param, {})
        if MOMENTS[0] in state:
            return state
        if param not in self._fresh:
            device = param.grad.device  # type: ignore[union-attr]
            zeros = {key: torch.zeros((), dtype=dtype, device=device) for key in MOMENTS}
            self._fresh[param] = zeros
        return self._fresh[param]

    def _before_load(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        self._loading, self._fresh = state_dict, {}

    def _after_load(self, optimizer: Optimizer) -> None:
        """Undo torch's cast of the moments to the parameters' dtype."""
        saved, self._loading = self._loading, {}
        ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
        params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        for number, param in zip(ids, params, strict=True):
            state = saved["state"].get(number, {})
            for key in MOMENTS:
                if key in state:
                    value = state[key].detach().to(param.device, copy=True)
                    optimizer.state[param][key] = value


def stabilizer_of(optimizer: Optimizer) -> GradientStabilizer | None:
    """Return the stabilizer that is attached to an optimizer, or None."""
    for hook in optimizer._optimizer_step_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, GradientStabilizer):
            return owner
    return None


def _check(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose gradients cannot be stabilized."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"stabilize takes a torch.optim.Optimizer, not {name}")
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise TypeError(f"{name} wraps an optimizer; stabilize that one before it is wrapped")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS compares gradients within a step: their sizes cannot be replaced")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError("differentiable=True: gradients are stabilized in place; leave it out")
    if stabilizer_of(optimizer) is not None:
        raise ValueError(f"this {name} is stabilized already; remove() that stabilizer first")
    for group in optimizer.param_groups:
        refuse_flattened(group["params"], group.get("param_names", ()))


def _norms(params: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the gradients' norms, over all shards, in one vector."""
    parts = [_real(local_part(p.grad, like=p)) for p in params]  # type: ignore[arg-type]
    norms = torch.stack(torch._foreach_norm(parts, 2, dtype=dtype))
    shards = [Shards.of(p) for p in params]
    if all(shard is UNSHARDED for shard in shards):
        return norms
    squares = norms.square().unbind()
    sum_packed(squares, shards, ["smn"] * len(params))
    return torch.stack(squares).sqrt()


def _real(grad: Tensor) -> Tensor:
    return torch.view_as_real(grad) if grad.is_complex() else grad


def _correction(gamma: float, step: Tensor) -> Tensor:
    """Return ``1 - gamma ** step``, to full precision in float32 too."""
    return -torch.expm1(step * (math.log(gamma) if gamma else -math.inf))
