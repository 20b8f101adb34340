"""An optimizer's step as one ``torch.library`` operation, which torch.compile keeps in its graph.

While a step is traced, nothing of the optimizer is read but its weights and gradients. So no guard
depends on a learning rate, a step count, or a state that is not there yet, and the graph neither
breaks nor is compiled again when a scheduler writes a rate, a subspace is refreshed, or the first
step makes the state. At run time the operation is the plain step, kernels and all: bit-equal, and
at its speed. Inductor leaves it out of CUDA graphs, in which a rate that is a number would freeze.
"""

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_live: "weakref.WeakValueDictionary[int, Optimizer]" = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(optimizer: Optimizer) -> int:
    """Register ``optimizer`` and return its number, valid as long as the optimizer lives."""
    number = next(_numbers)
    _live[number] = optimizer
    return number


def traced_step(number: int, groups: list[list[Tensor]]) -> None:
    """Step the weights of optimizer ``number`` that have a gradient, as one operation."""
    params, grads, places, place = [], [], [], 0
    for group in groups:
        for p in group:
            if p.grad is not None:
                params.append(p)
                grads.append(p.grad)
                places.append(place)
            place += 1
    if params:
        torch.ops.optimzoo.step_(params, grads, places, number)


def _step(params: list[Tensor], grads: list[Tensor], places: list[int], number: int) -> None:
    """Step ``params``, which are at ``places`` among the optimizer's, along ``grads``."""
    owner: Any = _live[number]
    owned = [p for group in owner.param_groups for p in group["params"]]
    if [id(p) for p in owned] != [id(p) for group in owner._traced[1] for p in group]:
        raise RuntimeError("a group's list of parameters was replaced; use add_param_group")
    if any(group.get("differentiable") for group in owner.param_groups):
        raise RuntimeError("a compiled step cannot be differentiated; leave differentiable=False")
    own_grads = [p.grad for p in owned]
    for p in owned:
        p.grad = None
    pairs = [(owned[place], passed) for place, passed in zip(places, params, strict=True)]
    # A functionalized graph passes copies: they hold what the graph has done so far, and the graph
    # reads back what is written to them.
    copies = [(p, passed) for p, passed in pairs if passed.data_ptr() != p.data_ptr()]
    for p, passed in copies:
        p.copy_(passed)
    try:
        for (p, _), grad in zip(pairs, grads, strict=True):
            p.grad = grad
        owner._step_once()
    finally:
        for p, own_grad in zip(owned, own_grads, strict=True):
            p.grad = own_grad
    for p, passed in copies:
        passed.copy_(p)


def _define() -> torch.library.Library:
    library = torch.library.Library("optimzoo", "DEF")
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)  # torch 2.8
    tags = () if unsafe is None else (unsafe,)
    schema = "step_(Tensor(a!)[] params, Tensor[] grads, int[] places, SymInt number) -> ()"
    library.define(schema, tags=tags)
    library.impl(
        "step_", torch._disable_dynamo(torch.no_grad()(_step)), "CompositeExplicitAutograd"
    )
    torch.library.register_fake("optimzoo::step_", lambda *_: None, lib=library)
    return library


_library = _define()
