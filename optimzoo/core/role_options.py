"""Options that every optimizer of the package takes: rates and rules by role, and `fused`."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from torch import Tensor

from optimzoo.core.validation import check_betas, check_lr, check_nonnegative
from optimzoo.roles import ROLES

RENAMED = {"vector_betas": "other_betas", "vector_eps": "other_eps"}


class RoleRates(TypedDict, total=False):
    """Learning rates by role.

    A parameter group's own `lr` comes first, then these, `other_lr`, `lr`. None: not given.

    Attributes:
        embedding_lr: learning rate of the embedding.
        head_lr: learning rate of the output head.
        vector_lr: learning rate of vectors: norms and biases.
    """

    embedding_lr: float | Tensor | None
    head_lr: float | Tensor | None
    vector_lr: float | Tensor | None


class RoleOptions(RoleRates, total=False):
    """Rules by role, how weights decay, and whether kernels step.

    A parameter group's own value comes first, then the option of its role, then `other_*`, then
    the method's `lr`, `betas`, `eps` or `weight_decay`.

    Attributes:
        other_lr: learning rate of the roles that the method's own rule does not train.
        other_betas: Adam's betas for those roles.
        other_eps: Adam's eps for those roles.
        other_weight_decay: weight decay of those roles; vectors of `param_groups` have none.
        weight_decay_style: `decoupled` (default), or `cautious`: decoupled, but only where the
            update and the weight agree in sign (:func:`~optimzoo.core.update.decaying`), of every
            role. A group may have its own.
        fused: `None`, compiled kernels where there are any; `False`, the eager path; `True`,
            kernels, or an error that names the weight they cannot step.
    """

    other_lr: float | Tensor | None
    other_betas: tuple[float, float] | None
    other_eps: float | None
    other_weight_decay: float | None
    weight_decay_style: str | None
    fused: bool | None


class SharedOptions(RoleOptions, total=False):
    """Options of all methods with a rule for hidden weights.

    Attributes:
        maximize: ascend instead of descend.
        foreach: multi-tensor operations: hidden weights of one shape are stepped together, as a
            stack of bounded size, and so are the other roles; default: on CUDA.
        capturable: whether a step may be in a CUDA graph: counts of steps and, if it is a tensor,
            `lr` stay on the device. Subspaces are renewed by steps outside a graph.
        rounding: how a step rounds 16-bit weights: `nearest` (default), or `stochastic`, which has
            the unrounded result as its expectation and keeps Adam's moments in float32.
        seed: seed of stochastic rounding, and of the sketches of methods that draw; default: 0.
        state_bits: 8 keeps Adam's moments of 4,096 elements and up as 8-bit codes, with a float32
            scale for each 256, rounded as `rounding` says; they are float32 temporaries while their
            weight is stepped. Of sharded weights, the codes that one process has.
        other: rule of the embedding and the head: `adam` (default); `scale`, SCALE's with momentum
            on the head alone; or `adafactor`, a factored second moment (see
            :mod:`optimzoo.core.other_rules`). A group may have its own. Vectors take Adam.
    """

    maximize: bool | None
    foreach: bool | None
    capturable: bool | None
    rounding: str | None
    seed: int | None
    state_bits: int | None
    other: str | None


def check_role_options(
    method: str, options: Mapping[str, Any], matrix_roles: Sequence[str]
) -> dict[str, Any]:
    """Return the options that were given.

    Raises:
        TypeError: an unknown option.
        ValueError: an option out of range, an old name, or `other_*` of a method whose own rule
            trains every role.
    """
    option_names = [*RoleOptions.__annotations__]
    values = {key: value for key, value in options.items() if value is not None}
    for key, value in values.items():
        if key in RENAMED:
            raise ValueError(f"{key} is {RENAMED[key]} now; write {RENAMED[key]}={value}")
        if key not in option_names:
            raise TypeError(
                f"{method} has no option {key!r}; beside its own: {', '.join(option_names)}"
            )
        if key.startswith("other_") and set(matrix_roles) >= set(ROLES):
            raise ValueError(
                f"{key}={value}: the rule of {method} trains every role; give embedding_lr, "
                "head_lr or vector_lr"
            )
        if key.endswith("_lr"):
            check_lr(value, key)
    check_betas(values.get("other_betas", ()))
    names = ("other_eps", "other_weight_decay")
    check_nonnegative(**{name: values[name] for name in names if name in values})
    return values


def with_role_options(
    group: dict[str, Any], options: Mapping[str, Any], matrix_roles: Sequence[str]
) -> dict[str, Any]:
    """Return a group with what the options give its role; its own values stay.

    Raises:
        ValueError: the group has no role.
    """
    if not options:
        return group
    role = group.get("role")
    if role is None:
        raise ValueError(
            f"{next(iter(options))} needs groups that carry roles; "
            "pass optimzoo.param_groups(model)"
        )
    values = {}
    if role not in matrix_roles:
        others = {key: value for key, value in options.items() if key.startswith("other_")}
        values = {key.removeprefix("other_"): value for key, value in others.items()}
    if f"{role}_lr" in options:
        values["lr"] = options[f"{role}_lr"]
    return {**values, **group}
