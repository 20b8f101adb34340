"""The old optimizer's state by parameter: of optimizers, or of their `state_dict()`."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from optimzoo.state_transfer.formats import unwrapped


class OldState(NamedTuple):
    """State of one parameter in the old optimizer, the options of its group, and its name."""

    state: dict[str, Any]
    group: Mapping[str, Any]
    name: str


def old_states(old: Any, params: Iterable[Any] | None, new: Optimizer) -> dict[Tensor, OldState]:
    """Return the old state of each parameter.

    Args:
        old: an optimizer, a ``state_dict``, or several.
        params: parameters of a ``state_dict``, in its order.
        new: the optimizer whose parameters' names are those of a ``state_dict`` without `params`.

    Raises:
        TypeError: an ``old`` that is none of these.
        ValueError: parameters of a ``state_dict`` that are not known.
    """
    if isinstance(old, Mapping):
        return _of_state_dict(old, params, new)
    if params is not None:
        raise ValueError("params goes with one state_dict; an optimizer knows its parameters")
    states: dict[Tensor, OldState] = {}
    for part in old if isinstance(old, list | tuple) else [old]:
        if isinstance(part, Mapping):
            states |= _of_state_dict(part, None, new)
        elif hasattr(part, "param_groups") and hasattr(part, "state"):
            states |= _of_optimizer(part, len(states))
        else:
            raise TypeError(
                f"adopt_state takes an optimizer or its state_dict(), not {type(part).__name__}"
            )
    return states


def _of_optimizer(old: Any, first: int) -> dict[Tensor, OldState]:
    states: dict[Tensor, OldState] = {}
    for group in old.param_groups:
        names = group.get("param_names", [])
        for i, p in enumerate(group["params"]):
            name = names[i] if names else f"parameter {first + len(states)}"
            states[p] = OldState(unwrapped(old.state.get(p, {})), group, name)
    return states


def _of_state_dict(
    old: Mapping[str, Any], params: Iterable[Any] | None, new: Optimizer
) -> dict[Tensor, OldState]:
    if not {"state", "param_groups"} <= old.keys():
        raise ValueError("a state_dict has 'state' and 'param_groups'; give optimizer.state_dict()")
    keys = [(key, group) for group in old["param_groups"] for key in group["params"]]
    names = list(chain.from_iterable(g.get("param_names", []) for g in old["param_groups"]))
    if len(names) != len(keys):
        names = [str(key) if isinstance(key, str) else f"parameter {key}" for key, _ in keys]
        if params is None and not all(isinstance(key, str) for key, _ in keys):
            raise ValueError(
                "this state_dict has no names of its parameters; give params=model.parameters(), "
                "or what else the old optimizer got, in that order"
            )
    if params is None:
        by_name = _named(new)
        # One that the new optimizer does not have is listed under a tensor of its own.
        tensors = [by_name.get(name, torch.empty(0)) for name in names]
    else:
        tensors = list(_flat(params))
        if len(tensors) != len(keys):
            raise ValueError(
                f"parameters differ: the state_dict has {len(keys)}, params has {len(tensors)}"
            )
    rows = zip(tensors, keys, names, strict=True)
    return {
        p: OldState(unwrapped(old["state"].get(key, {})), group, name)
        for p, (key, group), name in rows
    }


def _flat(params: Iterable[Any]) -> Iterator[Tensor]:
    for item in params:
        if isinstance(item, Mapping):
            yield from _flat(item["params"])
        else:
            yield item[1] if isinstance(item, tuple) else item


def _named(optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        name: p
        for group in optimizer.param_groups
        for name, p in zip(group.get("param_names", []), group["params"], strict=False)
    }
