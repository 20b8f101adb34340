"""The record of an optimizer, written beside its class."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch.optim.optimizer import Optimizer

Method = TypeVar("Method", bound=type[Optimizer])
RECORDS: dict[str, "OptimInfo"] = {}


@dataclass(frozen=True)
class OptimInfo:
    """One optimizer of the registry.

    Attributes:
        name: the name for :func:`create_optimizer`.
        make: the class.
        description: one line.
        source: paper or documentation.
        state: state, as text for the tables.
        aliases: other names.
        required: values for the hyperparameters that have no default; state and time do not depend
            on them.
        width_power: by role, the power of the width with which the entries of a step shrink where
            Adam's do not: 1/2 where a row, a column or the spectrum has a fixed norm
            (:func:`optimzoo.starting_values`).
    """

    name: str
    make: Callable[..., Optimizer]
    description: str
    source: str
    state: str
    aliases: tuple[str, ...] = ()
    required: Mapping[str, Any] = field(default_factory=dict)
    width_power: Mapping[str, float] = field(default_factory=dict)


def register(
    name: str, description: str, *, source: str, state: str, **more: Any
) -> Callable[[Method], Method]:
    """Register the class that it decorates under a name; see :class:`OptimInfo`."""

    def add(make: Method) -> Method:
        RECORDS[name] = OptimInfo(name, make, description, source, state, **more)
        return make

    return add
