"""Starting values: learning rates by role from an AdamW's, as methods were tuned beside it."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from statistics import median
from typing import Any

import numpy as np
from torch import nn

from optimzoo.registry import get_info
from optimzoo.roles import is_position_name, matrix_view, param_groups

ROLE_RATES = {
    "hidden": "lr",
    "embedding": "embedding_lr",
    "head": "head_lr",
    "vector": "vector_lr",
}
# Options with which a method is tuned apart, and what they are without.
VARIANT = {"normalize": "column", "state_bits": None, "other": "adam", "momentum_rank": None}
# A β₂ is for a batch: what it averages over is kept in tokens (arXiv 2507.07101), within these.
BETA2 = (0.95, 0.999)
Groups = Sequence[Mapping[str, Any]]
WARMUP = 0.1  # of the steps; as in the runs that the values are from


@dataclass(frozen=True)
class StartingValues:
    """What to start a run of one method with.

    Attributes:
        name: the method's, for :func:`optimzoo.create_optimizer`.
        options: its options: ``create_optimizer(name, model, **options)``.
        overrides: those of :func:`optimzoo.param_groups` for the positions of a model whose tokens
            have a table beside them: ``create_optimizer(name, param_groups(model, overrides),
            **options)``. Empty for other models.
        clip: largest norm of the gradient, for ``clip_grad_norm_``; None: do not clip.
        warmup: steps of linear warm-up, if the number of steps was given; else their share.
        settings: the comparisons in which method and AdamW were tuned alike.
        spread: by role, the largest ratio to AdamW's rate over the smallest among the settings.
    """

    name: str
    options: dict[str, Any]
    overrides: dict[str, dict[str, float]]
    clip: float | None
    warmup: float
    settings: tuple[str, ...]
    spread: dict[str, float]

    def __str__(self) -> str:
        """Format the call and the loop's values, as Python."""
        options = [f"{key}={_text(value)}" for key, value in self.options.items()]
        model = "model"
        if self.overrides:
            rates = ", ".join(f'r"{k}": {{"lr": {v["lr"]:g}}}' for k, v in self.overrides.items())
            model = f"optimzoo.param_groups(model, {{{rates}}})"
        arguments = [f"    {argument}," for argument in (f'"{self.name}"', model, *options)]
        lines = ["optimizer = optimzoo.create_optimizer(", *arguments, ")"]
        if self.clip is not None:
            lines.append("# before each step:")
            lines.append(f"torch.nn.utils.clip_grad_norm_(model.parameters(), {self.clip:g})")
        unit = "of the steps" if self.warmup < 1 else "steps"
        lines.append(f"# linear warm-up over {self.warmup:g} {unit}, then a cosine to a tenth")
        spread = max(self.spread.values(), default=1.0)
        rows = f"{len(self.settings)} comparison{'s' * (len(self.settings) > 1)}"
        lines.append(f"# from {rows} ({', '.join(self.settings)})")
        lines += [f"# among which a rate differs by up to {spread:.1f} x"] * (spread > 1)
        return "\n".join(lines)


def starting_values(
    name: str,
    model: nn.Module | Groups | None = None,
    *,
    adamw_lr: float | Mapping[str, float] | None = None,
    batch_tokens: int | None = None,
    steps: int | None = None,
    **variant: Any,
) -> StartingValues:
    r"""Return learning rates by role, clipping, warm-up, β₂ and weight decay to start a run with.

    In each comparison of this library's tables the method and AdamW were tuned alike, with a rate
    for each role. With the ratio ρ of the method's rate of a role to
    AdamW's of hidden weights, the geometric mean over the comparisons, the rate of the role is::

        ρ · adamw_lr · (width / width of the comparison)^p

    p is 1/2 where the method's rule gives a row, a column or the spectrum of the weight a fixed
    norm, so that its entries shrink with the width where Adam's do not, and 0 elsewhere; without
    ``model`` it is 0. Between comparisons of different batches, ρ is interpolated in the logarithm
    of ``batch_tokens``. The other values are those of the comparison that is nearest to it, β₂ with
    its half-life kept in tokens, between 0.95 and 0.999.

    If ``adamw_lr`` names a role, ρ of this role is the ratio to AdamW's rate of the same role.

    A role that the method leaves to Adam starts half way, in the logarithm, from AdamW's rate of
    this role to the tuned one: it is the same rule, and what they differ by in one comparison is
    mostly another in the next.

    Learned positions and token types get the head's rate, unless they are all of the embedding and
    ``adamw_lr`` names it: each of their rows has a gradient in each step, as the head's has, while
    a step sees few of the tokens that the embedding's rate is for.

    They are starting values: of small models and short runs. Try half and twice of each rate.

    Args:
        name: one of :func:`optimzoo.list_optimizers`.
        model: the model or its groups, for the width and the positions.
        adamw_lr: the learning rate that you have for AdamW with this model and batch; by role, as
            ``{"hidden": 1e-3, "embedding": 0.03}``, if you have tuned it so: closer. Default:
            AdamW's in the comparisons, falling with the square root of the width.
        batch_tokens: tokens of a step.
        steps: steps of the run.
        **variant: options with rows of their own, as ``normalize="spectral"`` of `scale`.

    Raises:
        ValueError: an unknown name or role, a method or a variant without tuned rows, a value that
            is not positive.

    Examples:
        >>> start = optimzoo.starting_values("muon", model, adamw_lr=3e-4, steps=10_000)
        >>> optimizer = optimzoo.create_optimizer("muon", model, **start.options)
    """
    adamw_lrs = _by_role(adamw_lr)
    for key, value in (*adamw_lrs.items(), ("batch_tokens", batch_tokens), ("steps", steps)):
        if value is not None and not value > 0:
            key = "adamw_lr" if key in adamw_lrs else key
            raise ValueError(f"{key}={value}: it must be positive, or left out")
    info = get_info(name)
    tuned = _tuned(info.name, variant)
    adamw = _tuned("adamw", {})
    groups = [] if model is None else _groups(model)
    width = None if model is None else model_width(groups)
    if not adamw_lrs:
        at_width = {s: 1.0 if width is None else (_width(s) / width) ** 0.5 for s in tuned}
        base = {s: adamw[s]["values"]["lr"] * at_width[s] for s in tuned}
        adamw_lrs = {"hidden": _between(base, batch_tokens)}
    powers = dict.fromkeys(ROLE_RATES, 0.0) | dict(info.width_power)
    if variant.get("other") == "scale":
        powers["embedding"] = get_info("scale").width_power["embedding"]
    left_to_adam = set(ROLE_RATES).difference(getattr(info.make, "_matrix_roles", ROLE_RATES))
    if variant.get("other", "adam") != "adam":
        left_to_adam &= {"vector"}
    options: dict[str, Any] = {}
    spread = {}
    for role, key in ROLE_RATES.items():
        of = role if role in adamw_lrs else "hidden"
        ratio = {}
        for setting, record in tuned.items():
            grown = 1.0 if width is None else (width / _width(setting)) ** powers[role]
            adamw_values = adamw[setting]["values"]
            relative = record["values"][key] / adamw_values[key]
            if role in left_to_adam:
                relative **= 0.5
            ratio[setting] = relative * adamw_values[key] / adamw_values[ROLE_RATES[of]] * grown
        options[key] = float(f"{adamw_lrs[of] * _between(ratio, batch_tokens):.2g}")
        spread[role] = max(ratio.values()) / min(ratio.values())
    overrides = {}
    names = [n for g in groups if g.get("role") == "embedding" for n in g.get("param_names", ())]
    positions = [name for name in names if is_position_name(name)]
    if len(positions) < len(names):
        overrides = {f"^{re.escape(n)}$": {"lr": options["head_lr"]} for n in positions}
    elif names and "embedding" not in adamw_lrs:
        options["embedding_lr"] = options["head_lr"]
    nearest = min(tuned, key=lambda s: abs(math.log(_tokens(s) / (batch_tokens or _tokens(s)))))
    values = dict(tuned[nearest]["values"])
    for key in ("betas", "other_betas"):
        if key in values:
            beta1, beta2 = values[key]
            moved = beta2 ** ((batch_tokens or _tokens(nearest)) / _tokens(nearest))
            options[key] = (beta1, float(f"{min(max(moved, BETA2[0]), BETA2[1]):.4g}"))
    options |= {key: values[key] for key in ("momentum", "weight_decay") if key in values}
    options |= tuned[nearest]["hyper"] | variant
    return StartingValues(
        info.name,
        options,
        overrides,
        values.get("clip") or None,
        WARMUP if steps is None else max(1, round(WARMUP * steps)),
        tuple(tuned),
        spread if len(tuned) > 1 else {},
    )


def model_width(model: nn.Module | Groups) -> float:
    """Return the width of a model, or of its groups: of hidden weights the median shorter side.

    Raises:
        ValueError: there is no hidden weight.
    """
    sides = [
        min(matrix_view(p, stacked=group.get("stacked", False)).shape[-2:])
        for group in _groups(model)
        if group.get("role") == "hidden"
        for p in group["params"]
    ]
    if not sides:
        raise ValueError("there is no hidden weight to take the width of; leave the model out")
    return float(median(sides))


def _by_role(adamw_lr: float | Mapping[str, float] | None) -> dict[str, float]:
    if adamw_lr is None:
        return {}
    rates = dict(adamw_lr) if isinstance(adamw_lr, Mapping) else {"hidden": adamw_lr}
    if "hidden" not in rates or not rates.keys() <= ROLE_RATES.keys():
        raise ValueError(
            f"adamw_lr={adamw_lr}: by role it takes hidden and any of "
            f"{', '.join(role for role in ROLE_RATES if role != 'hidden')}"
        )
    return rates


def _groups(model: nn.Module | Groups) -> Groups:
    if isinstance(model, nn.Module):
        return param_groups(model)
    if isinstance(model, str) or not all(isinstance(group, Mapping) for group in model):
        raise ValueError(f"model={model!r:.60}: it must be a module, or its param_groups")
    return model


@cache
def tuned_settings() -> dict[str, Any]:
    """Return by comparison its batch, width and methods, from the file that is shipped."""
    text = resources.files("optimzoo").joinpath("tuned_rates.json").read_text(encoding="utf-8")
    settings: dict[str, Any] = json.loads(text)
    return settings


def _width(setting: str) -> float:
    return float(tuned_settings()[setting]["width"])


def _tokens(setting: str) -> int:
    return int(tuned_settings()[setting]["batch_tokens"])


def _tuned(name: str, variant: Mapping[str, Any]) -> dict[str, Any]:
    """Return by setting the record of the method with the variant's options."""
    records, calls = {}, []
    for setting, values in tuned_settings().items():
        for record in values["methods"]:
            calls.append(_call(record["optimizer"], record["variant"]))
            if record["optimizer"] == name and record["variant"] == variant:
                records[setting] = record
    if not records:
        raise ValueError(
            f"{_call(name, variant)} has no tuned rows to start from; there are "
            f"{', '.join(sorted(set(calls)))}"
        )
    return records


def _call(name: str, variant: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key}={value!r}" for key, value in variant.items())
    return f"{name} ({options})" if options else name


def _between(values: dict[str, float], batch_tokens: int | None) -> float:
    """Return the geometric mean over settings, or what lies at a batch, flat beyond the ends."""
    by_batch: dict[int, list[float]] = {}
    for setting, value in values.items():
        by_batch.setdefault(_tokens(setting), []).append(math.log(value))
    points = sorted((math.log(batch), sum(v) / len(v)) for batch, v in by_batch.items())
    if batch_tokens is None:
        return math.exp(sum(y for _, y in points) / len(points))
    batches, logs = zip(*points, strict=True)
    return math.exp(float(np.interp(math.log(batch_tokens), batches, logs)))


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value).replace("'", '"')
