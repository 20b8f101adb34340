"""Stable-SPAM: Adam with adaptive clipping and momentum reset (arXiv 2502.17055v2)."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import Any, ClassVar, NamedTuple, Unpack, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, _default_to_fused_or_foreach

from optimzoo.core.adam import (
    bias_correction,
    count_up,
    max_direction,
    read_counts,
    step_as_tensor,
)
from optimzoo.core.matrix_optimizer import MatrixOptimizer, as_matrix, oriented
from optimzoo.core.optimizer import options_of, scalar_lr, signed_decay
from optimzoo.core.record import register
from optimzoo.core.role_options import SharedOptions
from optimzoo.core.update import decaying
from optimzoo.core.validation import check_betas, check_choice
from optimzoo.distributed import UNSHARDED, Shards, local_part
from optimzoo.kernels import dispatch
from optimzoo.lowbit import (
    LOW,
    RngKey,
    at_least_float32,
    dequantized_moments,
    fp32_working_copy,
    moment_dtype,
    widened,
)
from optimzoo.roles import ROLES
from optimzoo.stacks import State

# Options of the rule; weights that share them, and their counts, are stepped together.
_RULE = (
    *("betas", "eps", "gamma1", "gamma2", "gamma3", "maximize", "state_bits"),
    *("update_proj_gap", "total_steps", "eta_min", "reset_step", "capturable"),
)
_LAYOUT = ("transposed", "stacked")
_AVERAGES = ("max_avg", "norm_avg", "norm_avg_sq")


@register(
    "stable_spam",
    "Adam with adaptive clipping and momentum reset",
    source="arXiv 2502.17055v2",
    state="2 x",
)
class StableSPAM(MatrixOptimizer):
    r"""Stable Spike-Aware Adam with Momentum Reset (Stable-SPAM).

    For every parameter, with step count ``t`` from 1::

        c ← γ₃ c + (1 − γ₃) max|g|,    ĉ = c / (1 − γ₃ᵗ)
        g_i ← g_i / max|g| · ĉ         where |g_i| > ĉ                       (clip the spikes)
        a ← γ₁ s a + (1 − γ₁ s) ‖g‖,   b ← γ₂ b + (1 − γ₂) ‖g‖²
        g ← g / ‖g‖ · â / (√b̂ + eps)   â, b̂ bias-corrected                   (clip the norm)
        Adam with β₁ s; every `update_proj_gap` steps its moments and its count start anew

    ``s`` falls along a cosine from 1 to `eta_min` over `total_steps`; it is 1 where that is None.

    State, in elements a parameter: two moments, and three numbers (float32 at least) and two counts
    a tensor. Maxima and norms are those of a tensor; in a stack of matrices, of each matrix.

    Args:
        params: groups from :func:`optimzoo.param_groups`, or bare parameters.
        lr: learning rate; a group may carry its own.
        betas: Adam's betas.
        eps: Adam's eps (after the bias correction, as in torch), and the norm clip's.
        weight_decay: weight decay, decoupled, or cautious by `weight_decay_style`.
        gamma1: decay rate of the norm's mean. 0.7; the authors' bf16 script has 0.85.
        gamma2: decay rate of the norm's second moment. 0.9; the bf16 script has 0.99999.
        gamma3: decay rate of the largest entry, θ in the paper. 0.999.
        update_proj_gap: steps between two resets of the moments, the authors' name; 0: never.
        total_steps: length of the cosine of β₁ and γ₁.
        eta_min: the cosine's end.
        reset_step: `authors`, as in their code, makes the step of a reset with the old moments
            under a fresh bias correction; `clean` (ours) starts the moments anew before it.
        options: shared options; `foreach`, in which all weights are stepped together, is of the
            rule itself here, and the default on a GPU and where kernels step them:
            :class:`~optimzoo.core.role_options.SharedOptions`.

    Raises:
        ValueError: a hyperparameter out of range; `state_bits` with `capturable`.
        RuntimeError: a sparse gradient, at `step`.

    With `capturable` the moments are multiplied by 1, or at a reset by 0, at each step; with
    `total_steps` too, no kernels step.

    Source: arXiv 2502.17055v2 (v3 is another method, GradientStabilizer);
    TianjinYellow/StableSPAM.
    """

    _matrix_roles: ClassVar[tuple[str, ...]] = ROLES

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        gamma1: float = 0.7,
        gamma2: float = 0.9,
        gamma3: float = 0.999,
        update_proj_gap: int = 1000,
        total_steps: int | None = None,
        eta_min: float = 0.5,
        reset_step: str = "authors",
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(params, options_of(locals()), **options)

    def _check_options(self, options: dict[str, Any]) -> None:
        check_betas((options["gamma1"], options["gamma2"], options["gamma3"]), "gamma")
        if options["update_proj_gap"] < 0:
            gap = options["update_proj_gap"]
            raise ValueError(f"Invalid update_proj_gap: {gap}; it must be >= 0 (0: no reset)")
        if options["total_steps"] is not None and options["total_steps"] < 1:
            raise ValueError(f"Invalid total_steps: {options['total_steps']}; it must be >= 1")
        if not 0.0 < options["eta_min"] <= 1.0:
            raise ValueError(f"Invalid eta_min: {options['eta_min']}; it must be in (0, 1]")
        if options["capturable"] and options["state_bits"]:
            raise ValueError("state_bits=8 counts its steps in Python; it excludes capturable=True")
        check_choice("reset_step", options["reset_step"], ("authors", "clean"))

    def state_dims(self, group: dict[str, Any], shape: torch.Size) -> dict[str, str]:
        """Return the dimensions of the moments."""
        whole = "mn" if len(shape) > 1 else "m"
        return {"exp_avg": whole, "exp_avg_sq": whole}

    def _update(self) -> None:
        self._check_graph_capture()
        self._batches: dict[Any, _Batch] = {}
        with ExitStack() as self._open:
            super()._update()
            for batch in self._batches.values():
                batch.take_step()
        self._batches = {}

    def _step_matrices(
        self,
        params: list[tuple[int, Tensor]],
        group: dict[str, Any],
        rng_keys: dict[Tensor, RngKey],
    ) -> None:
        """Step weights one by one, or collect those that are stepped together."""
        if not params:
            return
        weights = [p for _, p in params]
        coded, foreach = group["state_bits"] == 8, group["foreach"]
        by_kernels = foreach is None  # they take all weights in three calls, without memory
        if foreach is None:
            foreach = _default_to_fused_or_foreach([local_part(p) for p in weights], False)[1]
        lr: Any = group["lr"] if group["capturable"] else float(scalar_lr(group))
        decay, layout = signed_decay(group), {k: bool(group[k]) for k in _LAYOUT}
        rule = {key: group[key] for key in _RULE} | {"betas": tuple(group["betas"])}
        cautious = decay < 0
        common = (*rule.values(), cautious, *((id(lr), decay) if group["capturable"] else ()))
        states = [self.state[p] for p in weights]
        counts = self._count_steps(weights, states, group)
        for p, state, count in zip(weights, states, counts, strict=True):
            weight, rng_key = oriented(local_part(p), group), rng_keys.get(p)
            grad = as_matrix(local_part(p.grad, like=p), group)  # type: ignore[arg-type]
            wider = grad.dtype in LOW and weight.dtype not in LOW
            shards, dtype = Shards.of(p, **layout), moment_dtype(weight if wider else grad, group)
            kernels = _kernels(weight, grad, state, shards, rng_key)
            if group["capturable"] and group["total_steps"] is not None:
                kernels = None  # they take β₁ from the host
            exact = kernels or not (rng_key or weight.dtype in LOW or dtype in LOW)
            together = (foreach or (by_kernels and kernels)) and not coded and exact
            with nullcontext(self._open) if together else ExitStack() as stack:
                if coded:
                    stack.enter_context(dequantized_moments(state, 8, rng_key))
                if shards.mesh is not None:
                    dims = self.state_dims(group, shards.shape(grad.shape))
                    state = stack.enter_context(shards.local_state(state, dims))
                if kernels is None:
                    weight = stack.enter_context(fp32_working_copy(weight, rng_key))
                init_moments(state, grad, dtype)
                # The processes of a collective have the same weights, in the same order.
                groups = tuple(map(id, shards.groups())) if shards.mesh is not None else ()
                key = (common, kernels, count, grad.device, at_least_float32(grad), groups)
                batch = self._batches.get(key) if together else None
                if batch is None:
                    batch = _Batch(rule, kernels, *count)
                batch.entries.append(_Entry(weight, grad, state, shards, lr, decay, rng_key))
                if together:
                    self._batches[key] = batch
                else:
                    batch.take_step()

    def _count_steps(
        self, params: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> list[tuple[Any, Any]]:
        """Count a step of each weight; return the counts of all steps, and since a reset.

        They are None with `capturable`: they stay on the device.
        """
        for p, state in zip(params, states, strict=True):
            for key in ("step", "moment_step"):
                if group["capturable"] or not isinstance(state.get(key), Tensor):
                    state.setdefault(key, 0)
                    step_as_tensor(state, p, capturable=group["capturable"], key=key)
        steps = [state["step"] for state in states]
        count_up(steps)
        if group["capturable"]:
            return [(None, None)] * len(params)
        ages = read_counts([state["moment_step"] for state in states])
        return [(int(n), int(k) + 1) for n, k in zip(read_counts(steps), ages, strict=True)]


class _Entry(NamedTuple):
    """Weight, or this process's shard of it, with what its step reads; ``grad`` is a matrix."""

    weight: Tensor
    grad: Tensor
    state: State
    shards: Shards
    lr: Any  # a tensor with `capturable` alone
    weight_decay: float
    rng_key: RngKey | None

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        return self.state["exp_avg"], self.state["exp_avg_sq"]


class _Batch:
    """Weights that are stepped together: of one device, with the same counts and rule.

    Attributes:
        rule: options of the rule, from the group.
        kernels: kernels that take all of the weights, or None.
        step: number of this step; with `capturable` one for each weight, on the device.
        age: number of gradients in the moments, this one too, before a reset; as `step`.
        entries: the weights.
    """

    def __init__(self, rule: dict[str, Any], kernels: Any, step: Any, age: Any) -> None:
        self.rule, self.kernels, self.step, self.age = rule, kernels, step, age
        self.entries: list[_Entry] = []

    def take_step(self) -> None:
        """Step the weights."""
        rule = self.rule
        if self.kernels is None:
            self.by_shape = self._sort()
        counts = [e.state["moment_step"] for e in self.entries]
        if rule["capturable"]:
            self.step = torch.stack([e.state["step"] for e in self.entries]).double()
            self.age = torch.stack(counts).double() + 1
        self.shrink = cosine_factor(self.step, rule["total_steps"], rule["eta_min"])
        self.betas = rule["betas"][0] * self.shrink, rule["betas"][1]
        gap, clean = rule["update_proj_gap"], rule["reset_step"] == "clean"
        reset = (self.step > 1) & (self.step % gap == 0) if gap else False
        if clean:
            self._zero_moments(reset)
        if isinstance(reset, Tensor):
            self.count = self.age.masked_fill(reset, 1.0)
            torch._foreach_copy_(counts, self.count.unbind())
        else:
            self.count = 1 if reset else self.age
            if reset:
                torch._foreach_zero_(counts)
            count_up(counts)
        self.limit = math.inf
        if rule["state_bits"] == 8:
            age = self.count if clean else self.age
            self.limit = max_direction(age, self.betas) * bias_correction(self.count, self.betas)
        if self.kernels is None:
            self._step_eager()
        else:
            self._step_kernels()
        if not clean:
            self._zero_moments(reset)

    def _sort(self) -> list[list[_Entry]]:
        """Bring weights of one shape together, of all their shards too; return them by shape."""
        by_key: dict[Any, list[_Entry]] = {}
        for e in self.entries:
            key = (e.shards.size, e.shards.cuts, e.grad.shape, e.grad.dtype)
            by_key.setdefault(key, []).append(e)
        self.entries = list(chain.from_iterable(by_key.values()))
        return list(by_key.values())

    def _zero_moments(self, reset: Any) -> None:
        moments = [moment for e in self.entries for moment in e.moments]
        if isinstance(reset, Tensor):
            torch._foreach_mul_(moments, (1 - reset.double()).repeat_interleave(2).unbind())
        elif reset:
            torch._foreach_zero_(moments)

    def _each(self, value: Any, like: Tensor) -> Any:
        """Return a number as it is; one for each weight, on the device, as one for each matrix."""
        if not isinstance(value, Tensor):
            return value
        sizes = [e.state["norm_avg"].numel() for e in self.entries]
        if max(sizes) > 1:
            value = torch.cat([x.expand(n) for x, n in zip(value.unbind(), sizes, strict=True)])
        return value.to(like.dtype)

    @contextmanager
    def _averages(self) -> Iterator[Sequence[Tensor]]:
        """Yield the running averages, of all matrices in one vector each, to change in place."""
        parts = [e.state[key] for key in _AVERAGES for e in self.entries]
        if len(self.entries) == 1:
            yield [part.view(-1) for part in parts]
            return
        if any(part.ndim for part in parts):
            parts = [part.view(-1) for part in parts]
            whole = torch.cat(parts)
            copies = whole.split([part.numel() for part in parts])
        else:
            whole = torch.stack(parts)
            copies = whole.unbind()
        yield whole.view(len(_AVERAGES), -1).unbind()
        torch._foreach_copy_(parts, copies)

    def _bounds(self, largest: Tensor, average: Tensor) -> Tensor:
        """Update the running mean of the largest entry; return it, bias-corrected."""
        gamma = self.rule["gamma3"]
        average.mul_(gamma).add_(largest, alpha=1 - gamma)
        return average / self._each(1 - gamma**self.step, average)

    def _factors(self, norm: Tensor, mean: Tensor, square: Tensor) -> Tensor:
        """Update the running norm; return what gives it to a gradient of norm ``norm``."""
        gamma1, gamma2 = self.rule["gamma1"] * self.shrink, self.rule["gamma2"]
        if isinstance(gamma1, Tensor):
            mean.lerp_(norm, self._each(1 - gamma1, mean))
        else:
            mean.mul_(gamma1).add_(norm, alpha=1 - gamma1)
        square.mul_(gamma2).add_(norm.square(), alpha=1 - gamma2)
        root = (square / self._each(1 - gamma2**self.step, square)).sqrt() + self.rule["eps"]
        return mean / self._each(1 - gamma1**self.step, mean) / root / _positive(norm)

    def _step_kernels(self) -> None:
        entries: list[Any] = self.entries
        grads = [e.grad for e in entries]
        # Largest entry, sum of squares, bound, ratio.
        sums = torch.zeros(len(grads), 4, dtype=torch.float32, device=grads[0].device)
        call = (grads, sums.unbind(), [dispatch.SIGN] * len(grads), [(1, g.numel()) for g in grads])
        with self._averages() as (largest, mean, square):
            self.kernels.reduce_(*call)
            bounds = self._bounds(sums[:, 0], largest)
            sums[:, 2:] = torch.stack((bounds, bounds / _positive(sums[:, 0])), 1)
            self.kernels.reduce_(*call)
            factors = self._factors(sums[:, 1].sqrt(), mean, square)
        clips = torch.cat((sums[:, 2:], factors.float().unsqueeze(1)), 1).unbind()
        device, count = grads[0].device, self.count
        if isinstance(count, Tensor):
            counts = count.float().unbind()
        else:
            counts = torch.full((len(grads),), count, dtype=torch.float32, device=device).unbind()
        at, calls = 0, cast(list[Any], dispatch.split_at_rng_gaps(entries))
        for part in calls:
            some = slice(at, at + len(part))
            moments = map(list, zip(*(e.moments for e in part), strict=True))
            self.kernels.adam_(
                *([e.weight for e in part], grads[some], *moments, counts[some]),
                lr=[dispatch.lr_argument(e.lr, device) for e in part],
                betas=self.betas,
                eps=self.rule["eps"],
                weight_decay=[e.weight_decay for e in part],
                maximize=self.rule["maximize"],
                eps_before=False,
                clips=clips[some],
                max_update=self.limit,
                **dispatch.rounding(part),
            )
            at += len(part)

    def _step_eager(self) -> None:
        stacks = [_stack([e.grad for e in same_shape]) for same_shape in self.by_shape]
        shards = self.entries[0].shards
        with self._averages() as (largest, mean, square):
            most = _norms(stacks, math.inf, shards)
            bounds = _spread(self._bounds(most, largest), stacks)
            sizes = _spread(_positive(most), stacks)
            for i, (size, bound) in enumerate(zip(sizes, bounds, strict=True)):
                clipped = stacks[i] / size * bound
                stacks[i] = torch.where(stacks[i].abs() > bound, clipped, stacks[i])
            factors = self._factors(_norms(stacks, 2, shards), mean, square)
        factors = -factors if self.rule["maximize"] else factors
        for x, factor in zip(stacks, _spread(factors, stacks), strict=True):
            x.mul_(factor)
        grads = [g for x in stacks for g in x.unbind()]
        del stacks, x
        (beta1, beta2), columns = self.betas, zip(*(e.moments for e in self.entries), strict=True)
        with widened(*columns) as (means, squares):
            grads = [g.view_as(m).to(m.dtype) for g, m in zip(grads, means, strict=True)]
            torch._foreach_lerp_(means, grads, _listed(1 - beta1, means[0]))
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
            del grads
            correction = _listed(1 - beta2**self.count, squares[0])
            denominators = torch._foreach_div(squares, correction)
            torch._foreach_sqrt_(denominators)
            torch._foreach_add_(denominators, self.rule["eps"])
            updates = torch._foreach_div(means, denominators)
        if self.limit != math.inf:
            limit = self.limit * (1 - beta1**self.count)  # the rest of the bias correction follows
            torch._foreach_clamp_max_(updates, limit)
            torch._foreach_clamp_min_(updates, -limit)
        self._subtract(updates, 1 - beta1**self.count)

    def _subtract(self, updates: Sequence[Tensor], correction: Any) -> None:
        """Step the weights, each rounded once where it is of low precision."""
        weights = [e.weight for e in self.entries]
        updates = [u.reshape(w.shape) for u, w in zip(updates, weights, strict=True)]
        if isinstance(correction, Tensor):
            lr, decay = self.entries[0][4:6]  # those of all
            lr = lr.reshape(()).double() if isinstance(lr, Tensor) else lr
            sizes, decays = _listed(lr / correction, updates[0]), [lr * abs(decay)] * len(updates)
        else:
            sizes = [e.lr / correction for e in self.entries]
            decays = [1.0 - (1 - e.lr * abs(e.weight_decay)) for e in self.entries]
            if not any(decays) and len(set(sizes)) == 1:
                torch._foreach_sub_(weights, updates, alpha=sizes[0])
                return
        wide = [w.to(at_least_float32(w)) for w in weights]
        updates = [u.to(w.dtype) for u, w in zip(updates, wide, strict=True)]
        torch._foreach_mul_(updates, sizes)
        if any(e.weight_decay for e in self.entries):
            decayed = decaying(updates, wide, self.entries[0].weight_decay)  # all are of one sign
            torch._foreach_add_(updates, torch._foreach_mul(decayed, decays))
        torch._foreach_sub_(weights, updates)


def cosine_factor(step: Any, total: int | None, low: float) -> Any:
    """Return ``s``, which falls from 1 at the start to ``low`` from step ``total`` on."""
    if total is None:
        return 1.0
    if isinstance(step, Tensor):
        cosine: Any = (step.clamp(max=total) * (math.pi / total)).cos()
    else:
        cosine = math.cos(math.pi * min(step, total) / total)
    return low + (1 - low) * 0.5 * (1 + cosine)


def _listed(value: Any, like: Tensor) -> Any:
    """Return a number as it is; one for each weight, on the device, as a list."""
    return list(value.to(like.dtype).unbind()) if isinstance(value, Tensor) else value


def init_moments(state: State, grad: Tensor, dtype: torch.dtype) -> None:
    """Create the moments and the running averages where they are missing, for a matrix."""
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(grad, dtype=dtype)
        state["exp_avg_sq"] = torch.zeros_like(grad, dtype=dtype)
    if "norm_avg_sq" not in state:
        # Of each matrix in a stack, in float32: γ₃ = 0.999 is 1 in bfloat16.
        shape = (*grad.shape[:-2], 1, 1) if grad.ndim > 2 else ()
        wide = at_least_float32(grad)
        state.update({key: grad.new_zeros(shape, dtype=wide) for key in _AVERAGES})


def _kernels(
    weight: Tensor, grad: Tensor, state: State, shards: Shards, rng_key: RngKey | None
) -> Any:
    """Return the kernels that step an unsharded weight, or None."""
    kernels = dispatch.backend(grad.device.type)
    if kernels is None or shards.mesh is not None or grad.ndim > 2:
        return None
    moments = state.get("exp_avg"), state.get("exp_avg_sq")
    item = dispatch.vector(weight, grad, *moments, rng_key=rng_key)
    return kernels if grad.is_contiguous() and dispatch.is_supported(item) else None


def _positive(norm: Tensor) -> Tensor:
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)


def _stack(grads: list[Tensor]) -> Tensor:
    """Stack gradients of one shape, in float32 at least; numbers become vectors."""
    stack = grads[0].unsqueeze(0) if len(grads) == 1 else torch.stack(grads)
    stack = stack.to(at_least_float32(stack))
    return stack.unsqueeze(1) if stack.ndim == 1 else stack


def _last(stack: Tensor) -> tuple[int, ...]:
    """Return the dimensions of a matrix or a vector in a stack of them."""
    return tuple(range(-min(stack.ndim - 1, 2), 0))


def _norms(stacks: list[Tensor], order: float, shards: Shards) -> Tensor:
    """Return the norms of all matrices and vectors in one vector."""
    parts = [UNSHARDED.norm(x, order, dim=_last(x)).reshape(-1) for x in stacks]
    norms = parts[0] if len(parts) == 1 else torch.cat(parts)
    if not shards.is_sharded():
        return norms
    if order == math.inf:
        shards.max_([norms])
        return norms
    squares = norms.square()
    shards.sum_([squares])
    return squares.sqrt()


def _spread(values: Tensor, stacks: list[Tensor]) -> list[Tensor]:
    """Split what :func:`_norms` gave for the stacks, so that each value multiplies its matrix."""
    shapes = [(*x.shape[: -len(_last(x))], *[1] * len(_last(x))) for x in stacks]
    parts = values.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
