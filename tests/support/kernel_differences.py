"""Where two builds of the CPU kernels, both without fused multiplications, differ."""

import numpy as np

ROWS, COLUMNS, SIGN, ADAM = range(4)
UNIT = 2.0**-24  # the relative error of one rounding in float32
STORED = (2.0**-24, 2.0**-8, 2.0**-11)  # of each enum oz_type
LEAST = (2.0**-149, 2.0**-133, 2.0**-24)
BLOCK = 4096  # elements that are summed in float32 before float64 takes over


def values(data, dtype):
    """float64, from memory of an enum oz_type."""
    if dtype == 0:
        return np.frombuffer(data, np.float32).astype(np.float64)
    if dtype == 2:
        return np.frombuffer(data, np.float16).astype(np.float64)
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(float)


def beyond(one, other, bound):
    """Where two arrays are further apart than `bound`; NaN is as good as NaN, of whatever bits."""
    with np.errstate(invalid="ignore"):
        same = (one == other) & (np.signbit(one) == np.signbit(other))
        near = np.abs(one - other) <= bound
    return ~(same | near | (np.isnan(one) & np.isnan(other)))


def told(name, one, other, bound=0.0):
    """What differs, in words; empty: nothing."""
    away = np.flatnonzero(beyond(one, other, np.broadcast_to(bound, one.shape)))
    if not away.size:
        return ""
    at = away[0]
    return f"{name}[{at}] is {one[at]!r} and {other[at]!r}, as {away.size} of {one.size} are apart"


def center_bound(grad, shape, dtype, rounding, eps, scale):
    """Twice the error of SWAN's rows: of the mean, of the deviation, and of what is stored."""
    g = grad.reshape(shape)
    n = min(shape[1], BLOCK)
    mean, sizes = g.mean(1, keepdims=True), np.abs(g).mean(1, keepdims=True)
    of_mean = (n + 2) * UNIT * sizes
    deviation = np.sqrt(((g - mean) ** 2).mean(1, keepdims=True))
    divisor = np.maximum(deviation, eps / abs(scale))
    of_divisor = ((n + 6) * UNIT * deviation + of_mean) / divisor
    y = np.abs(g - mean) / divisor
    error = y * (of_divisor + 4 * UNIT) + of_mean / divisor
    # One unit when to nearest; a sum that crosses a unit is rounded by other bits.
    stored = (2 if rounding else 1) * 2 * STORED[dtype] * (y + error) + 2 * LEAST[dtype]
    return (2 * error + stored).reshape(-1)


def of_a_tensor(operation, places, row, options, before, there, here):
    """What differs between what two builds wrote for one `oz_tensor`."""
    rows, cols, ptype, gtype, mtype, kind = (row[i] for i in (8, 9, 12, 13, 14, 15))
    if not rows * cols:
        return ""
    param, grad, exp_avg, exp_avg_sq, extra = (places[i] for i in (0, 1, 2, 3, 6))
    if operation == "reduce":
        one, other = (values(x[extra], 0) for x in (there, here))
        if kind == COLUMNS:
            return told("sums", one, other)
        if kind == ROWS:
            return told("sums", one, other, 2 * (cols + 3) * UNIT * np.abs(other))
        bound = np.zeros(4)
        bound[1] = 2 * (min(rows * cols, BLOCK) + 5) * UNIT * np.abs(other[1])
        return told("maximum and sum", one, other, bound)
    bound = 0.0
    if operation == "center":
        scale = 1.0
        if options.grad_scale:
            scale /= values(before[options.grad_scale], 0)[0]
        with np.errstate(invalid="ignore"):
            bound = center_bound(
                values(before[grad], gtype),
                (rows, cols),
                ptype,
                options.rounding,
                options.eps,
                scale,
            )
    faults = [told("param", values(there[param], ptype), values(here[param], ptype), bound)]
    faults += [
        told(name, values(there[place], mtype), values(here[place], mtype))
        for name, place in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq))
        if place
    ]
    return next(filter(None, faults), "")


def of_arrays(operation, places, arguments, before, there, here):
    """What differs between what two builds wrote for a history or a mask."""
    if not all(places[:2]):
        return ""  # of nothing
    if operation == "nm_mask":
        one, other = (np.frombuffer(x[places[1]], np.uint8).astype(float) for x in (there, here))
        return told("mask", one, other)
    one, other = (values(x[places[2]], 0) for x in (there, here))
    (rows, cols), (dtype, threads) = arguments[3:5], arguments[5:7]
    if operation == "history_combine" or threads == 1:
        return told("out", one, other)
    # Threads add to a float64 in the order in which they come.
    history = np.abs(values(before[places[0]], dtype)).reshape(rows, cols)
    # The vector may be the first row: the same memory, of which a region is all.
    terms = history @ np.abs(values(before[places[1]], dtype))[:cols]
    blocks = -(-cols // BLOCK)
    return told("out", one, other, 2 * UNIT * np.abs(other) + 2 * blocks * 2.0**-53 * terms)


def disagreement(operation, rows, options, before, there, here):
    """The first difference that rounding does not explain; empty: there is none.

    Args:
        operation: the function's name.
        rows: for each tensor the numbers of its regions, and the `oz_tensor`; or the arguments.
        options: `oz_options` with numbers of regions, or None.
        before: the memory of each region before the call.
        there: that of the regions written by one build.
        here: by the other.
    """
    for i, (places, row) in enumerate(rows):
        if options is None:
            fault = of_arrays(operation, places, row, before, there, here)
        else:
            fault = of_a_tensor(operation, places, row, options, before, there, here)
        if fault:
            return f"tensor {i}, {row[8:]}: {fault}"
    return ""
