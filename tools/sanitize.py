"""Run every CUDA kernel on small, odd tensors, under a checker::

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tools/sanitize.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python tools/sanitize.py

Without PyTorch's cache each tensor is an allocation of its own, so that memcheck sees its ends.
"""

import itertools
import sys
from typing import Any

import torch

SHAPES = [(1, 1), (1, 129), (129, 1), (7, 129), (64, 64), (33, 1000), (100, 264), (3, 9000)]
LONG = [(2, 20000), (2, 40000)]  # rows in shared memory: in float32, in 16 bits
TYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS, COLUMNS, SIGN, ADAM = range(4)


def tensor(shape: tuple[int, ...], dtype: torch.dtype, device: str, offset: int) -> torch.Tensor:
    """Return random numbers that begin `offset` elements into their storage and end with it."""
    size = 1
    for length in shape:
        size *= length
    store = torch.randn(size + offset, device=device).to(dtype)
    return store[offset:].view(shape)


def scale(kernels: Any, device: str, types: tuple[torch.dtype, ...], offset: int) -> None:
    """Run all kinds, with momentum for every other tensor and with both roundings."""
    param, grad, state = types
    shapes = [*SHAPES, *LONG] * 4
    kinds = [kind for kind in range(4) for _ in range(len(shapes) // 4)]
    params = [tensor(s, param, device, offset) for s in shapes]
    grads = [tensor(s, grad, device, offset) for s in shapes]
    averaged = [k == ADAM or i % 2 == 0 for i, k in enumerate(kinds)]
    moments = [
        tensor(s, state, device, offset) if a else None
        for s, a in zip(shapes, averaged, strict=True)
    ]
    squares = [
        tensor(s, state, device, offset).abs() if k == ADAM else None
        for s, k in zip(shapes, kinds, strict=True)
    ]
    steps = [torch.ones((), device=device) if k == ADAM else None for k in kinds]
    rule = {"momentum": 0.9, "l2": False, "eps": 1e-8, "betas": (0.9, 0.99), "adam_eps": 1e-8}
    for seed in (None, 1):
        kernels.scale_(
            *(params, grads, moments, squares, steps, kinds, shapes),
            lr=torch.tensor(0.1, device=device),
            weight_decay=0.1,
            maximize=True,
            seed=seed,
            nesterov=seed is not None,
            **rule,
        )


def adam(kernels: Any, device: str, types: tuple[torch.dtype, ...], offset: int) -> None:
    """Run Adam with a mask, with clipping, and for the direction alone."""
    param, grad, state = types
    params = [tensor(s, param, device, offset) for s in SHAPES]
    grads = [tensor(s, grad, device, offset) for s in SHAPES]
    moments = [tensor(s, state, device, offset) for s in SHAPES]
    squares = [tensor(s, state, device, offset).abs() for s in SHAPES]
    steps = [torch.ones((), device=device) for _ in SHAPES]
    masks = [
        torch.randint(256, (-(-p.numel() // 8),), dtype=torch.uint8, device=device) for p in params
    ]
    clips = [torch.tensor([0.5, 0.5, 1.5], device=device) for _ in SHAPES]
    extras: list[dict[str, Any]] = [
        {"masks": masks, "l1": 0.1, "alpha": 0.5},
        {"clips": clips, "seed": 3},
        {"direction": True},
    ]
    for extra in extras:
        kernels.adam_(
            *(params, grads, moments, squares, steps),
            lr=0.1,
            betas=(0.9, 0.99),
            eps=1e-8,
            weight_decay=0.1,
            maximize=False,
            eps_before=False,
            **extra,
        )


def others(kernels: Any, device: str, types: tuple[torch.dtype, ...], offset: int) -> None:
    """Run the sums, the step along a scaled gradient, and SWAN's row normalisation."""
    param, grad, _ = types
    params = [tensor(s, param, device, offset) for s in SHAPES]
    grads = [tensor(s, grad, device, offset) for s in SHAPES]
    for kind in (ROWS, COLUMNS, SIGN):
        sizes = [{ROWS: r, COLUMNS: c, SIGN: 4}[kind] for r, c in SHAPES]
        outs = [torch.zeros(n, device=device) for n in sizes]
        kinds = [kind] * len(SHAPES)
        kernels.reduce_(grads, outs, kinds, SHAPES)
        kernels.apply_(params, grads, outs, kinds, SHAPES, lr=0.1, weight_decay=0.1, seed=1)
    kernels.center_(params, grads, SHAPES, eps=1e-8)


def run(kernels: Any, device: str) -> int:
    """Run all operations, for equal and mixed types, aligned and not; return how many ran."""
    mixes = [*((t, t, t) for t in TYPES), (TYPES[1], TYPES[1], TYPES[0]), tuple(TYPES)]
    cases = [*itertools.product((scale, adam, others), mixes, (0, 1))]
    for operation, types, offset in cases:
        operation(kernels, device, types, offset)
    return len(cases)


def main() -> int:
    """Run all cases on the GPU; return 1 if there is none."""
    from optimzoo.kernels import native

    if not native.CUDA.available():
        print(f"nothing was run: {native.CUDA.why_not()}", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    count = run(native.CUDA, "cuda")
    torch.cuda.synchronize()
    print(f"{count} cases ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
