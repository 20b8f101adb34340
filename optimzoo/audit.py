"""Audit of parameter groups: roles, sizes, learning rates, weight decay."""

from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from optimzoo.core.record import RECORDS
from optimzoo.roles import param_groups
from optimzoo.tuned_rates import ROLE_RATES, VARIANT, starting_values

_FAR = 8.0


def describe(groups: Any, *, width: int = 80) -> str:
    """Return an audit of parameter groups, a line each: role, tensors, parameters, an example.

    Of an optimizer each group's learning rate is shown, and below them the starting value of each
    role whose rate is more than eight times from it: :func:`optimzoo.starting_values`, for the rate
    that the hidden weights have. If a group has a weight decay, each group's is shown; ``-`` is the
    optimizer's, not known yet.

    Args:
        groups: what :func:`optimzoo.param_groups` returned, an optimizer, or a model.
        width: columns to keep within.
    """
    optimizer = groups if isinstance(groups, Optimizer) else None
    if isinstance(groups, nn.Module):
        groups = param_groups(groups)
    groups = getattr(groups, "param_groups", groups)
    total = sum(p.numel() for g in groups for p in g["params"]) or 1
    columns = [] if optimizer is None else [("lr", "lr", 9)]
    columns += [("weight_decay", "decay", 8)] if any(g.get("weight_decay") for g in groups) else []
    head = "".join(f"{title:>{size}}" for _, title, size in columns)
    lines = [f"{'role':<10}{'tensors':>8}{'parameters':>15}{'share':>7}{head}  example"]
    for group in groups:
        role = group.get("role") or "by shape"
        count = sum(p.numel() for p in group["params"])
        notes = [flag for flag in ("transposed", "stacked") if group.get(flag)]
        notes += ["tied"] if group.get("tied") else []
        note = f" ({', '.join(notes)})" if notes else ""
        row = f"{role:<10}{len(group['params']):>8}{count:>15,}{count / total:>7.1%}"
        row += "".join(f"{_number(group.get(key)):>{size}}" for key, _, size in columns) + "  "
        if group["params"]:
            first, shape = group["params"][0], "x".join(map(str, group["params"][0].shape))
            name = group.get("param_names", [f"{first.ndim}-D tensor"])[0]
            example = _shorten(f"{name} [{shape}]", width - len(row) - len(note)) + note
            row += _shorten(example, width - len(row))
        lines.append(row.rstrip())
    roles = {group.get("role") for group in groups}
    if None not in roles and "head" not in roles:
        lines.append("no output head was found: name it with overrides={'REGEX': 'head'}")
    return "\n".join(lines + ([] if optimizer is None else _far_rates(optimizer)))


def _number(value: Any) -> str:
    return "-" if value is None else format(float(value), ".3g")


def _far_rates(optimizer: Optimizer) -> list[str]:
    """Return a line for each role whose rate is far from its starting value.

    Nothing is said of methods that were not tuned, or where no group is of hidden weights.
    """
    name = next((r.name for r in RECORDS.values() if type(optimizer) is r.make), None)
    # Of the groups of a role the first: a later one has rates of its own.
    rates = {g.get("role"): float(g["lr"]) for g in reversed(optimizer.param_groups)}
    if name is None or not rates.get("hidden"):
        return []
    hidden = next(g for g in optimizer.param_groups if g.get("role") == "hidden")
    variant = {
        key: hidden[key] for key, plain in VARIANT.items() if hidden.get(key, plain) != plain
    }
    try:
        start = starting_values(name, optimizer.param_groups, **variant).options
    except ValueError:
        return []
    lines = []
    for role, key in ROLE_RATES.items():
        value = start[key] / start["lr"] * rates["hidden"]
        if role in rates and not 1 / _FAR <= rates[role] / value <= _FAR:
            lines.append(
                f"{role}: lr {rates[role]:.3g}, starting value {value:.2g} for this hidden lr"
            )
    return lines


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= max(width, 8) else "…" + text[-(max(width, 8) - 1) :]
