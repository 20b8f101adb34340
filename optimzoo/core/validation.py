"""Checks of hyperparameters, in torch's words."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from optimzoo.lowbit import ROUNDINGS


def check_rounding(options: dict[str, Any]) -> None:
    """Refuse an unknown rounding, or a seed that stochastic rounding cannot use."""
    check_choice("rounding", options["rounding"], ROUNDINGS)
    if options["rounding"] == "stochastic" and not 0 <= options["seed"] < 1 << 62:
        raise ValueError(f"Invalid seed: {options['seed']}; it must be from 0 to 2^62 - 1")


def check_capturable(options: dict[str, Any]) -> None:
    """Refuse `capturable` beside what counts its steps in Python."""
    if options["capturable"] and options["rounding"] == "stochastic":
        raise ValueError(
            "rounding='stochastic' counts its steps in Python; it excludes capturable=True"
        )


def check_state_bits(bits: Any) -> None:
    """Raise a ValueError unless the width of the state is None or 8."""
    if bits not in (None, 8):
        raise ValueError(f"Invalid state_bits: {bits!r}; it must be None or 8")


def check_nonnegative(**values: Any) -> None:
    """Refuse hyperparameters below zero (or not a number), in torch's words."""
    for name, value in values.items():
        if not 0.0 <= value:
            raise ValueError(f"Invalid {name} value: {value}; it must be >= 0")


def check_lr(lr: Any, name: str = "learning rate") -> None:
    """Refuse a learning rate that is negative, not a number, or a tensor of several elements."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not 0.0 <= lr:
        raise ValueError(f"Invalid {name}: {lr}; it must be >= 0")


def check_betas(betas: Any, name: str = "beta parameter") -> None:
    """Refuse betas outside [0, 1)."""
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid {name} at index {i}: {beta}; it must be in [0, 1)")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse a value that is not one of ``choices``."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"Invalid {name}: {value!r}; it must be one of {', '.join(choices)}")
