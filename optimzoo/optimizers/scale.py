"""SCALE: column-normalised SGD with momentum on the output head alone (arXiv 2506.16659)."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import (
    ParamsT,
    _default_to_fused_or_foreach,
    _use_grad_for_differentiable,
)

from optimzoo.core.adam import adam_step, init_adam_state
from optimzoo.core.optimizer import RoleOptimizer, copy_group, options_of, scalar_lr, signed_decay
from optimzoo.core.record import register
from optimzoo.core.role_options import RoleRates
from optimzoo.core.rule import take_into_average
from optimzoo.core.spectral_norm import divide_by_spectral_norm_
from optimzoo.core.update import decaying
from optimzoo.core.validation import (
    check_betas,
    check_choice,
    check_lr,
    check_nonnegative,
    check_rounding,
    check_state_bits,
)
from optimzoo.distributed import Shards, local_part, map_whole_matrices, sum_packed
from optimzoo.kernels import dispatch
from optimzoo.kernels.launch_cache import LaunchCache
from optimzoo.lowbit import (
    STEP,
    RngKey,
    apply_with_rounding,
    dequantized_moments,
    fp32_working_copy,
)
from optimzoo.roles import input_dim, matrix_view, role_of
from optimzoo.stacks import State, batch_by_shape
from optimzoo.subspace.newton_schulz import orthogonalize

NORMALIZATIONS = ("column", "row", "sign", "spectral")
# Options that decide how a group is stepped by kernels; all others are read at each step.
LAYOUT = (
    *("role", "normalize", "averaged", "transposed", "stacked", "fused", "foreach"),
    *("differentiable", "rounding", "state_bits", "spectral_norm", "nesterov"),
)
# Options that all tensors of a kernel's call share; the learning rate and the decay may differ.
SHARED = ("momentum", "nesterov", "norm", "eps", "other_betas", "other_eps", "maximize")


class Part(NamedTuple):
    """This process's shard of a weight, and the dimension that is reduced, 0 for both."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor | None
    shards: Shards
    dim: int
    group: dict[str, Any]
    rng_key: RngKey | None


@register(
    "scale",
    "column-normalised SGD, momentum on the output head alone",
    source="arXiv 2506.16659",
    state="1 x head",
    width_power={"hidden": 0.5, "embedding": 0.5},
)
class SCALE(RoleOptimizer):
    r"""Stochastic Column-normalised Last-layer momentum (SCALE).

    For a weight ``W`` with gradient ``g``, learning rate ``η`` and weight decay ``λ``::

        head:      m ← β m + (1 − β) g,   g ← m          (the only momentum)
                   `nesterov`: g ← β m + (1 − β) g
        matrices:  s_j = max(√(mean_i g_ij²), eps)       (one per output neuron j)
                   W ← (1 − ηλ) W − η g / s
        vectors:   Adam, with `vector_lr`, `other_betas`, `other_eps`

    The paper writes ``W`` as ``[d_in, d_out]`` and normalises its columns; here that reduces dim 1
    of an ``nn.Linear`` weight and of the head, dim 0 of an ``nn.Embedding`` weight. Weights above
    two dimensions are flattened to ``[out, -1]``; a stack of matrices is taken slice by slice.

    State, in bytes a parameter of the head: its own size (``exp_avg``, in the weight's dtype; in
    float32 under float16). None for hidden weights and the embedding; with `spectral_norm` hidden
    weights have `singular_vector`, min(m, n) numbers of float32 at least. Vectors: 8 (two float32
    moments), and 4 a tensor.

    Args:
        params: groups from :func:`optimzoo.param_groups`; bare parameters fall back by shape.
        lr: step of every normalised weight: the RMS of its update. Float or 1-element tensor.
        momentum: β of the head. A group that names its own `momentum` gets it in any role.
        nesterov: follow Nesterov's momentum where there is momentum.
        weight_decay: λ, decoupled.
        weight_decay_style: `decoupled`, or `cautious`, only where update and weight agree in sign
            (:func:`~optimzoo.core.update.decaying`).
        normalize: `column`, or the paper's ablations: `row` (one scalar per input), `sign`,
            `spectral` (Newton–Schulz; with `norm="rms"` times √max(m, n), so that its RMS is 1).
        norm: `rms` divides by the root mean square (the authors' code, the unit of the published
            learning rates), `l2` by the norm (the paper's formula): `lr_l2 = lr · √n_reduced`.
        spectral_norm: divide the normalised gradient of a hidden weight by an estimate of its
            spectral norm, so that `lr` is that of the update at every width: two power iterations a
            step, from the vector where the last step stopped (:mod:`optimzoo.core.spectral_norm`).
            On the eager path alone; not for sharded hidden weights.
        eps: floor of the divisor. A row whose gradient is zero is not moved.
        other_betas: Adam's betas for the vectors.
        other_eps: Adam's eps, added before the bias correction of the second moment.
        maximize: ascend instead of descend.
        foreach: use torch's multi-tensor operations; default: on CUDA. One gradient-sized
            temporary, as in torch.
        capturable: safe under CUDA graphs.
        differentiable: let autograd run through the step.
        fused: one pass over the weights by compiled kernels; `None`: where there are any, unless
            `foreach=True` or `differentiable` (``optimzoo doctor`` tells); `True`: all or an error,
            and `torch.amp.GradScaler` leaves the unscaling to them (no sync with `capturable`).
        rounding: how a step rounds 16-bit weights: `nearest`, which loses updates below half a
            last bit, or `stochastic`, which has the unrounded result as its expectation. The eager
            path then takes one weight after the other. State: 8 bytes more per weight, a count.
        state_bits: 8 keeps the momentum as int8 codes, with a float32 scale for each 256 of them,
            rounded as `rounding` says (:mod:`optimzoo.lowbit.blockwise`); it is a float32 temporary
            while its weight is stepped. Default: see above.
        seed: seed of stochastic rounding, a function of it, the parameter's index among all, its
            count of steps and the element: the same on resume and in any order of the parameters.

    Raises:
        ValueError: a hyperparameter out of range, groups that do not fit (see `param_groups`),
            `vector_lr` with parameters that carry no role.
        RuntimeError: a sparse gradient, at `step`.

    Non-finite gradients propagate into the weights they touch, as in torch: skip the step
    (`torch.amp.GradScaler` does). A skipped step leaves the state as it was.

    Examples:
        >>> optimizer = optimzoo.SCALE(optimzoo.param_groups(model), lr=1e-3, vector_lr=1e-2)

    Source: "Memory-Efficient LLM Pretraining via Minimalist Optimizer Design" (ICML 2026; arXiv
    2506.16659), formerly "A Minimalist Optimizer Design for LLM Pretraining";
    OptimAI-Lab/Minimalist_LLM_Pretraining. Ours differs from that code: fp32 norms and fp32
    Adam moments under low-precision weights; roles kept in the groups, so that training goes on
    after a resume; weights above two dimensions; tied weights (the head's rule).
    """

    _matrix_roles: ClassVar[tuple[str, ...]] = ("hidden", "embedding", "head")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        weight_decay_style: str = "decoupled",
        nesterov: bool = False,
        normalize: str = "column",
        norm: str = "rms",
        spectral_norm: bool = False,
        eps: float = 1e-8,
        other_lr: float | Tensor | None = None,
        other_betas: tuple[float, float] = (0.9, 0.999),
        other_eps: float = 1e-8,
        other_weight_decay: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        state_bits: int | None = None,
        **rates: Unpack[RoleRates],
    ) -> None:
        if foreach and differentiable:
            raise ValueError("foreach=True cannot be differentiable; choose one")
        defaults = options_of(locals(), without=("other_lr", "other_weight_decay"))
        defaults |= {"role": None, "transposed": False, "stacked": False}
        _check_options(defaults)
        self._launch_cache = LaunchCache(_launch, LAYOUT, SHARED)
        super().__init__(
            params,
            defaults,
            other_lr=other_lr,
            other_weight_decay=other_weight_decay,
            **rates,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its role decides its `lr` (vectors) and whether it has momentum (head)."""
        group = self._with_role_options(copy_group(param_group))
        # Kept apart from `momentum`, which schedulers such as OneCycleLR write into every group.
        group.setdefault("averaged", group.get("role") == "head" or "momentum" in group)
        _check_options({**self.defaults, **group})
        super().add_param_group(group)

    def scale_invariant(self, param: Tensor, group: dict[str, Any]) -> bool:
        """Return whether ``param``'s step is the same for every positive multiple of its gradient.

        It is for a matrix without momentum, as long as the divisor is above `eps`.
        """
        return role_of(param, group) != "vector" and not has_momentum(group)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Return whether `torch.amp.GradScaler` leaves unscaling and skipping to the kernels."""
        return all(group["fused"] for group in self.param_groups)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._launch_cache = LaunchCache(_launch, LAYOUT, SHARED)

    def _init_group(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Create missing state; return the group's matrices and vectors that have a gradient."""
        matrices, vectors = [], []
        for p in group["params"]:
            if p.grad is None:
                continue
            self._refuse_sparse(p.grad)
            if group["differentiable"] and hasattr(p, "device_mesh"):
                raise RuntimeError("differentiable=True does not step sharded weights")
            state = self.state[p]  # created even if empty: a distributed checkpoint reads each
            if role_of(p, group) == "vector":
                # float32 at least: in bfloat16 a second moment with β₂ = 0.999 would never move.
                dtype = torch.promote_types(p.dtype, torch.float32)
                init_adam_state(state, p, capturable=group["capturable"], dtype=dtype)
                vectors.append(p)
            else:
                if has_momentum(group):
                    self._init_average(state, p, group)
                if _has_unit_norm(p, group) and hasattr(p, "device_mesh"):
                    raise RuntimeError(
                        "spectral_norm=True does not step sharded hidden weights; leave it out"
                    )
                matrices.append(p)
        return matrices, vectors

    def _init_average(self, state: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
        if not {"exp_avg", "exp_avg_codes"} & state.keys():
            # In float16 a tenth of a gradient below 6e-7 would be zero.
            wide = group["state_bits"] or p.dtype == torch.float16
            dtype = torch.promote_types(p.dtype, torch.float32) if wide else p.dtype
            state["exp_avg"] = torch.zeros_like(p, dtype=dtype)

    @_use_grad_for_differentiable
    def _update(self) -> None:
        self._check_graph_capture()
        scaled = self._launch_cache.scaled_by(self)
        if self._launch_cache.replay(self.state, self.param_groups):
            return
        cut: list[Part] = []
        first = self.first_index
        with ExitStack() as stack:
            for number, group in enumerate(self.param_groups):
                matrices, vectors = self._init_group(group)
                rng_keys = self._count(group, first)
                first += len(group["params"])
                with ExitStack() as group_stack:
                    for p in matrices if group["state_bits"] == 8 else []:
                        group_stack.enter_context(
                            dequantized_moments(self.state[p], 8, rng_keys.get(p))
                        )
                    parts = self._step_group(number, matrices, vectors, rng_keys)
                    if parts:  # their momentum changes below
                        stack.enter_context(group_stack.pop_all())
                cut += parts
            if scaled and cut:
                raise RuntimeError(
                    "norms that several processes share need unscaled gradients; call "
                    "scaler.unscale_(optimizer) before scaler.step, or leave fused=None"
                )
            _step_parts(cut)
        self._launch_cache.store(self.state, self.param_groups)

    def _step_group(
        self,
        number: int,
        matrices: list[Tensor],
        vectors: list[Tensor],
        rng_keys: dict[Tensor, RngKey],
    ) -> list[Part]:
        """Step the weights that this process can step alone; return the shards of the others."""
        group = self.param_groups[number]
        parts = [_part(p, self.state[p], group, rng_keys.get(p)) for p in matrices]
        matrices = [p for p, part in zip(matrices, parts, strict=True) if part is None]
        if _may_fuse(group):
            local = {p: local_part(p) for p in (*matrices, *vectors)}
            items = [
                item
                for p in matrices
                for item in self._matrix_items(p, local[p], group, rng_keys.get(p))
            ]
            for p in vectors:
                m, v, step = (
                    local_part(self.state[p][k]) for k in ("exp_avg", "exp_avg_sq", "step")
                )
                grad = local_part(p.grad, like=p)  # type: ignore[arg-type]
                items.append(dispatch.vector(local[p], grad, m, v, step, rng_keys.get(p)))
            counts = {local[p]: self.state[p][STEP] for p in rng_keys if p in local}
            others = set(map(id, self._launch_cache.step(number, items, group, counts)))
            matrices = [p for p in matrices if id(local[p]) in others]
            vectors = [p for p in vectors if id(local[p]) in others]
        foreach = group["foreach"]
        if foreach is None:
            foreach = _default_to_fused_or_foreach(matrices, group["differentiable"])[1]
        scale(
            [local_part(p) for p in matrices],
            [local_part(p.grad, like=p) for p in matrices if p.grad is not None],
            [_local_average(self.state[p]) for p in matrices],
            group,
            foreach=foreach,
            rng_keys=[rng_keys.get(p) for p in matrices],
            norm_states=[self.state[p] if _has_unit_norm(p, group) else None for p in matrices],
        )
        adam_step(
            vectors,
            self.state,
            lr=scalar_lr(group),
            betas=group["other_betas"],
            eps=group["other_eps"],
            weight_decay=signed_decay(group),
            maximize=group["maximize"],
            foreach=foreach,
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            rng_keys=[rng_keys.get(p) for p in vectors],
        )
        return [part for part in parts if part is not None]

    def _matrix_items(
        self, p: Tensor, local: Tensor, group: dict[str, Any], rng_key: RngKey | None
    ) -> list[dispatch.TensorArgs]:
        """Return a matrix, or those of a stack, as kernels read them."""
        average = _local_average(self.state[p]) if has_momentum(group) else None
        grad = local_part(p.grad, like=p)  # type: ignore[arg-type]
        layout = {"stacked": group["stacked"], "rng_key": rng_key}
        return dispatch.matrices(local, grad, average, _kernel_kind(group), **layout)


def _check_options(options: dict[str, Any]) -> None:
    check_lr(options["lr"])
    if not 0.0 <= options["momentum"] < 1.0:
        raise ValueError(f"Invalid momentum value: {options['momentum']}; it must be in [0, 1)")
    check_nonnegative(**{k: options[k] for k in ("weight_decay", "other_eps")})
    if not options["eps"] > 0:  # a zero gradient would be divided by it
        raise ValueError(f"Invalid eps value: {options['eps']}; it must be > 0")
    check_betas(options["other_betas"])
    check_choice("normalize", options["normalize"], NORMALIZATIONS)
    check_choice("norm", options["norm"], ("rms", "l2"))
    if options["fused"] and options["normalize"] == "spectral":
        raise ValueError("normalize='spectral' has no fused kernel; leave fused=None")
    if options["spectral_norm"] and options["normalize"] == "spectral":
        raise ValueError("normalize='spectral' needs no spectral_norm=True; take norm='l2' for it")
    if options["spectral_norm"] and (options["fused"] or options["differentiable"]):
        raise ValueError("spectral_norm=True excludes fused=True and differentiable=True")
    if options["fused"] and (options["foreach"] or options["differentiable"]):
        raise ValueError("fused=True excludes foreach=True and differentiable=True; choose one")
    check_rounding(options)
    check_state_bits(options["state_bits"])
    if options["state_bits"] and (options["capturable"] or options["differentiable"]):
        raise ValueError("state_bits=8 excludes capturable=True and differentiable=True")
    if options["rounding"] == "stochastic" and (options["capturable"] or options["differentiable"]):
        raise ValueError(
            "rounding='stochastic' counts its steps in Python; it excludes capturable=True and "
            "differentiable=True"
        )


def has_momentum(group: dict[str, Any]) -> bool:
    """Return whether the group's matrices have a moving average of their gradient."""
    return bool(group["averaged"] and group["momentum"] != 0)


def _local_average(state: State) -> Tensor | None:
    """Return this process's shard of a weight's momentum, or None if it has no momentum."""
    return local_part(state["exp_avg"]) if "exp_avg" in state else None


def _has_unit_norm(p: Tensor, group: dict[str, Any]) -> bool:
    return bool(group["spectral_norm"]) and role_of(p, group) == "hidden"


def scale(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor | None],
    group: dict[str, Any],
    *,
    foreach: bool,
    rng_keys: Sequence[RngKey | None],
    norm_states: Sequence[State | None],
) -> None:
    """Take one step of :class:`SCALE` with a group's options, in place.

    ``norm_states`` are the states of those whose update gets the spectral norm one.
    """
    rule = _multi_tensor_scale if foreach else _single_tensor_scale
    if not params:
        return
    options = {name: group[name] for name in ("normalize", "norm", "eps")}
    normalizer = partial(normalized, dim=_reduced_dim(group), **options)

    def direction(grads: list[Tensor], norm_states: Sequence[State | None]) -> list[Tensor]:
        matrices = [matrix_view(grad, stacked=group["stacked"]) for grad in grads]
        updates = [
            u for _, u in sorted(batch_by_shape(normalizer, matrices, foreach), key=itemgetter(0))
        ]
        for update, state in zip(updates, norm_states, strict=False):  # one, or all None
            if state is not None:
                divide_by_spectral_norm_(update, state)
        return [update.view_as(grad) for update, grad in zip(updates, grads, strict=True)]

    def step(params: Any, grads: Any, exp_avgs: Any, norm_states: Any) -> None:
        if group["maximize"]:
            grads = [-g for g in grads]
        rule(params, grads, exp_avgs, partial(direction, norm_states=norm_states), group)

    alone = any(state is not None for state in norm_states)
    apply_with_rounding(step, rng_keys, params, grads, exp_avgs, norm_states, alone=alone)


def normalized(grad: Tensor, *, dim: int, normalize: str, norm: str, eps: float) -> Tensor:
    """Return ``C(g)``, the direction of a matrix ``[..., m, n]``, in at least float32."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    if normalize == "sign":
        return torch.where(grad.isnan(), grad, grad.sign()).to(wide)
    if normalize == "spectral":
        return _spectral(grad, norm=norm)
    length = torch.linalg.vector_norm(grad, dim=dim, keepdim=True, dtype=wide)
    return _divided(grad, length, grad.shape[dim], norm, eps)


def _divided(grad: Tensor, length: Tensor, count: int, norm: str, eps: float) -> Tensor:
    """Divide by the norms of ``count`` elements each, or by their root mean squares."""
    if norm == "rms":
        length = length / math.sqrt(max(count, 1))
    return grad / length.clamp_min(eps)


def _spectral(grad: Tensor, *, norm: str) -> Tensor:
    size = math.sqrt(max(grad.shape[-2:])) if norm == "rms" else 1.0
    return orthogonalize(grad).to(torch.promote_types(grad.dtype, torch.float32)) * size


def _single_tensor_scale(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor | None],
    direction: Callable[[list[Tensor]], list[Tensor]],
    group: dict[str, Any],
) -> None:
    lr, momentum, weight_decay = scalar_lr(group), group["momentum"], signed_decay(group)
    for p, g, m in zip(params, grads, exp_avgs, strict=True):
        if m is not None and momentum != 0:
            g = take_into_average(g.to(m.dtype), m, momentum, nesterov=group["nesterov"])
            # With `differentiable` autograd keeps m for the backward, and the next step changes it.
            g = m.clone() if g is m and m.requires_grad else g
        (update,) = direction([g])
        if weight_decay != 0:
            # Decay inside the update: a low-precision weight is then rounded once a step, not twice
            # (bfloat16 would lose every decay factor above 0.998).
            (decayed,) = decaying([update], [p], weight_decay)
            update = update.add(decayed, alpha=abs(weight_decay))
        p.sub_(update * lr)


def _multi_tensor_scale(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor | None],
    direction: Callable[[list[Tensor]], list[Tensor]],
    group: dict[str, Any],
) -> None:
    momentum, weight_decay = group["momentum"], signed_decay(group)
    buffers = [m for m in exp_avgs if m is not None]
    if buffers and momentum != 0:
        grads = [g.to(m.dtype) for g, m in zip(grads, buffers, strict=True)]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        ahead = group["nesterov"]
        grads = list(torch._foreach_lerp(grads, buffers, momentum)) if ahead else buffers
    updates = direction(grads)
    if weight_decay != 0:
        decayed = decaying(updates, params, weight_decay)
        torch._foreach_add_(updates, decayed, alpha=abs(weight_decay))
    torch._foreach_mul_(updates, scalar_lr(group))
    torch._foreach_sub_(params, updates)


def _may_fuse(group: dict[str, Any]) -> bool:
    """Return whether the group's options allow the kernels."""
    if group["fused"] is not None:
        return bool(group["fused"])
    eager = group["foreach"] or group["differentiable"] or group["normalize"] == "spectral"
    return not (eager or (group["spectral_norm"] and group["role"] in (None, "hidden")))


def _kernel_kind(group: dict[str, Any]) -> int:
    """Return along what the group's matrices are normalised, as kernels call it."""
    if group["normalize"] == "sign":
        return dispatch.SIGN
    return dispatch.ROWS if _reduced_dim(group) == -1 else dispatch.COLUMNS


def _reduced_dim(group: dict[str, Any]) -> int:
    """Return the dimension of a matrix whose elements share a norm; 0: there is none."""
    if group["normalize"] not in ("column", "row"):
        return 0
    dim = input_dim(group["role"] or "hidden", transposed=group["transposed"])
    return dim if group["normalize"] == "column" else -3 - dim


def _launch(
    kernels: Any, lists: tuple[Any, ...], groups: list[tuple[dict[str, Any], int]], **options: Any
) -> None:
    """Step tensors of groups that agree in `SHARED`, each with its number of tensors."""
    device = lists[0][0].device
    lr: list[Any] = []
    weight_decay: list[float] = []
    for group, size in groups:
        lr += [dispatch.lr_argument(group["lr"], device)] * size
        weight_decay += [signed_decay(group)] * size
    group = groups[0][0]
    kernels.scale_(
        *lists,
        lr=lr,
        momentum=group["momentum"],
        weight_decay=weight_decay,
        l2=group["norm"] == "l2",
        eps=group["eps"],
        betas=group["other_betas"],
        adam_eps=group["other_eps"],
        maximize=group["maximize"],
        nesterov=group["nesterov"],
        **options,
    )


def _part(p: Tensor, state: State, group: dict[str, Any], rng_key: RngKey | None) -> Part | None:
    """Return the shard of a weight that processes must step together, else None."""
    if not hasattr(p, "device_mesh") or p.grad is None:
        return None
    shards = Shards.of(p, stacked=bool(group["stacked"]))
    dim = _reduced_dim(group)
    dims = {0: "mn", -1: "n", -2: "m"}[dim]
    if group["normalize"] == "sign" or not shards.is_sharded(dims):
        return None
    grad = local_part(p.grad, like=p)
    return Part(local_part(p), grad, _local_average(state), shards, dim, group, rng_key)


def _step_parts(parts: Sequence[Part]) -> None:
    """Step shards, with one all-reduce of all squared norms per process group."""
    summed = [part for part in parts if part.dim != 0]
    sources = [_averaged(part) for part in summed]
    squares = []
    for g, part in zip(sources, summed, strict=True):
        wide = torch.promote_types(g.dtype, torch.float32)
        length = torch.linalg.vector_norm(g, dim=part.dim, keepdim=True, dtype=wide)
        squares.append(length.square())
    dims = ["n" if part.dim == -1 else "m" for part in summed]
    sum_packed(squares, [part.shards for part in summed], dims)
    for part, grad, square in zip(summed, sources, squares, strict=True):
        count = part.shards.shape(grad.shape)[part.dim]
        _write(part, _divided(grad, square.sqrt(), count, part.group["norm"], part.group["eps"]))
    whole = [part for part in parts if part.dim == 0]
    directions = map_whole_matrices(
        lambda grad: _spectral(grad, norm=whole[0].group["norm"]),
        [_averaged(part) for part in whole],
        [part.shards for part in whole],
    )
    for i, direction in directions:
        _write(whole[i], direction)


def _averaged(part: Part) -> Tensor:
    """Return the gradient, or the updated momentum where the weight has one, as a matrix."""
    grad = -part.grad if part.group["maximize"] else part.grad
    if part.exp_avg is not None and part.group["momentum"] != 0:
        grad, momentum = grad.to(part.exp_avg.dtype), part.group["momentum"]
        grad = take_into_average(grad, part.exp_avg, momentum, nesterov=part.group["nesterov"])
    return matrix_view(grad, stacked=bool(part.group["stacked"]))


def _write(part: Part, direction: Tensor) -> None:
    update = direction.view_as(part.weight)
    with fp32_working_copy(part.weight, part.rng_key) as weight:
        _single_tensor_scale([weight], [part.grad], [None], lambda _: [update], part.group)
