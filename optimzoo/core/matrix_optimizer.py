"""Optimizers with a rule of their own for the hidden weights; Adam trains the rest."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optimzoo import stacks
from optimzoo.core.adam import (
    adam_step,
    bias_correction,
    count_up,
    init_adam_state,
    max_direction,
    read_counts,
    step_as_tensor,
)
from optimzoo.core.optimizer import RoleOptimizer, scalar_lr, signed_decay
from optimzoo.core.other_rules import OTHER_RULES
from optimzoo.core.role_options import SharedOptions
from optimzoo.core.rule import Context, Matrix, Rule
from optimzoo.core.update import subtract_each_
from optimzoo.core.validation import (
    check_betas,
    check_capturable,
    check_choice,
    check_lr,
    check_nonnegative,
    check_rounding,
    check_state_bits,
)
from optimzoo.distributed import UNSHARDED, Shards, local_part
from optimzoo.kernels import dispatch
from optimzoo.lowbit import (
    LOW,
    RngKey,
    dequantized_moments,
    fp32_working_copy,
    moment_dtype,
    widened,
)
from optimzoo.roles import ROLES, matrix_view, role_of
from optimzoo.stacks import State

REST_DEFAULTS: dict[str, Any] = {
    "role": None,
    "transposed": False,
    "stacked": False,
    # torch adds this default on a load; there from the start, a load leaves the groups alike.
    "differentiable": False,
}


# Options of Adam that parameters which are stepped together share, beside the decay.
_ADAM = ("betas", "eps", "maximize", "foreach", "capturable")


class MatrixOptimizer(RoleOptimizer, Rule):
    """Base of the matrix methods: a subclass is the rule of the hidden weights.

    Subclasses define :meth:`direction` and list their own options' checks in
    :meth:`_check_options`. This class counts steps, applies learning rate and decay, and rounds;
    with `foreach`, by default on a GPU, it steps weights of one shape together. Groups hold `lr`,
    `betas`, `eps`, `weight_decay`, `maximize`, `foreach`, `rounding`, `seed` and `state_bits`.
    """

    _eps_before: ClassVar[bool] = True  # the others' Adam adds eps before the bias correction

    _options: ClassVar[type] = SharedOptions

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], **options: Unpack[SharedOptions]
    ) -> None:
        shared: dict[str, Any] = {"maximize": False, "foreach": None, "capturable": False}
        shared |= {"rounding": "nearest", "seed": 0, "state_bits": None, "other": "adam"}
        others: dict[str, Any] = dict(options)
        settings = {name: others.pop(name, None) for name in shared}
        shared |= {name: value for name, value in settings.items() if value is not None}
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
            check_capturable(options)
            self._check_other(options["other"])
            self._check_options(options)
        super().add_param_group(group)

    def _check_options(self, options: dict[str, Any]) -> None:
        """Refuse the subclass's own options where they are out of range."""

    def _check_other(self, other: str) -> None:
        check_choice("other", other, ("adam", *OTHER_RULES))
        if other != "adam" and set(self._matrix_roles) >= set(ROLES):
            raise ValueError(
                f"other={other!r}: {type(self).__name__} trains every role by its own rule; "
                "leave it out"
            )

    def _step_matrices(
        self,
        params: list[tuple[int, Tensor]],
        group: dict[str, Any],
        rng_keys: dict[Tensor, RngKey],
    ) -> None:
        """Step weights by the method's own rule."""
        self._step_by(self, params, group, rng_keys)

    def _step_by(
        self,
        rule: Rule,
        params: list[tuple[int, Tensor]],
        group: dict[str, Any],
        rng_keys: dict[Tensor, RngKey],
    ) -> None:
        """Step weights by a rule: alike ones together on a GPU, else one by one."""
        matrices = self._matrices(rule, params, group)
        if rule is self and any(matrix.shards is not UNSHARDED for matrix in matrices):
            sharded = [matrix for matrix in matrices if matrix.shards.is_sharded()]
            self._step_sharded(sharded, group, rng_keys)
            matrices = [matrix for matrix in matrices if not matrix.shards.is_sharded()]
        keys = [_key(matrix, group) for matrix in matrices]
        for indices in stacks.batches(keys, lambda i: _largest(matrices[i])):
            batch = [matrices[i] for i in indices]
            if len(batch) == 1:
                self._step_alone(rule, batch[0], group, rng_keys)
            else:
                self._step_stack(rule, batch, group, rng_keys)

    def _matrices(
        self, rule: Rule, params: list[tuple[int, Tensor]], group: dict[str, Any]
    ) -> list[Matrix]:
        """Count a step of each weight and return what its rule reads."""
        states = [self.state[p] for _, p in params]
        steps = [0] * len(params)
        if rule.counts_steps:
            steps = count_steps(states, [p for _, p in params], group["capturable"])
        layout = {key: bool(group[key]) for key in ("transposed", "stacked")}
        matrices = []
        for (position, p), state, step in zip(params, states, steps, strict=True):
            rule.init_state(p, state, group)
            weight, grad, shards = p, p.grad, Shards.of(p, **layout)
            if layout["transposed"] or p.ndim > 2 or shards is not UNSHARDED:
                weight = oriented(local_part(p), group)
                grad = as_matrix(local_part(grad, like=p), group)  # type: ignore[arg-type]
            matrices.append(Matrix(p, weight, grad, state, shards, position, step))  # type: ignore[arg-type]
        return matrices

    def _step_sharded(
        self, matrices: list[Matrix], group: dict[str, Any], rng_keys: dict[Tensor, RngKey]
    ) -> None:
        """Step matrices of which each process has a part, by the method's own rule."""
        for matrix in matrices:
            self._step_alone(self, matrix, group, rng_keys)

    def _step_alone(
        self, rule: Rule, matrix: Matrix, group: dict[str, Any], rng_keys: dict[Tensor, RngKey]
    ) -> None:
        shards, rng_key = matrix.shards, rng_keys.get(matrix.param)
        grad = descent(matrix.grad, group, matrix.weight.dtype)
        dims = rule.state_dims(group, shards.shape(grad.shape))
        with (
            matrix.opened_state(dims, group, rng_key) as state,
            fp32_working_copy(matrix.weight, rng_key) as weight,
        ):
            step = matrix.step
            if isinstance(step, Tensor):
                step = step.double()
            if _is_due(rule, matrix, state, group):
                _refresh(rule, matrix, grad, state, group)
            context = Context(step, matrix.position, shards, weight)
            update = rule.direction(grad, state, group, context)
            update.subtract_from(weight, lr=step_lr(group), weight_decay=signed_decay(group))

    def _step_stack(
        self,
        rule: Rule,
        batch: list[Matrix],
        group: dict[str, Any],
        rng_keys: dict[Tensor, RngKey],
    ) -> None:
        numbers = [rng_keys.get(matrix.param) if rng_keys else None for matrix in batch]
        step = batch[0].step
        if isinstance(step, Tensor):
            step = torch.stack([matrix.step for matrix in batch]).double().view(-1, 1, 1)
        context = Context(step, batch[0].position, UNSHARDED, None)
        with ExitStack() as codes:
            if group["state_bits"] == 8:
                for matrix, number in zip(batch, numbers, strict=True):
                    codes.enter_context(dequantized_moments(matrix.state, 8, number))
            if _is_due(rule, batch[0], batch[0].state, group):  # so all are: of one age
                for matrix in batch:
                    grad = descent(matrix.grad, group, matrix.weight.dtype)
                    _refresh(rule, matrix, grad, matrix.state, group)
            stack = stacks.StateStack([matrix.state for matrix in batch], rule.numbers)
            grad = descent(torch.stack([m.grad for m in batch]), group, batch[0].weight.dtype)
            update = rule.direction(grad, stack, group, context)
            stack.write_back()
        dense = update.dense()
        del grad, stack  # before there is one more tensor of the stack's size
        dense = dense.float() if dense.dtype in LOW else dense
        lr = step_lr(group)
        size = lr * update.scale
        if isinstance(size, Tensor):
            size = size.view(-1, *(1,) * (dense.ndim - 1)).to(dense.dtype)
            dense, size = dense * size, 1.0
        weights = [matrix.weight for matrix in batch]
        rates: Any = {"size": size, "lr": lr, "weight_decay": signed_decay(group)}
        subtract_each_(weights, dense.unbind(), numbers, **rates)

    def _update(self) -> None:
        self._check_graph_capture()
        first = self.first_index
        others: dict[Any, list[tuple[Tensor, RngKey | None, float | Tensor]]] = {}
        for group in self.param_groups:
            if group["capturable"]:  # the device has the weights' counts
                group["calls"] = _calls(group, self.state)
            with dispatch.fused(group["fused"], local_params(group)):
                rng_keys = self._count(group, first)
                params = self._update_group(group, first, rng_keys)
            if params:
                key = (group["fused"], *map(_hashable, _adam_options(group).values()))
                lr = scalar_lr(group)
                others.setdefault(key, []).extend((p, rng_keys.get(p), lr) for p in params)
            first += len(group["params"])
        for (fused, *options), rows in others.items():
            with dispatch.fused(fused):
                params, numbers, rates = map(list, zip(*rows, strict=True))
                rule: Any = dict(zip((*_ADAM, "weight_decay"), options, strict=True))
                self._step_others(params, numbers, lr=rates, **rule)

    def _update_group(
        self, group: dict[str, Any], first: int, rng_keys: dict[Tensor, RngKey]
    ) -> list[Tensor]:
        """Step the group but for the parameters that are returned: Adam steps them with others."""
        matrices, others = [], []
        by_other_rule: list[tuple[int, Tensor]] = []
        for position, p in enumerate(group["params"], start=first):
            grad = p.grad
            if grad is None:
                continue
            if grad.is_sparse:
                self._refuse_sparse(grad)
            self.state[p]  # there even if empty: a distributed checkpoint asks for each
            if self._is_own(p, group):
                matrices += [(position, p)] * (p.numel() > 0)
            elif group["other"] != "adam" and role_of(p, group) in ("embedding", "head"):
                by_other_rule += [(position, p)] * (p.numel() > 0)
            else:
                self._init_other(p, group)
                if group["state_bits"] == 8:  # one after the other: their moments are wide
                    t, betas = self.state[p]["step"] + 1, group["betas"]
                    t = t if group["capturable"] else int(t)
                    rule = _adam_options(group)
                    rule["max_update"] = max_direction(t, betas) * bias_correction(t, betas)
                    with dequantized_moments(self.state[p], 8, rng_keys.get(p)):
                        self._step_others([p], [rng_keys.get(p)], lr=scalar_lr(group), **rule)
                else:
                    others.append(p)
        self._step_matrices(matrices, group, rng_keys)
        if by_other_rule:
            self._step_by(OTHER_RULES[group["other"]], by_other_rule, group, rng_keys)
        return others

    def _is_own(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Return whether the method's own rule steps a parameter, and not Adam."""
        return role_of(p, group) in self._matrix_roles

    def _init_other(self, p: Tensor, group: dict[str, Any]) -> None:
        dtype = moment_dtype(p, group)
        init_adam_state(self.state[p], p, capturable=group["capturable"], dtype=dtype)

    def _step_others(
        self, params: list[Tensor], rng_keys: list[RngKey | None], **rule: Any
    ) -> None:
        """Step parameters of the other roles by Adam."""
        rule["eps_before"] = self._eps_before
        adam_step(params, self.state, rng_keys=rng_keys, **rule)


def _adam_options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: group[name] for name in _ADAM} | {"weight_decay": signed_decay(group)}


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _key(matrix: Matrix, group: dict[str, Any]) -> Any:
    """Return what weights that are stepped together have in common; None: it is stepped alone."""
    weight, state = matrix.weight, matrix.state
    if matrix.shards.mesh is not None or not stacks.stackable(weight, group["foreach"]):
        return None
    layout = [t.shape for t in state.values()] + [t.dtype for t in state.values()]
    step = None if isinstance(matrix.step, Tensor) else matrix.step
    return (weight.shape, weight.dtype, matrix.grad.dtype, weight.device, step, *state, *layout)


def _largest(matrix: Matrix) -> int:
    return max(t.numel() for t in (matrix.weight, *matrix.state.values()))


def _is_due(rule: Rule, matrix: Matrix, state: State, group: dict[str, Any]) -> bool:
    step = group["calls"] if group["capturable"] else matrix.step
    return rule.refresh_due(state, group, step) and not is_capturing()


def _refresh(rule: Rule, matrix: Matrix, grad: Tensor, state: State, group: dict[str, Any]) -> None:
    step = group["calls"] if group["capturable"] else matrix.step
    context = Context(step, matrix.position, matrix.shards, matrix.weight)
    rule.refresh(grad, state, group, context)


def _calls(group: dict[str, Any], states: Mapping[Tensor, State]) -> int:
    """Return how many steps outside of CUDA graphs the group has had, with this one if it is."""
    if "calls" not in group and not is_capturing():  # `capturable` since this step, maybe
        steps = [states[p]["step"] for p in group["params"] if "step" in states.get(p, {})]
        released = all(p.grad is None for p in group["params"])  # this step is in the counts
        group["calls"] = int(max(read_counts(steps), default=0)) - released
    calls: int = group.get("calls", 0)
    if not is_capturing():
        return calls + 1
    if not calls:
        raise RuntimeError(
            "the first step, which creates the state, cannot be in a CUDA graph; call step() once, "
            "then capture"
        )
    return calls


def is_capturing() -> bool:
    """Return whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def step_lr(group: dict[str, Any]) -> float | Tensor:
    """Return the learning rate: a number, or a 0-dim tensor that the host does not read."""
    lr = scalar_lr(group)
    return lr if group["capturable"] else float(lr)


def kernel_items(
    p: Tensor,
    average: Tensor | None,
    group: dict[str, Any],
    rng_key: RngKey | None,
    *,
    split: bool = False,
) -> list[dispatch.TensorArgs]:
    """Return a weight's matrices as kernels read them; none if it is sharded or no kernel takes it.

    Args:
        p: the weight.
        average: its momentum, laid out as the weight is.
        group: the options.
        rng_key: of stochastic rounding.
        split: whether the matrices of a stack are apart, although rows are normalised first.
    """
    turned = oriented(p, group) is not p
    if hasattr(p, "device_mesh") or (turned and rng_key is not None):
        return []  # whose elements are counted in the order of the matrix
    kind = dispatch.COLUMNS if turned else dispatch.ROWS
    layout = {"stacked": group["stacked"], "rng_key": rng_key}
    items = dispatch.matrices(p, p.grad, average, dispatch.COLUMNS if split else kind, **layout)
    items = [item._replace(kind=kind) for item in items]
    return items if all(map(dispatch.is_supported, items)) else []


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


def descent(grad: Tensor, group: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """Return the direction of descent, at least in the weight's ``dtype``, as the moments are.

    A float16 gradient in float32: products of it, its ratios and its moments leave float16's range.
    """
    grad = grad if grad.dtype == dtype else grad.to(torch.promote_types(grad.dtype, dtype))
    grad = grad.float() if grad.dtype == torch.float16 else grad
    return -grad if group["maximize"] else grad


def count_steps(
    states: Sequence[State], params: Sequence[Tensor], capturable: bool = False
) -> list[Any]:
    """Count one step in each state; return the numbers, from 1, or the tensors if capturable."""
    for state, param in zip(states, params, strict=True):
        if "step" not in state:
            state["step"] = 0
            step_as_tensor(state, local_part(param), capturable=capturable)
    steps = [state["step"] for state in states]
    if not steps:
        return []
    count_up(steps)
    if capturable:
        return steps
    return [int(step) for step in read_counts(steps)]


def adam_direction(state: State, grad: Tensor, group: dict[str, Any], step: Any) -> Tensor:
    """Update Adam's moments in ``state`` and return ``m / (√v + eps)``, without bias correction."""
    beta1, beta2 = group["betas"]
    if "exp_avg" not in state:
        dtype = moment_dtype(grad, group)
        state["exp_avg"] = torch.zeros_like(grad, dtype=dtype)
        state["exp_avg_sq"] = torch.zeros_like(grad, dtype=dtype)
    m, v = stacks.moments_of(state)
    if m.shape != grad.shape:
        raise ValueError(
            f"moments of {list(m.shape)} for a gradient of {list(grad.shape)}, rank={group['rank']}"
            ": the state is of another rank or method; begin with a new optimizer"
        )
    most = max_direction(step, group["betas"]) if group["state_bits"] else math.inf
    direction = None if isinstance(most, Tensor) else _fused_direction(m, v, grad, group, most)
    if direction is not None:
        return direction
    with widened([m], [v]) as ([mean], [square]):
        grad = grad.to(mean.dtype)
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        direction = mean / (square.sqrt() + group["eps"])
    if isinstance(most, Tensor) or most != math.inf:
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
    if not dispatch.is_supported(dispatch.vector(direction, grad, m, v)):
        return None
    rule = {"lr": 0.0, "weight_decay": 0.0, "maximize": False, "eps_before": True}
    rule |= {"betas": group["betas"], "eps": group["eps"], "direction": True}
    rule["max_update"] = most
    kernels.adam_([direction], [grad], [m], [v], [None], **rule)
    return direction
