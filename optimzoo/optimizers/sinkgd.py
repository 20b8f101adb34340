"""SinkGD: stateless SGD with alternating row and column normalisation (arXiv 2502.06742)."""

import itertools
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optimzoo.core.matrix_optimizer import (
    MatrixOptimizer,
    kernel_items,
    step_lr,
)
from optimzoo.core.optimizer import options_of, signed_decay
from optimzoo.core.record import register
from optimzoo.core.role_options import SharedOptions
from optimzoo.core.rule import Context
from optimzoo.core.spectral_norm import KEY, divide_by_spectral_norm_
from optimzoo.core.update import Update
from optimzoo.distributed import UNSHARDED, Shards
from optimzoo.kernels import dispatch
from optimzoo.lowbit import RngKey
from optimzoo.stacks import State


@register(
    "sinkgd",
    "stateless normalisation of rows and columns in turn (Sinkhorn)",
    source="arXiv 2502.06742",
    state="none; 2 x rest",
)
class SinkGD(MatrixOptimizer):
    r"""Sinkhorn Gradient Descent (SinkGD).

    For a hidden weight ``W`` ``[m, n]`` with gradient ``G``, keeping nothing between steps::

        X ← G
        `iterations` times:
            X_i: ← √n X_i: / ‖X_i:‖      each row i
            X_:j ← √m X_:j / ‖X_:j‖      each column j
        W ← (1 − α η λ) W − α η X

    After a pass the squares of each column of X have the mean 1, so α η is the RMS of the update;
    those of each row tend to it. A matrix of one row or one column gives its signs. A row or a
    column of zeros stays zero.

    With `spectral_norm` X is divided by its largest singular value σ, so that α η is the spectral
    norm of the update at every width; else that is between α η √max(m, n) and α η √(m n).

    All other parameters (the embedding and the head among them, as in the paper) take Adam.

    State of a hidden weight: none; with `spectral_norm` `singular_vector`, min(m, n) numbers of
    float32 at least. The rest: two of their own size. A kernel, the CPU's or Triton's, steps all
    hidden weights of a group without a tensor of a weight's size; stochastic rounding of stacked or
    transposed weights, `spectral_norm` and sharded weights take the eager path.

    Args:
        params: groups from :func:`optimzoo.param_groups`; bare parameters fall back by shape.
        lr: η, one rate for all parameters unless others are given. A group may carry its own.
        betas: Adam's betas, for the rest.
        eps: Adam's eps (before the bias correction), for the rest. The normalisation has none.
        weight_decay: λ, decoupled, or cautious by `weight_decay_style`; of a hidden weight by its
            own rate α η.
        iterations: passes over rows and columns, L in the paper.
        alpha: α, what the learning rate of the hidden weights is multiplied by. With 1, `lr` is in
            the unit of the other methods.
        spectral_norm: divide X by an estimate of σ: two power iterations a step, from the vector
            where the last step stopped (:mod:`optimzoo.core.spectral_norm`). The estimate is at
            most σ, and a few percent below it once the vector follows. On the eager path alone.
        options: shared options, :class:`~optimzoo.core.role_options.SharedOptions`.

    Raises:
        ValueError: a hyperparameter out of range.
        RuntimeError: a sparse gradient, at `step`.

    Source: arXiv 2502.06742; a re-implementation, the authors published no code. `iterations`,
    `alpha` and `lr` are what other re-implementations (axolotl, Forgather) give as the paper's.
    Ours are `spectral_norm`, Adam's betas and eps, weight decay, float32 for 16-bit gradients, and
    the guard of zero rows and columns: a norm of zero divides nothing. Others clamp norms at 1e-8,
    with which small gradients are normalised otherwise.
    """

    counts_steps = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        iterations: int = 5,
        alpha: float = 0.05,
        spectral_norm: bool = False,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(params, options_of(locals()), **options)

    def _check_options(self, options: dict[str, Any]) -> None:
        if options["iterations"] < 1:
            raise ValueError(f"Invalid iterations: {options['iterations']}; it must be at least 1")
        if not options["alpha"] > 0:
            raise ValueError(f"Invalid alpha: {options['alpha']}; it must be > 0")

    def state_dims(self, group: dict[str, Any], shape: torch.Size) -> dict[str, str]:
        """Return that the vector of the spectral norm is whole, but for a stack's dimension."""
        return {KEY: "."}

    def scale_invariant(self, param: Tensor, group: dict[str, Any]) -> bool:
        """Return whether ``param``'s step is the same for every positive multiple of its gradient.

        It is for a hidden weight.
        """
        return self._is_own(param, group)

    def _step_matrices(
        self,
        params: list[tuple[int, Tensor]],
        group: dict[str, Any],
        rng_keys: dict[Tensor, RngKey],
    ) -> None:
        """Step what a kernel takes, all in one call, and the others by `direction`."""
        group = {**group, "lr": group["alpha"] * group["lr"]}
        items = [_kernel_items(p, group, rng_keys.get(p)) for _, p in params]
        calls, _ = dispatch.partition_by_backend(
            itertools.chain(*items), fused=None, choose=dispatch.sinkhorn_backend
        )
        for kernels, call in calls:
            weights, grads, *_, kinds, shapes = dispatch.to_argument_lists(call)
            kernels.sinkhorn_(
                *(weights, grads, kinds, shapes),
                lr=dispatch.lr_argument(step_lr(group), weights[0].device),
                weight_decay=signed_decay(group),
                **{key: group[key] for key in ("iterations", "maximize")},
                **dispatch.rounding(call),
            )
        others = [param for param, args in zip(params, items, strict=True) if not args]
        super()._step_matrices(others, group, rng_keys)

    def direction(
        self, grad: Tensor, state: State, group: dict[str, Any], context: Context
    ) -> Update:
        """Return the gradient with its rows and columns normalised."""
        update = sinkhorn(grad, group["iterations"], context.shards)
        if group["spectral_norm"]:
            divide_by_spectral_norm_(update, state, context.shards)
        return Update(update)


def _kernel_items(
    p: Tensor, group: dict[str, Any], rng_key: RngKey | None
) -> list[dispatch.TensorArgs]:
    """Return a weight's matrices as the kernel reads them; none if it takes another path."""
    if group["spectral_norm"] or dispatch.sinkhorn_backend(p.device.type) is None:
        return []
    return kernel_items(p, None, group, rng_key, split=True)


def sinkhorn(grad: Tensor, iterations: int, shards: Shards = UNSHARDED) -> Tensor:
    """Return ``X`` for gradients ``[..., m, n]``, in at least float32.

    Of a sharded gradient the squares of a sharded row or column are summed over the processes.
    """
    x = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
    smallest = torch.finfo(x.dtype).tiny
    *_, m, n = shards.shape(x.shape)
    for _ in range(iterations):
        for dim, axis, length in ((-1, "n", n), (-2, "m", m)):
            rms = shards.norm(x, dim=dim, over=axis) / length**0.5
            x.div_(rms.clamp_min_(smallest))
    return x
