"""SCALE's step by the compiled kernels, with a cache of their launches."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimzoo.core.rule import looks_ahead
from optimzoo.core.update import signed_decay
from optimzoo.distributed import local_part
from optimzoo.kernels import dispatch
from optimzoo.lowbit import STEP, RngKey
from optimzoo.roles import input_dim

States = Mapping[Tensor, dict[str, Any]]
# Options that decide how a group is stepped; all others are read at each step.
_LAYOUT = (
    *("role", "normalize", "averaged", "transposed", "stacked", "fused", "foreach"),
    *("differentiable", "rounding", "state_bits", "spectral_norm", "nesterov"),
)
# Options that all tensors of a call share; the learning rate and the decay may differ.
_RULE = ("momentum", "nesterov", "norm", "eps", "other_betas", "other_eps", "maximize")
_STATES = ("exp_avg", "exp_avg_sq", "step")
Groups = Sequence[dict[str, Any]]


def may_fuse(group: dict[str, Any]) -> bool:
    """Return whether the group's options allow the kernels.

    Raises:
        RuntimeError: ``fused=True`` and Nesterov's momentum where no kernel has it.
    """
    eager = group["foreach"] or group["differentiable"] or group["normalize"] == "spectral"
    eager = eager or (group["spectral_norm"] and group["role"] in (None, "hidden"))
    if group["nesterov"] and has_momentum(group):
        kind = _kernel_kind(group)
        no_kernel = not all(looks_ahead(p, kind) for p in group["params"])
        if no_kernel and group["fused"]:
            raise RuntimeError(
                "nesterov=True with fused=True normalises rows alone on a CPU; leave fused=None"
            )
        eager = eager or no_kernel
    return bool(group["fused"] or (group["fused"] is None and not eager))


def has_momentum(group: dict[str, Any]) -> bool:
    """Return whether the group's matrices have a moving average of their gradient."""
    return bool(group["averaged"] and group["momentum"] != 0)


def local_average(states: States, p: Tensor) -> Tensor | None:
    """Return this process's shard of a weight's momentum, or None if it has no momentum."""
    average = states.get(p, {}).get("exp_avg")
    return None if average is None else local_part(average)


class CachedLaunch(NamedTuple):
    """Cached launch for one or more groups: the tensors' addresses and the kernels' table."""

    groups: list[tuple[int, int]]  # index of the group, number of its tensors
    places: list[int]  # indices of the call's tensors among the parameters of these groups
    addresses: list[int]  # of the parameters, then of their states
    states: list[tuple[int, str]]  # index of the tensor in the call, name of the state
    tensors: list[tuple[torch.Size, torch.dtype, bool]]  # `_kinds` of weights, gradients, states
    kernels: Any
    kinds: list[int]
    shapes: list[tuple[int, int]]
    table: Any  # of the kernels


class LaunchCache:
    """Cache of one optimizer's kernel launches.

    Choosing the kernels takes a few microseconds per tensor, as much as the step of a small one. So
    a step's launches are cached, one for all groups with the same rule, and replayed as long as
    weights and state keep their addresses and gradients their shape, dtype and layout. Gradients
    and learning rates are read at each step.
    """

    def __init__(self) -> None:
        self._launches: list[CachedLaunch] = []
        self._layouts: list[tuple[Any, ...]] = []  # of the groups of these launches
        self._new_launches: dict[
            int, tuple[Any, list[dispatch.TensorArgs]]
        ] = {}  # this step's, by group
        self._scaler: dict[str, Tensor] = {}

    def scaled_by(self, optimizer: Any) -> bool:
        """Read the tensors that ``torch.amp.GradScaler`` has set; return whether there are any."""
        names = ("grad_scale", "found_inf")
        given = {name: getattr(optimizer, name, None) for name in names}
        self._scaler = {name: t.reshape(()).float() for name, t in given.items() if t is not None}
        return bool(self._scaler)

    def replay(self, states: States, groups: Groups) -> bool:
        """Replay the cached launches; return False, with no step, if a tensor or option changed."""
        self._new_launches = {}
        if not self._launches or self._layouts != [_layout(group) for group in groups]:
            return False
        fields = [_fields(kept, states, groups) for kept in self._launches]
        fitting = [found for found in fields if found is not None]
        if len(fitting) < len(fields):
            return False
        for kept, (params, grads, held) in zip(self._launches, fitting, strict=True):
            counts = [step for step in held["step"] if step is not None]
            held["step"] = dispatch.increment_steps(held["step"], params[0].device)
            columns = (params, grads, *(held[name] for name in _STATES), kept.kinds, kept.shapes)
            own = [(groups[number], size) for number, size in kept.groups]
            self._call(kept.kernels, columns, own, counts, table=kept.table)
        return True

    def step(
        self,
        number: int,
        states: States,
        group: dict[str, Any],
        matrices: list[Tensor],
        vectors: list[Tensor],
        rng_keys: dict[Tensor, RngKey],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Step what the kernels take, in one call per device; return the other parameters."""
        kind = _kernel_kind(group)
        items = []
        parts = {p: local_part(p) for p in (*matrices, *vectors)}
        for p in matrices:
            m = local_average(states, p) if has_momentum(group) else None
            grad = local_part(p.grad, like=p)  # type: ignore[arg-type]
            layout = {"stacked": group["stacked"], "rng_key": rng_keys.get(p)}
            items += dispatch.matrices(parts[p], grad, m, kind, **layout)
        for p in vectors:
            m, v, t = (local_part(states[p][k]) for k in _STATES)
            grad = local_part(p.grad, like=p)  # type: ignore[arg-type]
            items.append(dispatch.vector(parts[p], grad, m, v, t, rng_keys.get(p)))
        runs, rest = dispatch.partition_by_backend(items, group["fused"])
        for kernels, chosen in runs:
            counts = [item.step for item in chosen if item.step is not None]
            here = {id(item.whole) for item in chosen}
            counts += [states[p][STEP] for p in rng_keys if id(parts.get(p)) in here]
            how = dispatch.rounding(chosen)
            own = [(group, len(chosen))]
            self._call(kernels, dispatch.to_argument_lists(chosen), own, counts, **how)
        if len(runs) == 1 and not rest:
            self._new_launches[number] = runs[0]
        left = {id(item.whole) for item in rest}
        return [p for p in matrices if id(parts[p]) in left], [
            p for p in vectors if id(parts[p]) in left
        ]

    def store(self, states: States, groups: Groups) -> None:
        """Cache this step's launches, if they have stepped every group as a whole."""
        made, self._new_launches, self._launches = self._new_launches, {}, []
        if any(group["params"] and number not in made for number, group in enumerate(groups)):
            return
        by_rule: dict[Any, list[int]] = {}
        for number, (_, items) in made.items():
            if not _may_cache(items, states, groups[number]):
                return
            rule = (items[0].param.device, *_rule(groups[number]))
            by_rule.setdefault(rule, []).append(number)
        self._layouts = [_layout(group) for group in groups]
        self._launches = [_cached_launch(made, numbers, groups) for numbers in by_rule.values()]

    def _call(
        self,
        kernels: Any,
        columns: tuple[Any, ...],
        groups: list[tuple[dict[str, Any], int]],
        counts: list[Tensor],
        **how: Any,
    ) -> None:
        """Launch the kernels for the tensors of ``groups``, each with its number of tensors."""
        device = columns[0][0].device
        scaler = {name: tensor.to(device) for name, tensor in self._scaler.items()}
        lr: list[Any] = []
        weight_decay: list[float] = []
        for group, size in groups:
            lr += [dispatch.lr_argument(group["lr"], device)] * size
            weight_decay += [signed_decay(group)] * size
        group = groups[0][0]
        kernels.scale_(
            *columns,
            lr=lr,
            momentum=group["momentum"],
            weight_decay=weight_decay,
            l2=group["norm"] == "l2",
            eps=group["eps"],
            betas=group["other_betas"],
            adam_eps=group["other_eps"],
            maximize=group["maximize"],
            nesterov=group["nesterov"],
            **scaler,
            **how,
        )
        for count in counts if "found_inf" in scaler else []:  # a skipped step is not counted
            count.sub_(scaler["found_inf"].to(count))


def _kernel_kind(group: dict[str, Any]) -> int:
    """Return along what the group's matrices are normalised, as kernels call it."""
    if group["normalize"] == "sign":
        return dispatch.SIGN
    dim = input_dim(group["role"] or "hidden", transposed=group["transposed"])
    return dispatch.ROWS if (dim == -1) == (group["normalize"] == "column") else dispatch.COLUMNS


def _layout(group: dict[str, Any]) -> tuple[Any, ...]:
    return (len(group["params"]), *(group[name] for name in _LAYOUT), group["momentum"] != 0)


def _rule(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(tuple(x) if isinstance(x, list) else x for x in map(group.get, _RULE))


def _fields(
    kept: CachedLaunch, states: States, groups: Groups
) -> tuple[list[Tensor], list[Tensor], dict[str, list[Tensor | None]]] | None:
    """Return a cached launch's current parameters, gradients and states; None if they changed."""
    own = [groups[number] for number, _ in kept.groups]
    if any(_rule(group) != _rule(own[0]) for group in own):
        return None
    given = [p for group in own for p in group["params"]]
    params = [given[place] for place in kept.places]
    grads = [p.grad for p in params]
    if not all(type(grad) is Tensor and not grad.is_neg() for grad in grads):
        return None
    fields: dict[str, list[Tensor | None]] = {name: [None] * len(params) for name in _STATES}
    for place, name in kept.states:
        fields[name][place] = states.get(params[place], {}).get(name)
    held = [fields[name][place] for place, name in kept.states]
    if not all(type(t) is Tensor for t in held):
        return None
    if [t.data_ptr() for t in (*params, *held)] != kept.addresses:
        return None
    if _kinds([*params, *grads, *held]) != kept.tensors:
        return None
    return params, grads, fields


def _kinds(tensors: Sequence[Any]) -> list[tuple[torch.Size, torch.dtype, bool]]:
    """Return what kernels read of each tensor beside its address: shape, dtype, contiguity."""
    return [(t.shape, t.dtype, t.is_contiguous()) for t in tensors]


def _may_cache(items: list[dispatch.TensorArgs], states: States, group: dict[str, Any]) -> bool:
    """Return whether a call stepped the whole group, on tensors that outlive the step."""
    known = {id(p) for p in group["params"]}
    return (
        len(items) == len(known)
        and all(id(i.param) in known and type(i.param) in dispatch.PLAIN[:2] for i in items)
        and all(i.rng_key is None and i.grad.is_contiguous() for i in items)
        and all(
            getattr(i, k) is None or states[i.param].get(k) is getattr(i, k)
            for i in items
            for k in _STATES
        )
    )


def _cached_launch(
    made: dict[int, tuple[Any, list[dispatch.TensorArgs]]], numbers: list[int], groups: Groups
) -> CachedLaunch:
    """Merge this step's calls for the groups ``numbers`` into one cached launch."""
    kernels = made[numbers[0]][0]
    items = [item for number in numbers for item in made[number][1]]
    place = {id(p): i for i, p in enumerate(p for n in numbers for p in groups[n]["params"])}
    fields = [list(field) for field in zip(*items, strict=True)]
    params, kinds, shapes = fields[0], fields[5], fields[6]
    named = [
        (i, k) for i, item in enumerate(items) for k in _STATES if getattr(item, k) is not None
    ]
    held = [getattr(items[i], k) for i, k in named]
    return CachedLaunch(
        groups=[(number, len(made[number][1])) for number in numbers],
        places=[place[id(p)] for p in params],
        addresses=[t.data_ptr() for t in (*params, *held)],
        states=named,
        tensors=_kinds([*params, *fields[1], *held]),
        kernels=kernels,
        kinds=kinds,
        shapes=shapes,
        table=kernels.scale_table(*fields[:7]),
    )
