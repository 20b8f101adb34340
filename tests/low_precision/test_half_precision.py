"""Weights of 16 bits: every method, option and path, over the records of `optimizer_db`.

float16 takes the steps that float64 takes. The gradients are float16's own numbers, the same for
both, and a weight is rounded once a step: so the two may differ by what those roundings of the
weight amount to, and by float32's own. bfloat16 takes the same steps on all paths.
"""

import copy
import inspect

import pytest
import torch
from optimizer_db import OPTIM_DB, PlannedAdamS
from torch import nn
from zoo_models import reloaded

import optimzoo
from optimzoo import AdamS, NaturalGaLore
from optimzoo.core.momentum_optimizer import MomentumOptimizer, MomentumOptions
from optimzoo.kernels import dispatch, native
from optimzoo.optimizers import apollo, galore
from optimzoo.subspace import bases

F16, F64 = torch.float16, torch.float64
SHAPES = {"tall": (12, 8), "wide": (8, 12), "embedding": (13, 6), "head": (13, 6), "vector": (8,)}
SIZES = (1e-7, 1e-4, 1.0, 1e4, "mixed")
STEPS, LR = 4, 2**-5
PATHS = ("kernels", "eager", "foreach", "fused")
OWN = {AdamS if info.optim_cls is PlannedAdamS else info.optim_cls: info for info in OPTIM_DB}
# A float32 step is off by some of its last bits; what an ill-conditioned basis makes of them.
SLACK = 2.0**-13


def registered():
    """The zoo's own methods."""
    infos = map(optimzoo.get_info, optimzoo.list_optimizers())
    return {info.make for info in infos if info.make.__module__.startswith("optimzoo.")}


def known_options(cls):
    """The options in a class's signature; of Muon and RMNP the shared ones too."""
    shared = MomentumOptions.__annotations__ if issubclass(cls, MomentumOptimizer) else {}
    return {*inspect.signature(cls).parameters, *shared}


def cases():
    for cls, info in OWN.items():
        for entry in info.optim_inputs_func(device="cpu"):
            for path in PATHS:
                if path in ("kernels", "eager") or path in known_options(cls):
                    name = f"{cls.__name__}-{entry.desc}-{path}"
                    yield pytest.param(cls, entry.kwargs, path, id=name)


def test_no_method_of_the_registry_is_left_out():
    assert registered() == set(OWN)


def options_of(cls, kwargs):
    """The options, where they have one answer at any precision."""
    options = {"lr": LR, **copy.deepcopy(kwargs)}
    if cls is AdamS:  # the first mask for the whole run: rounding may decide between near weights
        options = {"l1": 1e-3, "total_steps": 8, **options, "rounding": "stochastic", "seed": 3}
        options.pop("capturable", None)  # excluded by stochastic rounding
        options |= {"n": 1 + (options.get("n") == 3), "m": 4, "mask_every": 10}
    if issubclass(
        cls, galore.LowRankOptimizer
    ):  # a gradient of zero, in a direction that it lacks, is rounding
        options.setdefault("rank", 2)
    if options.get("side") == "both":
        options["rank"] = 1  # beyond the diagonal PᵀGQ is rounding, which Adam divides by itself
        if (
            issubclass(cls, galore.LowRankOptimizer)
            and "history" in inspect.signature(cls).parameters
        ):
            options["history"] = 1  # of numbers, not vectors, all are alike
    if options.get("history_dtype"):
        options["history_dtype"] = "auto"  # else a tie of bfloat16's may fall either way
    return options


def gradients(size, step):
    """Normal numbers of a size, rounded to float16, with zeros: a row, entries, a whole step."""
    generator = torch.Generator().manual_seed(step)
    grads = {}
    for name, shape in SHAPES.items():
        grad = torch.randn(shape, generator=generator, dtype=F64) * (step != 2)
        if size == "mixed":
            grad *= 10 ** (11 * torch.rand(shape, generator=generator, dtype=F64) - 7)
        else:
            grad *= size
        grad[step] = 0.0
        grad[torch.rand(shape, generator=generator) < 0.1] = 0.0
        grads[name] = grad.to(F16)
    return grads


def start_of(cls):
    generator = torch.Generator().manual_seed(9)
    far = 64 if cls is AdamS else 2  # so that none crosses 0, where its decay turns round
    draws = {n: torch.randn(s, generator=generator, dtype=F64) for n, s in SHAPES.items()}
    return {n: (far * LR * (x + x.sign())).to(F16) for n, x in draws.items()}


def optimizer_of(cls, start, dtype, options):
    params = {name: nn.Parameter(x.to(dtype)) for name, x in start.items()}
    roles = {name: name if name in ("embedding", "head", "vector") else "hidden" for name in params}
    groups = [{"params": [p], "role": roles[name]} for name, p in params.items()]
    return params, cls(groups, **copy.deepcopy(options))


def take_path(path, monkeypatch):
    if path == "eager":
        monkeypatch.setattr(dispatch, "backend", lambda kind: None)
        monkeypatch.setattr(native.CPU, "available", lambda: False)
    elif path != "foreach" and dispatch.backend("cpu") is None:
        pytest.skip("no CPU kernels were built")
    return {} if path in ("kernels", "eager") else {path: True}


def same_draws(monkeypatch):
    """Random matrices of float32 for all: torch draws others in float64. None of bfloat16."""
    gaussian, random_like = apollo.gaussian, bases._random_like
    monkeypatch.setattr(
        apollo, "gaussian", lambda *a: gaussian(*a[:3], a[3].float()).to(a[3].dtype)
    )
    monkeypatch.setattr(bases, "_random_like", lambda g, *a: random_like(g.float(), *a).to(g.dtype))
    monkeypatch.setattr(bases, "_has_fast_bfloat16", lambda device: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@pytest.mark.sampled(8)
@pytest.mark.parametrize(("cls", "kwargs", "path"), [*cases()])
def test_float16_weights_take_the_steps_of_float64(cls, kwargs, path, monkeypatch):
    same_draws(monkeypatch)
    options = options_of(cls, kwargs) | take_path(path, monkeypatch)
    if options.get("fused") and options.get("normalize") == "spectral":
        pytest.skip("normalize='spectral' has no fused kernel")
    exact_options = options | ({"fused": None} if path == "fused" else {})
    half_ulp = 2.0**-11 if options.get("rounding") != "stochastic" else 2.0**-10
    # Of entries that are orders apart a subspace takes differences, in which float32 has no digit.
    for size in [x for x in SIZES if x != "mixed" or not issubclass(cls, galore.LowRankOptimizer)]:
        start = start_of(cls)
        params, optimizer = optimizer_of(cls, start, F16, options)
        exact, reference = optimizer_of(cls, start, F64, exact_options)
        allowed = {name: torch.zeros(shape, dtype=F64) for name, shape in SHAPES.items()}
        for step in range(STEPS):
            before = {name: p.detach().clone() for name, p in exact.items()}
            for name, grad in gradients(size, step).items():
                params[name].grad, exact[name].grad = grad, grad.double()
            optimizer.step()
            reference.step()
            for name, p in exact.items():
                allowed[name] += half_ulp * (p.detach().abs() + allowed[name]) + 2.0**-25
                allowed[name] += SLACK * (p.detach() - before[name]).abs().max()
                away = (params[name].detach().double() - p.detach()).abs()
                worst = (away / allowed[name]).max().item()
                assert worst <= 1.0, (size, step, name, worst)


@pytest.mark.sampled(8)
@pytest.mark.parametrize(("cls", "kwargs", "path"), [*cases()])
def test_float16_gradients_at_the_ends_of_their_range(cls, kwargs, path, monkeypatch):
    """The largest number, the smallest and zero, everywhere or in one place."""
    options = options_of(cls, kwargs) | take_path(path, monkeypatch)
    if options.get("fused") and options.get("normalize") == "spectral":
        pytest.skip("normalize='spectral' has no fused kernel")
    params, optimizer = optimizer_of(cls, start_of(cls), F16, options)
    ends = (0.0, 2.0**-24, 65504.0, 0.0, -65504.0, -(2.0**-24))
    for step, end in enumerate(ends * 2):
        for p in params.values():
            p.grad = torch.full_like(p, end if step < len(ends) else 0.0)
            p.grad.view(-1)[step % 3] = end
        optimizer.step()
        states = [item for state in optimizer.state.values() for item in state.items()]
        for name, tensor in (*params.items(), *states):
            unlimited = name == "update_norm" and step == 0  # no norm as yet that limits the next
            assert unlimited or torch.isfinite(tensor).all(), (step, name)


@pytest.mark.sampled(6)
@pytest.mark.parametrize(("cls", "kwargs", "path"), [*cases()])
def test_bfloat16_weights_take_the_same_steps_on_every_path(cls, kwargs, path, monkeypatch):
    """The paths differ in the order of float32's sums, which may turn a rounding to bfloat16."""
    if "stochastic" in str(kwargs) or cls is AdamS or path == "kernels":
        pytest.skip("the other path, or moments in float32 for which float16's tests stand")
    if dispatch.backend("cpu") is None:
        pytest.skip("no CPU kernels were built")
    options = options_of(cls, kwargs)
    by_kernels = bfloat16_steps(cls, options)
    flags = take_path(path, monkeypatch)
    if flags.get("fused") and options.get("normalize") == "spectral":
        pytest.skip("normalize='spectral' has no fused kernel")
    steps = bfloat16_steps(cls, options | flags)
    for name in SHAPES:
        allowed, before = 0.0, 0.0
        for ours, theirs in zip(steps, by_kernels, strict=True):
            moved = ours[name] - before
            # In a product one turned rounding of a factor moves all, by a part of the largest.
            if issubclass(cls, galore.LowRankOptimizer) and moved.ndim > 1:
                moved = moved.abs().max()
            allowed += 2.0**-8 * (ours[name].abs() + abs(moved))
            assert ((ours[name] - theirs[name]).abs() <= allowed).all(), name
            before = ours[name]


def bfloat16_steps(cls, options):
    """Two steps from zero."""
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    params, optimizer = optimizer_of(cls, zeros, torch.bfloat16, options)
    steps = []
    for step in range(2):
        for name, grad in gradients(1.0, step).items():
            params[name].grad = grad.bfloat16()
        optimizer.step()
        steps.append({name: p.detach().double() for name, p in params.items()})
    return steps


def run(cls, options, steps, *, load=None, weights=None):
    params, optimizer = optimizer_of(cls, weights or start_of(cls), F16, options)
    if load is not None:
        optimizer.load_state_dict(reloaded(load))
    for step in steps:
        for name, grad in gradients(1e-4, step).items():
            params[name].grad = grad
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}, optimizer


def default_options(cls):
    options = options_of(cls, {})
    return options | ({"update_proj_gap": 2} if issubclass(cls, galore.LowRankOptimizer) else {})


@pytest.mark.parametrize("cls", OWN)
def test_float16_resumes_to_the_bit(cls):
    options = default_options(cls)
    whole, _ = run(cls, options, range(6))
    half, optimizer = run(cls, options, range(3))
    again, _ = run(cls, options, range(3, 6), load=optimizer.state_dict(), weights=half)
    for name, p in whole.items():
        assert torch.equal(again[name], p), name


@pytest.mark.parametrize("cls", OWN)
def test_float16_moments_are_held_in_float32(cls):
    _, optimizer = run(cls, default_options(cls), range(2))
    kinds = {t.dtype for s in optimizer.state.values() for t in s.values() if t.is_floating_point()}
    assert F16 not in kinds


@pytest.mark.parametrize("cls", OWN)
def test_a_state_with_float16_moments_goes_on_in_float32(cls):
    """As it was once saved; the squares that it has lost come back with the next gradients."""
    options = default_options(cls)
    start, optimizer = run(cls, options, range(3))
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        for key in ("exp_avg", "exp_avg_sq", "momentum_buffer", "projector_left", "history"):
            if key in state:
                state[key] = state[key].half()
    ends, optimizer = run(cls, options, range(3, 6), load=saved, weights=start)
    kinds = {t.dtype for s in optimizer.state.values() for t in s.values() if t.is_floating_point()}
    assert F16 not in kinds
    for name, p in ends.items():
        assert torch.isfinite(p).all(), name
        # The first moments are of three gradients, the squares of the next alone, at the least.
        assert (p - start[name]).abs().max() < 3 * 10 * LR * 40, name


def test_an_explicit_float16_history_stays():
    options = default_options(NaturalGaLore) | {"history_dtype": "float16"}
    start, optimizer = run(NaturalGaLore, options, range(3))
    _, optimizer = run(NaturalGaLore, options, range(2), load=optimizer.state_dict(), weights=start)
    kinds = {s["history"].dtype for s in optimizer.state.values() if "history" in s}
    assert kinds == {F16}
