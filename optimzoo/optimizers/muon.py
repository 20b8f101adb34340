"""Muon: orthogonalised momentum on the hidden weights, AdamW on the rest."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from optimzoo.core.matrix_optimizer import MatrixOptimizer, as_matrix, descent, step_lr
from optimzoo.core.optimizer import copy_group, options_of
from optimzoo.core.record import register
from optimzoo.core.role_options import RoleRates, with_role_options
from optimzoo.core.rule import Context, Matrix
from optimzoo.core.update import Update, subtract_
from optimzoo.core.validation import check_betas, check_choice, check_nonnegative
from optimzoo.distributed import map_whole_matrices
from optimzoo.lowbit import RngKey, fp32_working_copy, moment_dtype
from optimzoo.roles import ROLES, role_of
from optimzoo.stacks import State, in_chunks
from optimzoo.subspace.newton_schulz import (
    COEFFICIENTS,
    Triple,
    fast_dtype,
    orthogonalize,
)

# What torch multiplies a matrix's learning rate by, of its rows and columns.
ADJUSTMENTS = {
    "original": lambda rows, cols: math.sqrt(max(1.0, rows / cols)),
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    "spectral_unclamped": lambda rows, cols: math.sqrt(rows / cols),
}
NS_DTYPES = ("bfloat16", "float16", "float32", "float64")


@register(
    "muon",
    "orthogonalised momentum on hidden weights, AdamW on the rest",
    source="kellerjordan.github.io/posts/muon",
    state="1 x hidden + 2 x rest",
)
class Muon(MatrixOptimizer):
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

    State of a weight of ``roles``: `momentum_buffer` of its own size and dtype. The rest: two.
    Under float16 weights, and with stochastic rounding, in float32.

    Args:
        params: groups from :func:`optimzoo.param_groups`, or bare parameters (split by shape). A
            group may have `heads`, a number of blocks of rows of each of its matrices, each of
            which is orthogonalised and adjusted alone: 3 for a fused ``[3 d, d]`` QKV weight.
        lr: η, Muon's learning rate. A group may carry its own.
        momentum: μ.
        weight_decay: λ, decoupled.
        nesterov: Nesterov momentum.
        ns_steps: Newton–Schulz iterations.
        ns_coefficients: ``(a, b, c)``; or a sequence of them, one an iteration, as Polar Express
            (arXiv 2505.16932) gives: then there are as many iterations, and `ns_steps` is unused.
        ns_dtype: of the iteration, such as `float32`. `None`: bfloat16 where the machine multiplies
            it faster (CUDA, a CPU with AMX), else float32; float64 for weights in it.
        adjust_lr_fn: s: `None` or `original`, √max(1, m/n); `match_rms_adamw`, 0.2 √max(m, n), with
            which AdamW's rates and decay serve; `spectral_unclamped`, √(m/n).
        other_lr: AdamW's learning rate.
        other_betas: AdamW's betas; `betas` in a group.
        other_eps: AdamW's eps; `eps` in a group.
        other_weight_decay: AdamW's weight decay; vectors of `param_groups` have none.
        roles: the roles that Muon trains; the SCALE paper's memory table counts all three matrices.
        maximize: ascend.
        foreach: multi-tensor operations: weights of one shape are stepped together, as a stack of
            bounded size, and so is the rest; default: on CUDA.
        capturable: whether a step may be in a CUDA graph.
        rounding: of weights of 16 bits, once a step: `nearest`, or `stochastic`, which has the
            unrounded result as its expectation and keeps the state in float32.
        seed: of stochastic rounding.
        state_bits: 8 keeps momentum and moments of 4,096 elements and up as 8-bit codes, with a
            float32 scale for each 256, rounded as `rounding` says; they are float32 temporaries
            while their weight is stepped. Not for sharded weights.
        other: rule of the embedding and the head: `adam`; `scale`, SCALE's, with momentum on the
            head alone; `adafactor`, a factored second moment. See
            :class:`~optimzoo.core.role_options.SharedOptions`.

    Raises:
        ValueError: a hyperparameter out of range; `heads` that do not divide a matrix's rows.
        RuntimeError: a sparse gradient, at `step`.

    Source: kellerjordan.github.io/posts/muon; the defaults of AdamW are those of its repository.
    ``torch.optim.Muon`` is the same rule for matrices alone, in bfloat16 everywhere; with
    `nesterov=False` and bfloat16 state it normalises its momentum itself, which stays here. Long
    matrices are iterated on by their Gram matrix, in float32 and above (ours).
    """

    counts_steps = False
    _eps_before = False

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
        other_lr: float | Tensor = 3e-4,
        other_betas: tuple[float, float] = (0.9, 0.95),
        other_eps: float = 1e-10,
        other_weight_decay: float = 0.0,
        roles: tuple[str, ...] = ("hidden",),
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        rounding: str = "nearest",
        seed: int = 0,
        state_bits: int | None = None,
        other: str = "adam",
        fused: bool | None = None,
        **rates: Unpack[RoleRates],
    ) -> None:
        others = ("other_lr", "other_betas", "other_eps", "other_weight_decay", "roles")
        defaults = options_of(locals(), without=("others", *others)) | {"heads": 1}
        check_betas(other_betas)
        check_nonnegative(other_eps=other_eps)
        unknown = set(roles) - set(ROLES)
        if unknown:
            raise ValueError(f"unknown role {unknown.pop()!r}; the roles are {', '.join(ROLES)}")
        self._matrix_roles = tuple(roles)  # type: ignore[misc]
        # In the groups alone: among the defaults, schedulers would cycle betas, not the momentum.
        self._adam = {"betas": other_betas, "eps": other_eps}
        super().__init__(
            params,
            defaults,
            other_lr=other_lr,
            other_weight_decay=other_weight_decay,
            **rates,
        )

    def __getstate__(self) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in ("_matrix_roles", "_adam")}
        return {**super().__getstate__(), **own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as one for each rule and, of bare parameters, for each role."""
        group = copy_group(param_group)
        params = group["params"]
        if isinstance(params, set):  # torch has the error for this
            Optimizer.add_param_group(self, group)
        group["params"] = params = [params] if hasattr(params, "ndim") else list(params)
        self._check_group(group)
        if group.get("role") is None:  # split by shape: none becomes an embedding or a head
            rates = {
                k: v for k, v in self._role_options.items() if k in ("embedding_lr", "head_lr")
            }
            with_role_options(group, rates, ())
        names = group.pop("param_names", None)
        parts: dict[tuple[str, bool], list[int]] = {}
        for i, item in enumerate(params):
            p = item[1] if isinstance(item, tuple) else item
            role = role_of(p, group) if hasattr(p, "ndim") else "vector"
            own = role in self._matrix_roles and is_matrix(p, group)
            parts.setdefault((role, own), []).append(i)
            if own:
                _check_heads(p, {**self.defaults, **group})
        parts = parts or {(group.get("role") or "vector", False): []}
        before = len(self.param_groups)
        try:
            for (role, own), places in parts.items():
                part = {**self._adam, **group, "role": role}
                part = with_role_options(part, self._role_options, [role] if own else [])
                part["params"] = [params[i] for i in places]
                if names is not None:
                    part["param_names"] = [names[i] for i in places]
                super().add_param_group(part)
        except Exception:
            del self.param_groups[before:]  # a refused group leaves the optimizer as it was
            raise

    def _check_options(self, options: dict[str, Any]) -> None:
        if not 0.0 <= options["momentum"] < 1.0:
            raise ValueError(f"Invalid momentum value: {options['momentum']}; it must be in [0, 1)")
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
        if options["adjust_lr_fn"] is not None:
            check_choice("adjust_lr_fn", options["adjust_lr_fn"], ADJUSTMENTS)

    def _is_own(self, p: Tensor, group: dict[str, Any]) -> bool:
        return super()._is_own(p, group) and is_matrix(p, group)

    def init_state(self, p: Tensor, state: State, group: dict[str, Any]) -> None:
        """Create the momentum."""
        if "momentum_buffer" not in state and "momentum_buffer_codes" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, dtype=moment_dtype(p, group))

    def direction(
        self, grad: Tensor, state: State, group: dict[str, Any], context: Context
    ) -> Update:
        """Return the orthogonalised momentum."""
        rate = adjustment(context.shards.shape(grad.shape), group)
        return Update(orthogonal(momentum_of(grad, state, group), group), rate)

    def _step_sharded(
        self, matrices: list[Matrix], group: dict[str, Any], rng_keys: dict[Tensor, RngKey]
    ) -> None:
        shards = [matrix.shards for matrix in matrices]
        momenta = []
        for matrix in matrices:
            with matrix.shards.local_state(matrix.state, {}) as state:
                momenta.append(momentum_of(descent(matrix.grad, group), state, group))
        lr = step_lr(group)
        for i, update in map_whole_matrices(partial(orthogonal, group=group), momenta, shards):
            rate = lr * adjustment(shards[i].shape(momenta[i].shape), group)
            with fp32_working_copy(matrices[i].weight, rng_keys.get(matrices[i].param)) as weight:
                subtract_(weight, update, size=rate, decay=lr * group["weight_decay"])


def momentum_of(grad: Tensor, state: State, group: dict[str, Any]) -> Tensor:
    """Take the gradient into the momentum; return what is orthogonalised."""
    mean = state["momentum_buffer"]  # laid out as the weight is
    given = (grad.mT if group["transposed"] else grad).reshape(mean.shape).to(mean.dtype)
    mean.lerp_(given, 1 - group["momentum"])
    update = given.lerp(mean, group["momentum"]) if group["nesterov"] else mean
    return (update.mT if group["transposed"] else update).reshape(grad.shape)


def adjustment(shape: torch.Size, group: dict[str, Any]) -> float:
    """Return what multiplies the learning rate of a whole matrix."""
    adjust = ADJUSTMENTS[group["adjust_lr_fn"] or "original"]
    return adjust(shape[-2] / group["heads"], shape[-1])


def is_matrix(p: Tensor, group: dict[str, Any]) -> bool:
    """Return whether a parameter has rows and columns, and each row has several inputs."""
    if p.ndim > 2 and not group.get("stacked"):
        return p.shape[0] > 1 and p.shape[1] > 1
    return p.ndim > 1 and min(p.shape[-2:]) > 1


def _check_heads(p: Tensor, options: dict[str, Any]) -> None:
    heads = options["heads"]
    if heads != 1:
        rows = as_matrix(p.detach(), options).shape[-2]
        if not isinstance(heads, int) or heads < 1 or rows % heads:
            raise ValueError(
                f"Invalid heads: {heads}; it must divide the {rows} rows of {list(p.shape)}"
            )


def _name(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def orthogonal(update: Tensor, group: dict[str, Any]) -> Tensor:
    """Orthogonalise each matrix, or each block of its rows; return at least float32."""
    blocks = update.unflatten(-2, (group["heads"], -1)) if group["heads"] > 1 else update
    name = group["ns_dtype"]
    dtype = fast_dtype(update) if name is None else getattr(torch, _name(name))
    how: dict[str, Any] = {"steps": group["ns_steps"], "coefficients": group["ns_coefficients"]}
    result = in_chunks(partial(orthogonalize, dtype=dtype, **how), blocks)
    return result.reshape(update.shape).to(torch.promote_types(update.dtype, torch.float32))
