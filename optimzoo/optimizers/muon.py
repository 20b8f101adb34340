"""Muon: orthogonalised momentum on the hidden weights, AdamW on the rest."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optimzoo.core.matrix_optimizer import as_matrix, descent, step_lr
from optimzoo.core.momentum_optimizer import (
    MomentumOptimizer,
    MomentumOptions,
    adjustment,
    momentum_of,
)
from optimzoo.core.optimizer import options_of, signed_decay
from optimzoo.core.record import register
from optimzoo.core.rule import Context, Matrix
from optimzoo.core.update import Update, subtract_
from optimzoo.core.validation import check_choice
from optimzoo.distributed import Shards, local_part, map_whole_matrices
from optimzoo.lowbit import RngKey, fp32_working_copy, moment_dtype
from optimzoo.stacks import State, in_chunks
from optimzoo.subspace.low_rank_average import initial_factors, take_into_low_rank
from optimzoo.subspace.newton_schulz import (
    COEFFICIENTS,
    Triple,
    fast_dtype,
    orthogonalize,
)

NS_DTYPES = ("bfloat16", "float16", "float32", "float64")
FACTORS = {"momentum_left": "m.", "momentum_right": "n."}  # and which dimension is the weight's


@register(
    "muon",
    "orthogonalised momentum on hidden weights, AdamW on the rest",
    source="kellerjordan.github.io/posts/muon",
    state="1 x hidden + 2 x rest",
    width_power={"hidden": 0.5},
)
class Muon(MomentumOptimizer):
    r"""Momentum, orthogonalised by Newton–Schulz iteration (Muon), and AdamW on the rest.

    For a weight of ``roles`` ``[m, n]`` with gradient ``G``, momentum ``M`` and ``μ`` `momentum`::

        M ← μ M + (1 − μ) G
        X = μ M + (1 − μ) G                      (`nesterov`; else X = M)
        X ← X / ‖X‖_F
        X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X       `ns_steps` times, on the shorter side
        W ← (1 − ηλ) W − η s X                   s by `adjust_lr_fn`

    A convolution is a matrix ``[out, in · k]``, a stack of experts ``[e, m, n]`` is ``e`` matrices.
    A weight that is no matrix in truth takes the rule of the rest, at `other_lr`: one row, one
    column, and a convolution of one input channel a filter (depthwise). Its group is split for it.
    The rest is ``torch.optim.AdamW``, with eps after the bias correction.

    With `momentum_rank` ``r`` below both sides of a matrix, the momentum is stored as a product of
    two factors, ``L`` ``[m, r]`` with orthonormal columns and ``R`` ``[n, r]``, which one block
    power step renews::

        M = μ L Rᵀ + (1 − μ) G
        L ← orth(M R)
        R ← Mᵀ L

    ``X`` is made of ``M`` as it is before that: the past has low rank, the gradient of the step is
    whole. Before the first step ``L`` is zero and ``R`` has fixed normal numbers; a zero ``M``
    changes neither. Where all gradients have their rows in one space of dimension ``r``, and their
    columns in another, the steps are those of the whole momentum. With `heads` the whole matrix has
    the rank.

    State of a weight of ``roles``: `momentum_buffer` of its own size and dtype; or, with
    `momentum_rank`, `momentum_left` and `momentum_right`, ``r (m + n)`` elements a matrix. The
    rest: two. Under float16 weights, and with stochastic rounding, in float32. With `state_bits=8`
    the factors are in float32, what else there is in codes.

    Args:
        params: groups from :func:`optimzoo.param_groups`, or bare parameters (split by shape). A
            group may have `heads`, a number of blocks of rows of each of its matrices, each of
            which is orthogonalised and adjusted alone: 3 for a fused ``[3 d, d]`` QKV weight.
        lr: η, Muon's learning rate. A group may carry its own.
        momentum: μ.
        weight_decay: λ, decoupled, or cautious by `weight_decay_style`.
        nesterov: Nesterov momentum.
        ns_steps: Newton–Schulz iterations.
        ns_coefficients: ``(a, b, c)``; or a sequence of them, one an iteration, as Polar Express
            (arXiv 2505.16932) gives: then there are as many iterations, and `ns_steps` is unused.
        ns_dtype: of the iteration, such as `float32`. `None`: bfloat16 where the machine multiplies
            it faster (CUDA, a CPU with AMX), else float32; float64 for weights in it.
        adjust_lr_fn: s: `None` or `original`, √max(1, m/n); `match_rms_adamw`, 0.2 √max(m, n), with
            which AdamW's rates and decay serve; `spectral_unclamped`, √(m/n).
        momentum_rank: r. `None`, and for a matrix whose shorter side is not above it: the whole
            momentum, `momentum_buffer`.
        options: shared options, AdamW's among them,
            :class:`~optimzoo.core.momentum_optimizer.MomentumOptions`. The SCALE paper's memory
            table counts Muon with `roles` of all three matrices.

    Raises:
        ValueError: a hyperparameter out of range; `heads` that do not divide a matrix's rows.
        RuntimeError: a sparse gradient, at `step`.

    Source: kellerjordan.github.io/posts/muon; the defaults of AdamW are those of its repository.
    ``torch.optim.Muon`` is the same rule for matrices alone, in bfloat16 everywhere; with
    `nesterov=False` and bfloat16 state it normalises its momentum itself, which stays here. Long
    matrices are iterated on by their Gram matrix, in float32 and above (ours).

    `momentum_rank` is as in LiMuon (arXiv 2509.14562), but for its second gradient, at the last
    weights, and with PowerSGD's warm-started power step (arXiv 1905.13727) in place of a randomized
    SVD. MoFaSGD (arXiv 2507.06459) keeps such factors too, and steps by them alone.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-2,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: Triple | Sequence[Triple] = COEFFICIENTS,
        ns_dtype: str | torch.dtype | None = None,
        adjust_lr_fn: str | None = None,
        momentum_rank: int | None = None,
        **options: Unpack[MomentumOptions],
    ) -> None:
        super().__init__(params, options_of(locals()), **options)

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        if not 1 <= options["ns_steps"] < 100:
            raise ValueError(f"Invalid ns_steps: {options['ns_steps']}; it must be from 1 to 99")
        triples = options["ns_coefficients"]
        triples = triples if isinstance(triples[0], Sequence) else [triples]
        if any(len(triple) != 3 for triple in triples):
            raise ValueError(
                f"Invalid ns_coefficients: {options['ns_coefficients']}; it must be three numbers, "
                "or three for each iteration"
            )
        if options["ns_dtype"] is not None:
            check_choice("ns_dtype", _name(options["ns_dtype"]), NS_DTYPES)
        rank = options["momentum_rank"]
        if rank is not None and not (isinstance(rank, int) and rank >= 1):
            raise ValueError(
                f"Invalid momentum_rank: {rank!r}; it must be an integer of at least 1, or None "
                "for the whole momentum"
            )

    def init_state(self, p: Tensor, state: State, group: dict[str, Any]) -> None:
        """Create the momentum, or its factors."""
        if FACTORS.keys() <= state.keys():
            return
        rank = group["momentum_rank"]
        if rank is None or {"momentum_buffer", "momentum_buffer_codes"} & state.keys():
            super().init_state(p, state, group)
            return
        shards = Shards.of(p, transposed=bool(group["transposed"]), stacked=bool(group["stacked"]))
        matrix = as_matrix(local_part(p), group)
        if rank >= min(shards.shape(matrix.shape)[-2:]):
            super().init_state(p, state, group)
            return
        with shards.local_state(state, FACTORS) as local:
            factors = initial_factors(matrix, rank, moment_dtype(p, group), shards)
            local.update(zip(FACTORS, factors, strict=True))

    def state_dims(self, group: dict[str, Any], shape: torch.Size) -> dict[str, str]:
        """Return the dimensions of the factors."""
        return FACTORS

    def direction(
        self, grad: Tensor, state: State, group: dict[str, Any], context: Context
    ) -> Update:
        """Return the orthogonalised momentum."""
        rate = adjustment(context.shards.shape(grad.shape), group)
        momentum = _momentum(grad, state, group, context.shards)
        # Subtracting converts as it goes, to the same bits: a pass over the update less.
        narrow = context.weight is not None and context.weight.dtype == torch.float32
        return Update(orthogonal(momentum, group, narrow=narrow), rate)

    def _step_sharded(
        self, matrices: list[Matrix], group: dict[str, Any], rng_keys: dict[Tensor, RngKey]
    ) -> None:
        # As many at a time as are dealt out at once: their momenta are copies.
        most = max((matrix.shards.mesh.size() for matrix in matrices), default=1)
        for at in range(0, len(matrices), most):
            self._step_dealt(matrices[at : at + most], group, rng_keys)

    def _step_dealt(
        self, matrices: list[Matrix], group: dict[str, Any], rng_keys: dict[Tensor, RngKey]
    ) -> None:
        shards = [matrix.shards for matrix in matrices]
        momenta = []
        for matrix in matrices:
            with matrix.opened_state(FACTORS, group, rng_keys.get(matrix.param)) as state:
                grad = descent(matrix.grad, group, matrix.weight.dtype)
                momenta.append(_momentum(grad, state, group, matrix.shards))
        lr = step_lr(group)
        rates: Any = {"lr": lr, "weight_decay": signed_decay(group)}
        for i, update in map_whole_matrices(partial(orthogonal, group=group), momenta, shards):
            rate = lr * adjustment(shards[i].shape(momenta[i].shape), group)
            with fp32_working_copy(matrices[i].weight, rng_keys.get(matrices[i].param)) as weight:
                subtract_(weight, update, size=rate, **rates)


def _momentum(grad: Tensor, state: State, group: dict[str, Any], shards: Shards) -> Tensor:
    """Take the gradient into the momentum or its factors; return it, or Nesterov's, as a matrix."""
    if "momentum_left" not in state:
        return momentum_of(grad, state, group)
    left, right = (state[key] for key in FACTORS)
    options: dict[str, Any] = {"nesterov": group["nesterov"], "shards": shards}
    return take_into_low_rank(grad, left, right, group["momentum"], **options)


def _name(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def orthogonal(update: Tensor, group: dict[str, Any], *, narrow: bool = False) -> Tensor:
    """Orthogonalise each matrix, or each block of its rows.

    Return at least float32 or, with ``narrow``, the dtype of the iteration.
    """
    blocks = update.unflatten(-2, (group["heads"], -1)) if group["heads"] > 1 else update
    name = group["ns_dtype"]
    dtype = fast_dtype(update) if name is None else getattr(torch, _name(name))
    options: dict[str, Any] = {"steps": group["ns_steps"], "coefficients": group["ns_coefficients"]}
    result = in_chunks(partial(orthogonalize, dtype=dtype, **options), blocks).reshape(update.shape)
    return result if narrow else result.to(torch.promote_types(update.dtype, torch.float32))
