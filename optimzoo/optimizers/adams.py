"""AdamS of CAST: Adam whose first moment fades into an L1 decay where an N:M mask is 0.

arXiv 2509.25996. Two unrelated methods have the same name: `AdamS` of the pytorch_optimizer package
(stable weight decay) and that of arXiv 2505.16363.
"""

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, _default_to_fused_or_foreach

from optimzoo.core.adam import adam, count_up, init_adam_state, read_counts
from optimzoo.core.matrix_optimizer import REST_DEFAULTS, local_params
from optimzoo.core.optimizer import RoleOptimizer, copy_group, options_of, scalar_lr, signed_decay
from optimzoo.core.record import register
from optimzoo.core.role_options import RoleOptions
from optimzoo.core.update import decaying
from optimzoo.core.validation import (
    check_betas,
    check_capturable,
    check_choice,
    check_lr,
    check_nonnegative,
    check_rounding,
)
from optimzoo.distributed import local_part
from optimzoo.kernels import dispatch
from optimzoo.lowbit import (
    LOW,
    RngKey,
    apply_with_rounding,
    at_least_float32,
    moment_dtype,
    widened,
)
from optimzoo.roles import role_of
from optimzoo.sparsity.masks import check_nm, grouped, packed_mask, unpack
from optimzoo.sparsity.sharding import check_cut, sharded_like

DECAYS = ("l1", "l2")
Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


@register(
    "adams",
    "CAST's Adam with a ramped L1 decay to N:M sparsity (not the others called AdamS)",
    source="arXiv 2509.25996",
    state="2 x + 1 bit x hidden",
    aliases=("cast_adams",),
    required={"l1": 1e-7, "total_steps": 10_000},
)
class AdamS(RoleOptimizer):
    r"""Adam with a proportional L1 decay that drives a model to N:M sparsity (CAST's AdamS).

    For a hidden weight ``θ`` with gradient ``g``, at its step ``t = 1, 2, …``::

        mask ← the n largest |θ| of every m consecutive inputs     every `mask_every` steps, first
        μ ← β₁ μ + (1 − β₁) g
        α = min(t / total_steps, 1)
        μ̃ = μ                                                      where the mask is 1
        μ̃ = (1 − α) μ + α λ sign(θ)                                where it is 0
        v ← β₂ v + (1 − β₂) μ̃²
        θ ← (1 − ηw) θ − η (μ̃ / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + eps)

    The second moment is built from the modified moment, for kept weights too. So a first step is
    ``η / (1 − β₁)``, ten times Adam's with these betas, and later ones are larger than Adam's
    wherever the gradient is noisy: warm up, and take a smaller η. The forward pass stays dense: the
    mask is seen by the optimizer alone, and :func:`optimzoo.sparsity.finalize` prunes with the last
    one. A masked weight ends within its last steps' size of 0, whatever λ is: let the schedule fall
    to 0, and let ``Σ ηα`` exceed the weights. All other parameters take the zoo's Adam, with the
    same betas, eps (there before the bias correction) and decay.

    State of a hidden weight: two moments of its own size, one mask bit a weight (`mask`, uint8,
    each row from a new byte) and 4 bytes a tensor; of the others: two moments, 4 bytes a tensor.
    Of sharded weights each process has the moments and the mask of its part; parts that cut a group
    of m inputs, or a byte of mask bits, are refused.

    Args:
        params: groups from :func:`optimzoo.param_groups` or `optimzoo.sparsity.sparse_groups`;
            bare parameters fall back by shape. A group with `sparse=False` takes Adam.
        lr: learning rate η; a group may carry its own.
        betas: Adam's betas.
        eps: Adam's eps, after the bias correction.
        l1: λ, the decay at the end of the ramp, in units of the gradient; 4e-7 in the paper's run.
        total_steps: T, the planned steps. A checkpoint brings its own: the ramp goes on, never
            anew.
        n: how many of m inputs are kept.
        m: size of a group.
        mask_every: steps between two masks. 10 in the paper.
        decay: `l1` as above, or `l2`, the predecessor's (SR-STE, AST): ``μ̃ = μ + α λ θ``.
        weight_decay: w, decoupled, or cautious by `weight_decay_style`, to which the pull of
            `decay` is a part of the update.
        maximize: ascend instead of descend; the decay still pulls to zero.
        foreach: use torch's multi-tensor operations; default: on CUDA. Three weight-sized
            temporaries and one byte a weight.
        capturable: safe under CUDA graphs. Masks are then computed at every step, and taken where
            they are due; kernels step the other parameters alone.
        rounding: how a step rounds 16-bit weights: `nearest`, which would swallow the decay and
            is refused for masked weights, or `stochastic`, which has the unrounded result as its
            expectation and keeps the moments in float32.
        seed: seed of stochastic rounding.

    Raises:
        ValueError: a hyperparameter out of range; a hidden weight whose inputs are no multiple of
            m, or of 16 bits and rounded to nearest (use float32 weights and autocast, or
            `rounding="stochastic"`).
        RuntimeError: at `step`, a sparse gradient, or a state that has moments but no mask.

    Examples:
        >>> optimzoo.sparsity.prepare(model)
        >>> optimizer = optimzoo.AdamS(
        ...     optimzoo.sparsity.sparse_groups(model), lr=2e-5, l1=4e-7, total_steps=7500)

    Source: arXiv 2509.25996, Algorithm 1; no code is published. Ours: t counts from 1 in the ramp
    too (Algorithm 1 starts at 0, where its bias correction has no value; Algorithm 2 at 1), of
    equal magnitudes the lower index is kept (the paper's ≥ may keep more than n), and α stays 1
    after `total_steps`. The paper leaves betas, eps, schedule and weight decay open.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        l1: float,
        total_steps: int,
        n: int = 2,
        m: int = 4,
        mask_every: int = 10,
        decay: str = "l1",
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        rounding: str = "nearest",
        seed: int = 0,
        **options: Unpack[RoleOptions],
    ) -> None:
        defaults = options_of(locals()) | REST_DEFAULTS | {"sparse": True}
        _check_options(defaults)
        super().__init__(params, defaults, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, and check its options and its hidden weights."""
        group = self._with_role_options(copy_group(param_group))
        _check_options({**self.defaults, **group})
        super().add_param_group(group)
        try:
            for i, p in enumerate(self.param_groups[-1]["params"]):
                self._check_weight(p, self.param_groups[-1], i)
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_weight(self, weight: Tensor, group: dict[str, Any], index: int) -> None:
        if not _is_masked(weight, group):
            return
        names = group.get("param_names", [])
        name = names[index] if index < len(names) else f"parameter {index}"
        if weight.dtype in LOW and group["rounding"] == "nearest":
            raise ValueError(
                f"{name} is {weight.dtype}, whose rounding swallows the decay of the masked "
                "weights; keep float32 weights and train under autocast, or rounding='stochastic'"
            )
        try:
            check_cut(weight, group["m"], **_layout(group))
            grouped(local_part(weight), group["m"], **_layout(group))
        except ValueError as error:
            raise ValueError(
                f"{name} {list(weight.shape)}: {error}, with sparse=False in its group"
            ) from None

    def _init_group(self, group: dict[str, Any]) -> tuple[dict[Tensor, Any], list[Tensor]]:
        """Create state and masks of the parameters that have a gradient.

        Returns:
            The masked ones, with the number of this step of each, a float64 tensor on the device
            with `capturable`; and the others.
        """
        masked, dense, captured = [], [], group["capturable"]
        for i, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            self._refuse_sparse(p.grad)
            state = self.state[p]
            if not _is_masked(p, group):
                # float32 at least: in bfloat16 a second moment with β₂ = 0.999 would never move.
                init_adam_state(state, p, capturable=captured, dtype=at_least_float32(p))
                dense.append(p)
                continue
            self._check_weight(p, group, i)  # `model.to` may have changed it since
            if "step" in state and "mask" not in state:
                raise RuntimeError(
                    f"the state counts {int(state['step'])} steps without a mask; the ramp of the "
                    "decay counts from the first step: start AdamS with a state of its own"
                )
            init_adam_state(state, p, capturable=captured, dtype=moment_dtype(p, group))
            masked.append(p)
        steps = [self.state[p]["step"] for p in masked]
        counts: Any = [s.double() for s in steps] if captured else read_counts(steps)
        for p, count in zip(masked, counts, strict=True):
            self._refresh_mask(p, group, count % group["mask_every"] == 0)
        return {p: count + 1 for p, count in zip(masked, counts, strict=True)}, dense

    def _refresh_mask(self, p: Tensor, group: dict[str, Any], due: Any) -> None:
        """Make a mask where one is due, which the device alone may know."""
        state, captured = self.state[p], isinstance(due, Tensor)
        if not captured and not due:
            return
        mask = packed_mask(local_part(p), group["n"], group["m"], **_layout(group))
        if captured and "mask" in state:
            old = local_part(state["mask"])
            old.copy_(torch.where(due, mask, old))
        else:
            state["mask"] = sharded_like(p, mask)

    def _update(self) -> None:
        self._check_graph_capture()
        first = self.first_index
        for group in self.param_groups:
            with dispatch.fused(group["fused"], local_params(group)):
                self._update_group(group, first)
            first += len(group["params"])

    def _update_group(self, group: dict[str, Any], first: int) -> None:
        counts, dense = self._init_group(group)
        rng_keys = self._count(group, first)
        masked = self._step_fused(group, counts, rng_keys)
        shared = {k: group[k] for k in ("betas", "eps", "maximize", "foreach")}
        shared |= {"lr": scalar_lr(group), "weight_decay": signed_decay(group)}
        masks = [local_part(self.state[p]["mask"]) for p in masked]
        keys = [rng_keys.get(p) for p in masked]
        adams(*self._lists(masked), masks, [counts[p] for p in masked], group, rng_keys=keys)
        shared["rng_keys"] = [rng_keys.get(p) for p in dense]
        adam(*self._lists(dense), capturable=group["capturable"], **shared)

    def _step_fused(
        self, group: dict[str, Any], counts: dict[Tensor, Any], rng_keys: dict[Tensor, RngKey]
    ) -> list[Tensor]:
        """Step what the kernels take, in one call per step count; return the other parameters."""
        params = list(counts)
        if group["foreach"] is not None or group["decay"] != "l1" or group["capturable"]:
            return params  # the kernels take the ramp from the host
        runs: dict[tuple[Any, float], list[dispatch.TensorArgs]] = {}
        lists, others = self._lists(params), []
        masks: dict[Tensor, Tensor] = {}
        for p, w, g, m, v, step in zip(params, *lists, strict=True):
            item = dispatch.vector(w, g, m, v, step, rng_keys.get(p))
            whole_bytes = item.param[:1].numel() % 8 == 0  # else the mask's rows are padded
            kernels = dispatch.backend(item.param.device.type)
            if kernels is not None and whole_bytes and dispatch.is_supported(item):
                masks[item.param] = local_part(self.state[p]["mask"])
                runs.setdefault((kernels, counts[p]), []).append(item)
            else:
                others.append(p)
        for (kernels, t), items in runs.items():
            for call in dispatch.split_at_rng_gaps(items):
                kernels.adam_(
                    *dispatch.to_argument_lists(call)[:5],
                    lr=dispatch.lr_argument(group["lr"], call[0].param.device),
                    weight_decay=signed_decay(group),
                    eps_before=False,
                    masks=[masks[i.param] for i in call],
                    alpha=min(t / group["total_steps"], 1.0),
                    **{k: group[k] for k in ("betas", "eps", "maximize", "l1")},
                    **dispatch.rounding(call),
                )
        return others

    def _lists(self, params: list[Tensor]) -> Lists:
        """Return parameters, gradients, moments and step counts, as local tensors."""
        return (
            [local_part(p) for p in params],
            [local_part(p.grad, like=p) for p in params if p.grad is not None],
            [local_part(self.state[p]["exp_avg"]) for p in params],
            [local_part(self.state[p]["exp_avg_sq"]) for p in params],
            [self.state[p]["step"] for p in params],
        )


def _check_options(options: dict[str, Any]) -> None:
    check_lr(options["lr"])
    check_betas(options["betas"])
    check_nonnegative(**{k: options[k] for k in ("eps", "l1", "weight_decay")})
    for name in ("total_steps", "mask_every"):
        if options[name] < 1:
            raise ValueError(f"Invalid {name}: {options[name]}; it must be at least 1")
    check_nm(options["n"], options["m"])
    check_choice("decay", options["decay"], DECAYS)
    check_rounding(options)
    check_capturable(options)


def _is_masked(param: Tensor, group: dict[str, Any]) -> bool:
    return bool(group["sparse"]) and role_of(param, group) == "hidden"


def _layout(group: dict[str, Any]) -> dict[str, bool]:
    return {name: bool(group[name]) for name in ("transposed", "stacked")}


def adams(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    masks: list[Tensor],
    counts: list[Any],
    group: dict[str, Any],
    *,
    rng_keys: Sequence[RngKey | None],
) -> None:
    """Take one step of :class:`AdamS` with a group's options, in place, on masked weights.

    ``counts`` are the numbers of this step, to which ``steps`` are incremented.
    """
    if not params:
        return
    foreach = group["foreach"]
    if foreach is None:
        foreach = _default_to_fused_or_foreach(params, False)[1]
    rule: Callable[..., None] = _multi_tensor_adams if foreach else _single_tensor_adams
    count_up(steps)
    ramp = [t / group["total_steps"] for t in counts]
    ramp = [a.clamp(max=1.0) if isinstance(a, Tensor) else min(a, 1.0) for a in ramp]

    def step(params: Any, grads: Any, means: Any, squares: Any, *others: Any) -> None:
        with widened(means, squares) as (means, squares):
            grads = [g.to(m.dtype) for g, m in zip(grads, means, strict=True)]
            if group["maximize"]:
                grads = list(torch._foreach_neg(grads))
            rule(params, grads, means, squares, *others, group)

    lists = (params, grads, exp_avgs, exp_avg_sqs, masks, counts, ramp)
    apply_with_rounding(step, rng_keys, *lists, alone=any(m.dtype in LOW for m in exp_avgs))


def _single_tensor_adams(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masks: list[Tensor],
    counts: list[Any],
    ramp: list[Any],
    group: dict[str, Any],
) -> None:
    (beta1, beta2), l1, weight_decay = group["betas"], group["l1"], signed_decay(group)
    lr = scalar_lr(group)
    tensors = zip(params, grads, exp_avgs, exp_avg_sqs, masks, counts, ramp, strict=True)
    for theta, g, mu, v, bits, t, alpha in tensors:
        mu.lerp_(g, 1 - beta1)
        if group["decay"] == "l1":
            pulled = mu * (1 - alpha) + theta.sign() * (alpha * l1)
        else:
            pulled = mu + theta * (alpha * l1)
        modified = torch.where(unpack(bits, theta.shape), mu, pulled)
        v.mul_(beta2).addcmul_(modified, modified, value=1 - beta2)
        update = modified / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + group["eps"])
        if weight_decay != 0:
            (decayed,) = decaying([update], [theta], weight_decay)
            update = update.add(decayed, alpha=abs(weight_decay))
        theta.sub_(update * lr)


def _multi_tensor_adams(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masks: list[Tensor],
    counts: list[Any],
    ramp: list[Any],
    group: dict[str, Any],
) -> None:
    (beta1, beta2), l1, weight_decay = group["betas"], group["l1"], signed_decay(group)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    shrinks = group["decay"] == "l1"
    updates = torch._foreach_sign(params) if shrinks else params
    updates = torch._foreach_mul(updates, [alpha * l1 for alpha in ramp])
    faded = torch._foreach_mul(exp_avgs, [1 - a for a in ramp]) if shrinks else exp_avgs
    torch._foreach_add_(updates, faded)
    del faded
    torch._foreach_lerp_(updates, exp_avgs, _unpacked(masks, exp_avgs))
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, updates, updates, value=1 - beta2)
    torch._foreach_div_(updates, [1 - beta1**t for t in counts])
    denominators = torch._foreach_div(exp_avg_sqs, [1 - beta2**t for t in counts])
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, group["eps"])
    torch._foreach_div_(updates, denominators)
    if weight_decay != 0:
        decayed = decaying(updates, params, weight_decay)
        torch._foreach_add_(updates, decayed, alpha=abs(weight_decay))
    torch._foreach_mul_(updates, scalar_lr(group))
    torch._foreach_sub_(params, updates)


def _unpacked(masks: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Return packed masks as 0 and 1 in the dtypes and shapes of ``like``, a shape at a time."""
    by_layout: dict[Any, list[int]] = {}
    for i, x in enumerate(like):
        by_layout.setdefault((x.shape, x.dtype, x.device), []).append(i)
    result = list(like)
    for (shape, dtype, _), places in by_layout.items():
        bits = torch.stack([masks[i] for i in places])
        stack = unpack(bits.flatten(0, 1), (len(places) * shape[0], *shape[1:])).to(dtype)
        for i, mask in zip(places, stack.view(len(places), *shape), strict=True):
            result[i] = mask
    return result
