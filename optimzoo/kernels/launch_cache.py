"""Cache of an optimizer's kernel launches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimzoo.kernels import dispatch

States = Mapping[Tensor, dict[str, Any]]
Groups = Sequence[dict[str, Any]]
_STATES = ("exp_avg", "exp_avg_sq", "step")
# Takes the backend, the arguments as lists, each group with its number of tensors, and the rest.
Launch = Callable[..., None]


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

    Args:
        launch: calls the kernels for the tensors of groups with one rule.
        layout: the options that decide how a group is stepped; all others are read at each step.
        rule: the options that all tensors of a launch share.
    """

    def __init__(self, launch: Launch, layout: Sequence[str], rule: Sequence[str]) -> None:
        self._launch, self._options, self._rule_options = launch, layout, rule
        self._launches: list[CachedLaunch] = []
        self._layouts: list[tuple[Any, ...]] = []  # of the groups of these launches
        self._new_launches: dict[
            int, tuple[Any, list[dispatch.TensorArgs]]
        ] = {}  # this step's, by group
        self._scaler: dict[str, Tensor] = {}

    def scaled_by(self, optimizer: Any) -> bool:
        """Read the tensors that ``torch.amp.GradScaler`` has set; return whether there are any."""
        names = ("grad_scale", "found_inf")
        values = {name: getattr(optimizer, name, None) for name in names}
        self._scaler = {name: t.reshape(()).float() for name, t in values.items() if t is not None}
        return bool(self._scaler)

    def replay(self, states: States, groups: Groups) -> bool:
        """Replay the cached launches; return False, with no step, if a tensor or option changed."""
        self._new_launches = {}
        if not self._launches or self._layouts != [self._layout(group) for group in groups]:
            return False
        fields = [self._fields(cached, states, groups) for cached in self._launches]
        fitting = [arguments for arguments in fields if arguments is not None]
        if len(fitting) < len(fields):
            return False
        for cached, (params, grads, state_lists) in zip(self._launches, fitting, strict=True):
            counts = [step for step in state_lists["step"] if step is not None]
            state_lists["step"] = dispatch.increment_steps(state_lists["step"], params[0].device)
            lists = (
                params,
                grads,
                *(state_lists[name] for name in _STATES),
                cached.kinds,
                cached.shapes,
            )
            sized_groups = [(groups[number], size) for number, size in cached.groups]
            self._call(cached.kernels, lists, sized_groups, counts, table=cached.table)
        return True

    def step(
        self,
        number: int,
        items: list[dispatch.TensorArgs],
        group: dict[str, Any],
        counts: Mapping[Tensor, Tensor],
    ) -> list[Tensor]:
        """Step what the kernels take, in one call per device; return the other parameters.

        Args:
            number: index of the group.
            items: the tensors of the group.
            group: the options.
            counts: count of a parameter's steps that was raised for this one, if it has any.
        """
        runs, others = dispatch.partition_by_backend(items, group["fused"])
        by_param = {id(p): count for p, count in counts.items()}
        for kernels, call in runs:
            raised = [item.step for item in call if item.step is not None]
            raised += [by_param[key] for key in {id(item.whole) for item in call} & by_param.keys()]
            rounding = dispatch.rounding(call)
            lists = dispatch.to_argument_lists(call)
            self._call(kernels, lists, [(group, len(call))], raised, **rounding)
        if len(runs) == 1 and not others:
            self._new_launches[number] = runs[0]
        return list({id(item.whole): item.whole for item in others}.values())

    def store(self, states: States, groups: Groups) -> None:
        """Cache this step's launches, if they have stepped every group as a whole."""
        new, self._new_launches, self._launches = self._new_launches, {}, []
        if any(group["params"] and number not in new for number, group in enumerate(groups)):
            return
        by_rule: dict[Any, list[int]] = {}
        for number, (_, items) in new.items():
            if not _may_cache(items, states, groups[number]):
                return
            rule = (items[0].param.device, *self._rule(groups[number]))
            by_rule.setdefault(rule, []).append(number)
        self._layouts = [self._layout(group) for group in groups]
        self._launches = [_cached_launch(new, numbers, groups) for numbers in by_rule.values()]

    def _call(
        self,
        kernels: Any,
        lists: tuple[Any, ...],
        groups: list[tuple[dict[str, Any], int]],
        counts: list[Tensor],
        **options: Any,
    ) -> None:
        """Launch the kernels for the tensors of ``groups``, each with its number of tensors."""
        device = lists[0][0].device
        scaler = {name: tensor.to(device) for name, tensor in self._scaler.items()}
        self._launch(kernels, lists, groups, **scaler, **options)
        for count in counts if "found_inf" in scaler else []:  # a skipped step is not counted
            count.sub_(scaler["found_inf"].to(count))

    def _layout(self, group: dict[str, Any]) -> tuple[Any, ...]:
        values = (group[name] for name in self._options)
        return (len(group["params"]), *values, group["momentum"] != 0)

    def _rule(self, group: dict[str, Any]) -> tuple[Any, ...]:
        values = map(group.get, self._rule_options)
        return tuple(tuple(x) if isinstance(x, list) else x for x in values)

    def _fields(
        self, cached: CachedLaunch, states: States, groups: Groups
    ) -> tuple[list[Tensor], list[Tensor], dict[str, list[Tensor | None]]] | None:
        """Return a launch's current parameters, gradients and states; None if they changed."""
        cached_groups = [groups[number] for number, _ in cached.groups]
        if any(self._rule(group) != self._rule(cached_groups[0]) for group in cached_groups):
            return None
        all_params = [p for group in cached_groups for p in group["params"]]
        params = [all_params[place] for place in cached.places]
        grads = [p.grad for p in params]
        if not all(type(grad) is Tensor and not grad.is_neg() for grad in grads):
            return None
        fields: dict[str, list[Tensor | None]] = {name: [None] * len(params) for name in _STATES}
        for place, name in cached.states:
            fields[name][place] = states.get(params[place], {}).get(name)
        tensors = [fields[name][place] for place, name in cached.states]
        if not all(type(t) is Tensor for t in tensors):
            return None
        if [t.data_ptr() for t in (*params, *tensors)] != cached.addresses:
            return None
        if _kinds([*params, *grads, *tensors]) != cached.tensors:
            return None
        return params, grads, fields


def _kinds(tensors: Sequence[Any]) -> list[tuple[torch.Size, torch.dtype, bool]]:
    """Return what kernels read of each tensor beside its address: shape, dtype, contiguity."""
    return [(t.shape, t.dtype, t.is_contiguous()) for t in tensors]


def _may_cache(items: list[dispatch.TensorArgs], states: States, group: dict[str, Any]) -> bool:
    """Return whether a call stepped the whole group, on tensors that outlive the step."""
    param_ids = {id(p) for p in group["params"]}
    return (
        len(items) == len(param_ids)
        and all(id(i.param) in param_ids and type(i.param) in dispatch.PLAIN[:2] for i in items)
        and all(i.rng_key is None and i.grad.is_contiguous() for i in items)
        and all(
            getattr(i, k) is None or states[i.param].get(k) is getattr(i, k)
            for i in items
            for k in _STATES
        )
    )


def _cached_launch(
    new: dict[int, tuple[Any, list[dispatch.TensorArgs]]], numbers: list[int], groups: Groups
) -> CachedLaunch:
    """Merge this step's calls for the groups ``numbers`` into one cached launch."""
    kernels = new[numbers[0]][0]
    items = [item for number in numbers for item in new[number][1]]
    place = {id(p): i for i, p in enumerate(p for n in numbers for p in groups[n]["params"])}
    fields = [list(field) for field in zip(*items, strict=True)]
    params, kinds, shapes = fields[0], fields[5], fields[6]
    named = [
        (i, k) for i, item in enumerate(items) for k in _STATES if getattr(item, k) is not None
    ]
    state_tensors = [getattr(items[i], k) for i, k in named]
    return CachedLaunch(
        groups=[(number, len(new[number][1])) for number in numbers],
        places=[place[id(p)] for p in params],
        addresses=[t.data_ptr() for t in (*params, *state_tensors)],
        states=named,
        tensors=_kinds([*params, *fields[1], *state_tensors]),
        kernels=kernels,
        kinds=kinds,
        shapes=shapes,
        table=kernels.scale_table(*fields[:7]),
    )
