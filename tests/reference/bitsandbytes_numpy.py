"""bitsandbytes' 8-bit state in float64 NumPy: its dynamic codes and its blocks.

A code has a sign (of first moments), a number of zeros that is a power of ten, a one that ends
them, and a linear fraction in the bits that are left.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def dynamic_values(*, signed: bool) -> Array:
    """The 256 numbers of the codes, sorted."""
    values = [0.0, 1.0]
    for zeros in range(7):
        count = 2 ** (6 - zeros) if signed else 2 ** (7 - zeros)
        edges = np.linspace(0.1, 1.0, count + 1)
        fractions = 10.0**-zeros * (edges[:-1] + edges[1:]) / 2
        values += [*fractions, *(-fractions if signed else [])]
    assert len(values) == 256
    return np.sort(np.array(values))


def quantized(x: Array, *, signed: bool, block: int) -> tuple[NDArray[np.uint8], Array, Array]:
    """The nearest codes of the row-major elements, their values, and the blocks' magnitudes."""
    values = dynamic_values(signed=signed)
    flat = x.reshape(-1)
    blocks = [flat[at : at + block] for at in range(0, flat.size, block)]
    absmax = np.array([np.abs(part).max() for part in blocks])
    codes = [
        np.abs(part[:, None] / size - values).argmin(1)
        for part, size in zip(blocks, absmax, strict=True)
    ]
    return np.concatenate(codes).astype(np.uint8).reshape(x.shape), values, absmax


def decoded(codes: NDArray[np.uint8], values: Array, absmax: Array, block: int) -> Array:
    """The numbers that codes stand for."""
    flat = values[codes.reshape(-1)]
    sizes = np.repeat(absmax, block)[: flat.size]
    return (flat * sizes).reshape(codes.shape)


def adam_state(first: Array, second: Array, step: int, block: int = 256) -> dict[str, Any]:
    """The state of one parameter of `AdamW8bit`, as arrays; small ones stay in float32."""
    if first.size < 4096:
        return {"step": step, "state1": first, "state2": second}
    state: dict[str, Any] = {"step": step}
    for number, moment in (("1", first), ("2", second)):
        codes, values, absmax = quantized(moment, signed=number == "1", block=block)
        state |= {f"state{number}": codes, f"qmap{number}": values, f"absmax{number}": absmax}
    return state
