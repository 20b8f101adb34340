"""Optimizers with a rule of their own for the hidden weights; Adam trains the rest."""

import math
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optimzoo.core.adam import (
    adam_step,
    bias_correction,
    init_adam_state,
    max_direction,
    step_as_tensor,
)
from optimzoo.core.optimizer import RoleOptimizer, scalar_lr
from optimzoo.core.role_options import SharedOptions
from optimzoo.core.validation import (
    check_betas,
    check_lr,
    check_nonnegative,
    check_rounding,
    check_state_bits,
)
from optimzoo.distributed import Shards, local_part
from optimzoo.kernels import dispatch
from optimzoo.lowbit import Counter, moment_dtype, opened, stand_in, widened
from optimzoo.roles import matrix_view, role_of

State = MutableMapping[str, Any]
REST_DEFAULTS: dict[str, Any] = {
    "role": None,
    "transposed": False,
    "stacked": False,
    # torch adds this default on a load; there from the start, a load leaves the groups alike.
    "differentiable": False,
}


class HiddenRule(RoleOptimizer):
    """Base of the matrix methods: a subclass says how one hidden weight is stepped.

    Subclasses define :meth:`_step_hidden` and list their own options' checks in
    :meth:`_check_options`. Groups hold `lr`, `betas`, `eps`, `weight_decay`, `maximize`, `foreach`,
    `rounding`, `seed` and `state_bits`.
    """

    _eps_before: ClassVar[bool] = True  # the others' Adam adds eps before the bias correction

    _options: ClassVar[type] = SharedOptions

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], **options: Unpack[SharedOptions]
    ) -> None:
        shared: dict[str, Any] = {"maximize": False, "foreach": None, "rounding": "nearest"}
        shared |= {"seed": 0, "state_bits": None}
        others: dict[str, Any] = dict(options)
        given = {name: others.pop(name, None) for name in shared}
        shared |= {name: value for name, value in given.items() if value is not None}
        super().__init__(params, {**shared, **REST_DEFAULTS, **defaults}, **others)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, its options checked."""
        group = dict(param_group) if isinstance(param_group, dict) else param_group
        if isinstance(group, dict):
            group = self._with_role_options(group)
            options = {**self.defaults, **group}
            check_lr(options["lr"])
            check_betas(options["betas"])
            check_nonnegative(eps=options["eps"], weight_decay=options["weight_decay"])
            check_rounding(options)
            check_state_bits(options["state_bits"])
            self._check_options(options)
        super().add_param_group(group)

    def _check_options(self, options: dict[str, Any]) -> None:
        """Refuse the subclass's own options where they are out of range."""

    def _letters(self, group: dict[str, Any], shape: torch.Size) -> dict[str, str]:
        """Which dimensions of state tensors are those of a weight (see `Shards.hold`)."""
        return {}

    def _step_hidden(
        self,
        weight: Tensor,
        grad: Tensor,
        state: State,
        group: dict[str, Any],
        index: int,
        shards: Shards,
    ) -> None:
        """Step one hidden weight by the method's rule; ``grad`` is a matrix ``[..., m, n]``.

        Of a sharded weight they are what this process has; ``shards`` knows the rest.
        """
        raise NotImplementedError

    def _step_matrices(
        self,
        params: list[tuple[int, Tensor]],
        group: dict[str, Any],
        counters: dict[Tensor, Counter],
    ) -> None:
        """Step each weight, or this process's shard of it, by :meth:`_step_hidden`."""
        for index, p in params:
            weight, grad, shards = self._matrix(p, group)
            letters = self._letters(group, shards.shape(grad.shape))
            counter = counters.get(p)
            with ExitStack() as stack:
                state = stack.enter_context(shards.opened(self.state[p], letters))
                if group["state_bits"] == 8:
                    self._refuse_cut_codes(p)
                    stack.enter_context(opened(state, 8, counter))
                wide = stack.enter_context(stand_in(weight, counter))
                self._step_hidden(wide, grad, state, group, index, shards)

    def _matrix(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor, Shards]:
        """Weight and gradient as matrices ``[..., m, n]``: what this process has of them."""
        layout = {key: bool(group[key]) for key in ("transposed", "stacked")}
        weight, grad = local_part(p), self._gradient(p, group)
        return oriented(weight, group), as_matrix(grad, group), Shards.of(p, **layout)

    def _gradient(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Return this process's part of the direction of descent, laid out as the weight is.

        A float16 gradient in float32: products of it, its ratios and its moments leave float16's
        range.
        """
        grad = local_part(p.grad, like=p)  # type: ignore[arg-type]
        grad = grad.float() if grad.dtype == torch.float16 else grad
        return -grad if group["maximize"] else grad

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for p in group["params"]:
                step_as_tensor(self.state.get(p, {}), p, capturable=False)

    def _update(self) -> None:
        first = self.first_index
        for group in self.param_groups:
            with dispatch.fused(group["fused"], local_params(group)):
                self._update_group(group, first)
            first += len(group["params"])

    def _update_group(self, group: dict[str, Any], first: int) -> None:
        hidden, rest = [], []
        counters = self._count(group, first)
        for index, p in enumerate(group["params"], start=first):
            if p.grad is None:
                continue
            self._refuse_sparse(p.grad)
            self.state[p]  # there even if empty: a distributed checkpoint asks for each
            if not self._is_own(p, group):
                self._init_rest(p, group)
                if group["state_bits"] == 8:  # one after the other: their moments are wide
                    t, betas = int(self.state[p]["step"]) + 1, group["betas"]
                    most = max_direction(t, betas) * bias_correction(t, betas)
                    with opened(self.state[p], 8, counters.get(p)):
                        self._step_rest([p], group, counters, max_update=most)
                else:
                    rest.append(p)
            elif p.numel() > 0:
                hidden.append((index, p))
        self._step_matrices(hidden, group, counters)
        self._step_rest(rest, group, counters)

    def _is_own(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Return whether the method's own rule steps a parameter, and not Adam."""
        return role_of(p, group) in self._own_roles

    def _init_rest(self, p: Tensor, group: dict[str, Any]) -> None:
        if group["state_bits"] == 8:
            self._refuse_cut_codes(p)
        init_adam_state(self.state[p], p, capturable=False, dtype=moment_dtype(p, group))

    def _step_rest(
        self,
        params: list[Tensor],
        group: dict[str, Any],
        counters: dict[Tensor, Counter],
        max_update: float | None = None,
    ) -> None:
        adam_step(
            params,
            self.state,
            lr=scalar_lr(group),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            foreach=group["foreach"],
            capturable=False,
            counters=[counters.get(p) for p in params],
            max_update=max_update,
            eps_before=self._eps_before,
        )


def local_params(group: dict[str, Any]) -> Iterator[Tensor]:
    """Yield this process's parts of the group's parameters that have a gradient."""
    return (local_part(p) for p in group["params"] if p.grad is not None and p.numel() > 0)


def oriented(tensor: Tensor, group: dict[str, Any]) -> Tensor:
    """Transpose a weight, or what is laid out like it, so that ``[out, in]`` comes last."""
    matrices = tensor.ndim == 2 or (tensor.ndim > 2 and group["stacked"])
    return tensor.mT if group["transposed"] and matrices else tensor


def as_matrix(tensor: Tensor, group: dict[str, Any]) -> Tensor:
    """View a weight, or what is laid out like it, as ``[..., out, in]``; vectors stay."""
    matrix = matrix_view(tensor, stacked=group["stacked"]) if tensor.ndim > 1 else tensor
    return oriented(matrix, group) if matrix.ndim == tensor.ndim else matrix


def count_step(state: State, param: Tensor) -> int:
    """Count one step in ``state`` and return its number, from 1."""
    if "step" not in state:
        state["step"] = 0
        step_as_tensor(state, param, capturable=False)
    state["step"] += 1
    return int(state["step"].item())


def adam_direction(state: State, grad: Tensor, group: dict[str, Any]) -> Tensor:
    """Update the moments in ``state`` with ``grad`` and return ``m / (√v + eps)``."""
    beta1, beta2 = group["betas"]
    if "exp_avg" not in state:
        dtype = moment_dtype(grad, group)
        state["exp_avg"] = torch.zeros_like(grad, dtype=dtype)
        state["exp_avg_sq"] = torch.zeros_like(grad, dtype=dtype)
    m, v = state["exp_avg"], state["exp_avg_sq"]
    most = max_direction(int(state["step"]), group["betas"]) if group["state_bits"] else math.inf
    direction = _fused_direction(m, v, grad, group, most)
    if direction is not None:
        return direction
    with widened([m], [v]) as ([mean], [square]):
        grad = grad.to(mean.dtype)
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        direction = mean / (square.sqrt() + group["eps"])
    if most != math.inf:
        direction.clamp_(-most, most)
    return direction.to(m.dtype)


def _fused_direction(
    m: Tensor, v: Tensor, grad: Tensor, group: dict[str, Any], most: float
) -> Tensor | None:
    kernels = dispatch.backend(grad.device.type)
    if kernels is None:
        return None
    grad = grad.contiguous()
    direction = torch.empty_like(grad, dtype=m.dtype)
    if not dispatch.takes(dispatch.vector(direction, grad, m, v)):
        return None
    rule = {"lr": 0.0, "weight_decay": 0.0, "maximize": False, "eps_before": True}
    rule |= {"betas": group["betas"], "eps": group["eps"], "direction": True}
    rule["max_update"] = most
    kernels.adam_([direction], [grad], [m], [v], [None], **rule)
    return direction


def subtract_(weight: Tensor, update: Tensor, *, size: float, keep: float) -> None:
    """Set ``W ← keep · W − size · U``, rounded once where the weight is of low precision."""
    update = update.reshape(weight.shape)
    if keep != 1.0:
        wide = torch.promote_types(weight.dtype, torch.float32)
        update = update.to(wide) * size + weight.to(wide) * (1.0 - keep)
        weight.sub_(update)
    else:
        weight.sub_(update, alpha=size)
