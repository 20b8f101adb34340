"""SCALE by the compiled kernels: what they take, and a group's call kept for its next step."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimzoo.distributed import local_part
from optimzoo.kernels import dispatch, native
from optimzoo.lowbit import Counter
from optimzoo.roles import input_dim

States = Mapping[Tensor, dict[str, Any]]
# What decides how a group is stepped; all else is read anew at each step.
_LAYOUT = (
    *("role", "normalize", "averaged", "transposed", "stacked", "fused", "foreach"),
    *("differentiable", "rounding", "state_bits"),
)
_STATES = ("exp_avg", "exp_avg_sq", "step")


def may_fuse(group: dict[str, Any]) -> bool:
    """Whether the group's options leave it to the kernels."""
    eager = group["foreach"] or group["differentiable"] or group["normalize"] == "spectral"
    return bool(group["fused"] or (group["fused"] is None and not eager))


def has_momentum(group: dict[str, Any]) -> bool:
    """Whether the group's matrices have a moving average of their gradient."""
    return bool(group["averaged"] and group["momentum"] != 0)


def local_average(states: States, p: Tensor) -> Tensor | None:
    """This process's part of a weight's momentum, if it has one."""
    average = states.get(p, {}).get("exp_avg")
    return None if average is None else local_part(average)


class _Kept(NamedTuple):
    """A group's call: where everything lay, and the kernels' own table of it."""

    layout: tuple[Any, ...]
    places: list[int]  # of the call's tensors among the group's parameters
    addresses: list[int]  # of those parameters, then of the states that they have
    states: list[tuple[int, str]]  # of what those are: place in the call, name
    sizes: list[torch.Size]  # of the weights
    dtypes: list[torch.dtype]  # of the gradients
    kernels: native.Library
    kinds: list[int]
    shapes: list[tuple[int, int]]
    table: native.Table


class FusedSteps:
    """One optimizer's steps by the kernels.

    Finding out who takes what costs a few microseconds a tensor, as much as the step of a small
    one. So a group's last call is kept, and made again as long as its weights and its state lie
    where they lay and its gradients are of the same kind; of gradients and rates nothing is kept.
    """

    def __init__(self) -> None:
        self._kept: dict[int, _Kept] = {}
        self._scaler: dict[str, Tensor] = {}

    def scaled_by(self, optimizer: Any) -> bool:
        """Take what ``torch.amp.GradScaler`` has set on the optimizer; True if it has."""
        names = ("grad_scale", "found_inf")
        given = {name: getattr(optimizer, name, None) for name in names}
        self._scaler = {name: t.reshape(()).float() for name, t in given.items() if t is not None}
        return bool(self._scaler)

    def again(self, number: int, states: States, group: dict[str, Any]) -> bool:
        """Step group ``number`` by its kept call; False: there is none that fits."""
        kept = self._kept.get(number)
        if kept is None or kept.layout != _layout(group):
            return False
        given = group["params"]
        if len(given) != len(kept.places):
            return False
        params = [given[place] for place in kept.places]
        if [p.shape for p in params] != kept.sizes:
            return False
        grads = [p.grad for p in params]
        for grad, dtype in zip(grads, kept.dtypes, strict=True):
            if type(grad) is not Tensor or grad.dtype is not dtype or not grad.is_contiguous():
                return False
        fields: dict[str, list[Tensor | None]] = {name: [None] * len(params) for name in _STATES}
        for place, name in kept.states:
            fields[name][place] = states.get(params[place], {}).get(name)
        held = [fields[name][place] for place, name in kept.states]
        if any(type(t) is not Tensor for t in held):
            return False
        if [t.data_ptr() for t in (*params, *held)] != kept.addresses:
            return False
        counts = [step for step in fields["step"] if step is not None]
        fields["step"] = dispatch.counted(fields["step"], params[0].device)
        columns = (params, grads, *(fields[name] for name in _STATES), kept.kinds, kept.shapes)
        self._call(kept.kernels, columns, group, counts, table=kept.table)
        return True

    def step(
        self,
        number: int,
        states: States,
        group: dict[str, Any],
        matrices: list[Tensor],
        vectors: list[Tensor],
        counters: dict[Tensor, Counter],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Step what the kernels take, in one call a device; returns the rest."""
        kind = dispatch.SIGN
        if group["normalize"] != "sign":
            dim = input_dim(group["role"] or "hidden", transposed=group["transposed"])
            along_rows = (dim == -1) == (group["normalize"] == "column")
            kind = dispatch.ROWS if along_rows else dispatch.COLUMNS
        items = []
        parts = {p: local_part(p) for p in (*matrices, *vectors)}
        for p in matrices:
            m = local_average(states, p) if has_momentum(group) else None
            grad = local_part(p.grad, like=p)  # type: ignore[arg-type]
            layout = {"stacked": group["stacked"], "counter": counters.get(p)}
            items += dispatch.matrices(parts[p], grad, m, kind, **layout)
        for p in vectors:
            m, v, t = (local_part(states[p][k]) for k in _STATES)
            grad = local_part(p.grad, like=p)  # type: ignore[arg-type]
            items.append(dispatch.vector(parts[p], grad, m, v, t, counters.get(p)))
        runs, rest = dispatch.split(items, group["fused"])
        for kernels, chosen in runs:
            counts = [item.step for item in chosen if item.step is not None]
            how = dispatch.rounding(chosen)
            self._call(kernels, dispatch.columns(chosen), group, counts, **how)
        if len(runs) == 1 and not rest:
            self._keep(number, states, group, *runs[0])
        left = {id(item.whole) for item in rest}
        return [p for p in matrices if id(parts[p]) in left], [
            p for p in vectors if id(parts[p]) in left
        ]

    def _keep(
        self,
        number: int,
        states: States,
        group: dict[str, Any],
        kernels: Any,
        items: list[dispatch.Item],
    ) -> None:
        """Keep a call that was the whole group's step."""
        self._kept.pop(number, None)
        place = {id(p): i for i, p in enumerate(group["params"])}
        params = [item.param for item in items]
        plain = (
            isinstance(kernels, native.Library)
            and len(items) == len(place)
            and all(id(p) in place and type(p) in dispatch.PLAIN[:2] for p in params)
            and all(item.counter is None and item.grad.is_contiguous() for item in items)
        )
        if not plain:
            return
        fields = [list(field) for field in zip(*items, strict=True)]
        named = [
            (i, k) for i, item in enumerate(items) for k in _STATES if getattr(item, k) is not None
        ]
        held = [getattr(items[i], name) for i, name in named]
        if any(states[params[i]][name] is not t for (i, name), t in zip(named, held, strict=True)):
            return
        self._kept[number] = _Kept(
            layout=_layout(group),
            places=[place[id(p)] for p in params],
            addresses=[t.data_ptr() for t in (*params, *held)],
            states=named,
            sizes=[p.shape for p in params],
            dtypes=[item.grad.dtype for item in items],
            kernels=kernels,
            kinds=fields[5],
            shapes=fields[6],
            table=native.Table(
                (
                    *fields[:4],
                    [None] * len(items),
                    fields[4],
                    kernels.scale_scratch(params, fields[5], fields[6]),
                ),
                fields[6],
                fields[5],
            ),
        )

    def _call(
        self,
        kernels: Any,
        columns: tuple[Any, ...],
        group: dict[str, Any],
        counts: list[Tensor],
        **how: Any,
    ) -> None:
        device = columns[0][0].device
        scaler = {name: tensor.to(device) for name, tensor in self._scaler.items()}
        kernels.scale_(
            *columns,
            lr=dispatch.scalar(group["lr"], device),
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            l2=group["norm"] == "l2",
            eps=group["eps"],
            betas=group["vector_betas"],
            adam_eps=group["vector_eps"],
            maximize=group["maximize"],
            **scaler,
            **how,
        )
        for count in counts if "found_inf" in scaler else []:  # a skipped step is not counted
            count.sub_(scaler["found_inf"].to(count.device))


def _layout(group: dict[str, Any]) -> tuple[Any, ...]:
    return (*(group[name] for name in _LAYOUT), group["momentum"] != 0)
