"""``optimzoo doctor``: which kernels this machine has, why others are missing, and a check."""

import platform
from typing import Any

import torch
from torch import Tensor

from optimzoo.core.adam import adam
from optimzoo.core.rule import take_into_average
from optimzoo.kernels import dispatch, native
from optimzoo.optimizers.scale import normalized
from optimzoo.optimizers.sinkgd import sinkhorn

_SHAPES = ((129, 65), (7, 2048), (64, 1))


def check(kernels: Any, device: str) -> dict[str, float]:
    """Return the largest error of each kernel against the eager rule, in float32, by name."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> list[Tensor]:
        return [torch.randn(s, generator=generator).to(device) for s in _SHAPES]

    def worst(values: list[Tensor], expected: list[Tensor]) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(values, expected, strict=True))

    errors = {}
    none: list[Tensor | None] = [None] * len(_SHAPES)
    for name, kind, dim, nesterov in (
        ("scale by rows", dispatch.ROWS, -1, False),
        ("scale by columns", dispatch.COLUMNS, -2, False),
        ("rmnp", dispatch.ROWS, -1, True),
    ):
        params, grads, averages = normal(), normal(), normal() if nesterov else none
        followed = [
            g if m is None else take_into_average(g, m.clone(), 0.9, nesterov=True)
            for g, m in zip(grads, averages, strict=True)
        ]
        directions = [
            normalized(g, dim=dim, normalize="column", norm="rms", eps=1e-8) for g in followed
        ]
        expected = [p - 0.1 * u for p, u in zip(params, directions, strict=True)]
        kinds = [kind] * len(_SHAPES)
        kernels.scale_(
            *(params, grads, averages, none, none, kinds, _SHAPES),
            lr=0.1,
            momentum=0.9,
            nesterov=nesterov,
            weight_decay=0.0,
            l2=False,
            eps=1e-8,
            betas=(0.9, 0.999),
            adam_eps=1e-8,
            maximize=False,
        )
        errors[name] = worst(params, expected)
    params, grads, exp_avgs = normal(), normal(), normal()
    exp_avg_sqs = [v.abs() for v in normal()]
    others = [[t.clone() for t in part] for part in (params, exp_avgs, exp_avg_sqs)]
    rule: dict[str, Any] = {
        "lr": 0.1,
        "betas": (0.9, 0.999),
        "eps": 1e-3,
        "weight_decay": 0.1,
        "maximize": False,
    }
    steps = [torch.ones((), device=device) for _ in _SHAPES]
    kernels.adam_(params, grads, exp_avgs, exp_avg_sqs, steps, eps_before=True, **rule)
    counts = [torch.zeros(()) for _ in _SHAPES]
    adam(others[0], grads, others[1], others[2], counts, foreach=False, capturable=False, **rule)
    errors["adam"] = worst(params, others[0])
    if not isinstance(kernels, native.Library) or kernels.kind == "cpu":
        params, grads = normal(), normal()
        expected = [p - 0.1 * sinkhorn(g, 5) for p, g in zip(params, grads, strict=True)]
        kinds, scaled = [dispatch.ROWS] * len(_SHAPES), {"lr": 0.1, "weight_decay": 0.0}
        kernels.sinkhorn_(params, grads, kinds, _SHAPES, iterations=5, maximize=False, **scaled)
        errors["sinkhorn"] = worst(params, expected)
    return errors


def _described(kernels: Any) -> str:
    """Describe available kernels: instruction set and threads, architectures, or ROCm."""
    if not isinstance(kernels, native.Library):
        return "" if torch.version.hip is None else "on ROCm, where nobody but you has tested them"
    if kernels.kind == "cuda":
        return kernels.built_for()
    threads = "" if kernels.threaded() else ", in one thread: its compiler had no OpenMP"
    return f"{kernels.variant()}{threads}"


def eager_accelerators() -> list[str]:
    """Return the device types that torch finds here and that have no kernels."""
    there = {"mps": torch.backends.mps.is_available(), "xpu": torch.xpu.is_available()}
    return [device_type for device_type, available in there.items() if available]


def main() -> int:
    """Print the report; return 1 if a kernel gives wrong results, not if one is missing."""
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}")
    wrong = False
    pairs = [(device, b) for device, backends in dispatch.BACKENDS.items() for b in backends]
    for device, kernels in pairs:
        native_one = isinstance(kernels, native.Library)
        name = f"{device}, {'native' if native_one else 'Triton'}:"
        if not kernels.available():
            none_at_all = not any(b.available() for b in dispatch.BACKENDS[device])
            eager = none_at_all and (device == "cpu" or torch.cuda.is_available())
            print(f"{name:<14} none{', every step is eager' * eager}; {kernels.why_not()}")
            if native_one and (built_for := kernels.built_for()):
                print(f"  {kernels.path.name} is {built_for}")
            continue
        print(f"{name:<14} {_described(kernels)}".rstrip())
        for kernel, error in check(kernels, device).items():
            good = error < 1e-5
            wrong |= not good
            print(f"  {kernel:<18} largest error {error:.1e}  {'ok' if good else 'WRONG'}")
    for device in eager_accelerators():
        print(f"{device + ':':<14} none, every step is eager; there are no kernels for {device}")
    return int(wrong)
