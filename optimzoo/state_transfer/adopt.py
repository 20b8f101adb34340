"""Take over a running optimizer's state, so that a run changes its optimizer on the way."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from optimzoo.core.optimizer import RoleOptimizer
from optimzoo.core.rounded import Rounded
from optimzoo.gradient_stabilizer import MOMENTS, stabilizer_of
from optimzoo.roles import role_of
from optimzoo.state_transfer.formats import Moments, check_state, read_moments
from optimzoo.state_transfer.report import CONVERTED, UNUSED, USED, AdoptedState, AdoptionReport
from optimzoo.state_transfer.sources import OldState, old_states
from optimzoo.state_transfer.targets import TORCH, Target, fill, target_of

# Options of a group on which neither the layout nor the meaning of a state depends.
_FREE = {"params", "param_names", "lr", "initial_lr", "max_lr", "min_lr", "max_momentum"}
_FREE |= {"base_momentum", "weight_decay", "weight_decay_style", "foreach", "tied"}


@torch.no_grad()
def adopt_state(new: Optimizer, old: Any, *, params: Iterable[Any] | None = None) -> AdoptionReport:
    r"""Give a new optimizer what it can use of a running one's state, and list the rest.

    So a run changes its optimizer on the way::

        muon = optimzoo.create_optimizer("muon", model, lr=1e-2)
        print(optimzoo.adopt_state(muon, adamw))
        del adamw

    - Both moments and their count, with ``t`` steps and betas ``β`` of the old optimizer, ``β'`` of
      the new one: ``m · (1 − β'ᵗ) / (1 − βᵗ)``, so that the bias-corrected moment stays what it is;
      for Stable-SPAM, all roles that a method leaves to Adam, and ``torch.optim.Adam`` and
      ``AdamW``.
    - The first moment, of ``torch.optim.SGD`` times ``(1 − μ) / (1 − dampening)``, which makes its
      sum an average: for the momentum of Muon, RMNP and SCALE's head, and of ``torch.optim.Muon``
      and ``SGD``.
    - The second moment's means over rows and over columns: for ``other="adafactor"``.
    - Everything, where a weight's old group and its new one have the same options but for rates and
      decay: the same method, its groups in any order.

    Low-rank methods take their subspace from the next gradient and start their moments anew. So
    does AdamS for masked weights: it has one count for the moments and for the ramp. Stable-SPAM,
    and any optimizer under :func:`optimzoo.stabilize`, averages gradients of norm one: moments of
    others are divided by the gradient's norm as the old second moment has it, ``√Σ v̂``. State in 8
    bits is read, that of bitsandbytes too, and rounded to codes again for ``state_bits=8``.

    The learning rate is not touched, nor is any other option:
    ``starting_values(name, model, adamw_lr=...)`` has the rates that go with AdamW's; a new
    scheduler has to be told the run's step. The state is copied, so both are in memory until the
    old optimizer is gone.

    Args:
        new: an optimizer of this library, or torch's ``Adam``, ``AdamW``, ``Muon`` or ``SGD``, that
            has not stepped.
        old: the running optimizer, of torch, bitsandbytes or this library; its ``state_dict()``; or
            a list of several that shared the parameters, as ``torch.optim.Muon`` and an AdamW.
        params: for a ``state_dict`` without names, the parameters in the order in which the old
            optimizer got them: tensors, ``(name, tensor)``, or groups.

    Returns:
        An :class:`AdoptionReport`.

    Raises:
        TypeError: ``new`` is none of these, or a wrapper around one; ``old`` is no optimizer.
        ValueError: ``new`` has stepped, or has a parameter that ``old`` has not; state of another
            shape or sharding than its parameter, or of an unknown format; a ``state_dict`` whose
            parameters are not known. ``new`` is then as it was.
    """
    _check_new(new)
    sources = old_states(old, params, new)
    rows = []
    try:
        for p, group, name in _parameters(new):
            if p not in sources:
                raise ValueError(
                    f"parameters differ: the old optimizer has no {name}; give that of the same "
                    "model, or a list of all that trained it"
                )
            source = sources.pop(p)
            outcome, detail = _adopt(new, p, group, source)
            if outcome == UNUSED:
                new.state.pop(p, None)
            label = name if group.get("param_names") else source.name
            rows.append(AdoptedState(label, role_of(p, group), outcome, detail))
    except Exception:
        for p, _, _ in _parameters(new):
            new.state.pop(p, None)
        raise
    others = "the new optimizer does not train it"
    rows += [AdoptedState(source.name, "", UNUSED, others) for source in sources.values()]
    return AdoptionReport(tuple(rows))


def _check_new(new: Any) -> None:
    name = type(new).__name__
    if not isinstance(new, Optimizer):
        raise TypeError(f"adopt_state takes a torch.optim.Optimizer, not {name}")
    if not hasattr(new, "_optimizer_step_pre_hooks"):
        raise TypeError(f"{name} wraps an optimizer; adopt the state before that is wrapped")
    rule = new._make if isinstance(new, Rounded) else type(new)
    if not issubclass(rule, (RoleOptimizer, *TORCH)):
        raise TypeError(
            f"adopt_state does not know the state of {rule.__name__}; of torch it takes "
            f"{', '.join(cls.__name__ for cls in TORCH)}"
        )
    stepped = isinstance(new, RoleOptimizer) and getattr(new, "_opt_called", False)
    if stepped or any(new.state.values()):
        raise ValueError(f"{name} has stepped already; adopt the state before its first step")


def _parameters(optimizer: Optimizer) -> Iterable[tuple[Tensor, dict[str, Any], str]]:
    """Yield an optimizer's parameters, each with its group and a name for messages."""
    count = 0
    for group in optimizer.param_groups:
        names = group.get("param_names", [])
        for i, p in enumerate(group["params"]):
            yield p, group, names[i] if names else f"parameter {count}"
            count += 1


def _adopt(new: Optimizer, p: Tensor, group: dict[str, Any], old: OldState) -> tuple[str, str]:
    """Create one parameter's state from its old one; return the outcome, and its detail."""
    check_state(old.state, p, old.name)
    stabilized = stabilizer_of(new) is not None
    if _continues(p, group, old, stabilized):
        copies = {
            k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in old.state.items()
        }
        new.state[p].update(copies)
        return USED, ", ".join(copies)
    target = target_of(new, p, group)
    if isinstance(target, str):
        return UNUSED, target
    moments = read_moments(old.state, old.group)
    normalized = stabilized or target.normalized
    lacks_first = moments.first is None and bool(target.first)
    lacks_second = moments.second is None and bool(target.second)
    if lacks_first or lacks_second:
        return UNUSED, moments.lacking
    if bool(old.group.get("maximize")) != bool(group.get("maximize")):
        return UNUSED, "one optimizer minimizes, the other maximizes"
    if moments.stabilized and not normalized:
        return UNUSED, "the old moments are of stabilized gradients"
    if normalized and not moments.stabilized and moments.second is None:
        return UNUSED, f"the rule normalises gradients, and {moments.lacking}"
    notes = fill(replace(target, normalized=normalized), moments, p, group)
    if stabilized and moments.stabilized:
        new.state[p].update({key: old.state[key].clone() for key in MOMENTS})
    return _outcome(target, moments, notes)


def _continues(p: Tensor, group: dict[str, Any], old: OldState, stabilized: bool) -> bool:
    """Return whether the old state is, as it is, what the new rule goes on with."""
    keys = (old.group.keys() | group.keys()) - _FREE
    same = old.group.keys() - _FREE == group.keys() - _FREE
    same = same and all(old.group[key] == group[key] for key in keys)
    same_device = all(v.device == p.device for v in old.state.values() if getattr(v, "ndim", 0))
    return bool(old.state) and same and same_device and stabilized == (MOMENTS[0] in old.state)


def _outcome(target: Target, moments: Moments, notes: list[str]) -> tuple[str, str]:
    second = "row_var, col_var" if target.second == "factors" else target.second
    pairs = [(moments.first_key, target.first), (moments.second_key, second)]
    before = [old for old, new in pairs if new]
    after = [new for _, new in pairs if new]
    if target.count:
        before.append("step")
        after.append(target.count)
    detail = ", ".join(before)
    detail += f" -> {', '.join(after)}" if before != after else ""
    if moments.coded:
        notes = ["from 8-bit codes", *notes]
    remarks = notes + ["with the old weight decay in them"] * moments.decayed
    return (CONVERTED if notes else USED), "; ".join([detail, *remarks])
