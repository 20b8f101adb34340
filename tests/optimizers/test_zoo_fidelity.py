"""Each low-rank and spectral method against its independent float64 transcription, step by step.

Tall, wide and square weights, single rows and columns, odd sizes, convolutions and stacks, with the
embedding, head and vectors that Adam trains beside them; a schedule, and gradients that are missing
in some steps.
"""

import numpy as np
import pytest
import torch
from reference.spectral_numpy import whitened_exact
from zoo_runs import GAP, HIDDEN, SHAPES, compare

from optimzoo import (
    APOLLO,
    RMNP,
    SWAN,
    APOLLOMini,
    Fira,
    GaLore,
    Muon,
    NaturalGaLore,
    SinkGD,
    StableSPAM,
)
from optimzoo.optimizers.swan import normalize_rows
from optimzoo.subspace.newton_schulz import whiten

# Of the way that the weights have gone, which is at most a tenth of the weights themselves.
LIMITS = {torch.float64: 1e-8, torch.float32: 2e-3}
# The oracle's Fisher matrix is k x k.
SMALL = [name for name in SHAPES if not name.startswith("odd")]

DECAY = {"weight_decay": 0.1}
UP = {"maximize": True, "weight_decay": 0.1}
CAUTIOUS = {"weight_decay": 0.5, "weight_decay_style": "cautious"}
SVD = {"update_proj_gap": GAP, "projector": "svd"}
# At a refresh P^T G Q is diagonal, and the rest of it rounding: Adam divides that by eps.
BOTH = {"side": "both", "eps": 1e-2}
SIDES = {"auto": {}, "left": {"side": "left"}, "right": {"side": "right"}, "both": BOTH}


def turning(cases):
    """Each case as published, and with the moments rotated at a refresh."""
    return {
        f"{name}{'-rotate' * rotate}": {**hyper, "rotate": rotate}
        for name, hyper in cases.items()
        for rotate in (False, True)
    }


GALORE = {
    **turning({side: {**SVD, "rank": 4, **hyper} for side, hyper in SIDES.items()}),
    **turning({f"rank{r}": {**SVD, "rank": r} for r in (1, 5, 200)}),
    **turning({"power": {**SVD, "projector": "power", "rank": 3}}),
    **turning({"randomized": {"update_proj_gap": GAP, "rank": 3}}),
    "decay": {**SVD, **DECAY, "rank": 4},
    "up": {**SVD, **UP, "rank": 4},
    "cautious": {**SVD, **CAUTIOUS, "rank": 4},
    "betas": {**SVD, "betas": (0.7, 0.95), "eps": 1e-3, "scale": 1.0, "rank": 4},
    "gap1": {**SVD, "update_proj_gap": 1, "rank": 2},
}
HISTORY = {**SVD, "rank": 3, "history": 4}
NATURAL = {
    **turning({side: {**HISTORY, **hyper} for side, hyper in SIDES.items()}),
    **turning({"long": {**HISTORY, "history": 13}}),  # always reaches over a refresh
    **turning({"never-full": {**HISTORY, "history": 40, "rank": 2}}),
    **turning({"relative": {**HISTORY, "relative_damping": True, "damping": 0.1}}),
    "relative-long": {**HISTORY, "relative_damping": True, "history": 40, "rank": 1},
    "damping": {**HISTORY, "damping": 30.0},
    "rank1": {**HISTORY, "rank": 1},
    "history1": {**HISTORY, "history": 1},
    "power": {**HISTORY, "projector": "power", "rotate": True},
    "randomized": {**HISTORY, "projector": "randomized", "rotate": True},
    "decay": {**HISTORY, **DECAY},
    "cautious": {**HISTORY, **CAUTIOUS},
    "up": {**HISTORY, **UP},
}
FIRA = {
    **turning({side: {**SVD, "rank": 4, **SIDES[side]} for side in ("auto", "left", "right")}),
    **turning({"one": {**SVD, "rank": 4, "residual_scale": "one"}}),
    "rank1": {**SVD, "rank": 1},
    "rank200": {**SVD, "rank": 200},
    "randomized": {"update_proj_gap": GAP, "rank": 3},
    "limiter": {**SVD, "rank": 3, "limiter": 1.5, "scale": 1.0},
    "decay": {**SVD, **DECAY, "rank": 4},
    "cautious": {**SVD, **CAUTIOUS, "rank": 4},
    "up": {**SVD, **UP, "rank": 4, "residual_scale": "one"},
}
APOLLO_CASES = {
    f"{kind}-{'front-' * front}rank{rank}": {
        "update_proj_gap": GAP,
        "scale_type": kind,
        "scale_front": front,
        "rank": rank,
        "scale": 4.0,
    }
    for kind in ("channel", "tensor")
    for front in (False, True)
    for rank in (1, 3, 200)
}
APOLLO_CASES |= {
    "limiter": {"update_proj_gap": GAP, "rank": 5, "limiter": 1.5},
    "decay": {"update_proj_gap": GAP, "rank": 5, **DECAY},
    "cautious": {"update_proj_gap": GAP, "rank": 5, **CAUTIOUS},
    "up": {"update_proj_gap": GAP, "rank": 5, **UP},
}
MINI = {
    "plain": {"update_proj_gap": GAP},
    "up": {"update_proj_gap": GAP, **UP},
    "cautious": {"update_proj_gap": GAP, **CAUTIOUS},
}
SWAN_CASES = {
    "plain": {},
    "beta0.8": {"beta": 0.8, "steps": 6},
    "raw": {"rescale": False, "steps": 3},
    "decay": DECAY,
    "cautious": CAUTIOUS,
    "up": {**UP, "eps": 1e-3},
}
SINKGD = {
    "default": {},
    "once": {"iterations": 1, "alpha": 1.0},
    "long": {"iterations": 12, "alpha": 0.3},
    "decay": {**DECAY, "alpha": 1.0},
    "cautious": {**CAUTIOUS, "alpha": 1.0},
    "up": {**UP, "eps": 1e-3},
    "spectral norm": {**DECAY, "alpha": 8.0, "spectral_norm": True},
}
SPAM = {
    f"{kind}{'-cosine' * bool(total)}": {
        "update_proj_gap": GAP,
        "reset_step": kind,
        "total_steps": total,
    }
    for kind in ("clean", "authors")
    for total in (None, 20)
}
SPAM |= {
    "no-reset": {},
    "bf16-script": {"gamma1": 0.85, "gamma2": 0.99999, "update_proj_gap": 7},
    "tight": {"gamma3": 0.5, "eta_min": 0.1, "total_steps": 31, "betas": (0.8, 0.9)},
    "decay": DECAY,
    "cautious": CAUTIOUS,
    "up": {**UP, "update_proj_gap": 5, "reset_step": "authors"},
}
MUON = {
    "default": {},
    "plain": {"nesterov": False, "momentum": 0.8},
    "rms": {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 4},
    "unclamped": {"adjust_lr_fn": "spectral_unclamped", "ns_steps": 7},
    "triples": {"ns_coefficients": [(4.0, -6.0, 3.0), (2.0, -1.5, 0.5)]},
    "decay": {**DECAY, "other_weight_decay": 0.2},
    "cautious": {**CAUTIOUS, "other_weight_decay": 0.7},
    "up": {**UP, "other_eps": 0.1, "other_betas": (0.8, 0.99)},
    **{f"rank{r}": {"momentum_rank": r} for r in (1, 3, 5, 7, 200)},
    "rank2-plain": {"momentum_rank": 2, "nesterov": False, "momentum": 0.8, **UP},
}
RMNP_CASES = {
    "default": {},
    "plain": {"nesterov": False, "momentum": 0.8},
    "rms": {"adjust_lr_fn": "match_rms_adamw"},
    "decay": {**DECAY, "other_weight_decay": 0.2},
    "cautious": {**CAUTIOUS, "other_weight_decay": 0.7},
    "up": {**UP, "other_eps": 0.1, "other_betas": (0.8, 0.99)},
}
OTHERS = {
    f"{other}{name}": {"other": other, **hyper}
    for other in ("scale", "adafactor")
    for name, hyper in (
        *(("", {}), ("-up", UP), ("-beta2", {"other_betas": (0.7, 0.9)})),
        ("-cautious", CAUTIOUS),
    )
}
CASES = {
    (make, name): hyper
    for make, cases in (
        (GaLore, GALORE),
        (NaturalGaLore, NATURAL),
        (Fira, FIRA),
        (APOLLO, APOLLO_CASES),
        (APOLLOMini, MINI),
        (SWAN, {**SWAN_CASES, **OTHERS}),
        (SinkGD, SINKGD),
        (StableSPAM, SPAM),
        (Muon, {**MUON, **OTHERS}),
        (RMNP, RMNP_CASES),
    )
    for name, hyper in cases.items()
}


@pytest.mark.sampled(8)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{case[1]}")
def test_follows_the_reference(case, dtype):
    names = SMALL if case[0] is NaturalGaLore and CASES[case]["rank"] > 1 else SHAPES
    hyper = CASES[case]
    if case[0] is Muon:  # by default some CPUs iterate in bfloat16
        hyper = {**hyper, "ns_dtype": dtype}
    worst, gone = compare(case[0], hyper, dtype, names=names)
    assert max(worst.values()) < LIMITS[dtype], worst
    for name, way in gone.items():
        assert way > 3e-4, f"{name} went {way} of its size"


def test_natural_galore_follows_the_papers_form_too():
    """The oracle's two solvers agree; ours is a third form of the same inverse."""
    hyper = {**HISTORY, "damping": 1.0, "rotate": True}
    worst, _ = compare(NaturalGaLore, hyper, torch.float64, oracle={"solver": "woodbury"})
    assert max(worst.values()) < LIMITS[torch.float64], worst


def test_a_reset_is_by_default_that_of_the_published_code():
    oracle = {"reset_step": "authors"}
    hyper = {"update_proj_gap": GAP}
    worst, _ = compare(StableSPAM, hyper, torch.float64, names=["tall", "wide"], oracle=oracle)
    assert max(worst.values()) < LIMITS[torch.float64], worst


def test_the_references_would_notice():
    """The distance is large where the two are told different things."""
    differences = [
        (GaLore, {**SVD, "rank": 4}, {"scale": 0.26}),
        (GaLore, {**SVD, "rank": 4, "rotate": True}, {"rotate": False}),
        (GaLore, {**SVD, "rank": 4}, {"eps": 1e-3}),
        (NaturalGaLore, HISTORY, {"history": 5}),
        (NaturalGaLore, HISTORY, {"damping": 0.1}),
        (Fira, {**SVD, "rank": 4}, {"limiter": 1.02}),
        (Fira, {**SVD, "rank": 4}, {"residual_scale": "one"}),
        (APOLLO, APOLLO_CASES["channel-rank3"], {"scale_front": True, "scale": 4.4}),
        (SWAN, {}, {"steps": 4}),
        (Muon, {"momentum_rank": 3}, {"momentum_rank": 4}),
        (Muon, {"momentum_rank": 3}, {"momentum_rank": None}),
        (SinkGD, {}, {"iterations": 4}),
        (SinkGD, {}, {"alpha": 0.051}),
        (SinkGD, {"spectral_norm": True, "alpha": 8.0}, {"power_iterations": 3}),
        (StableSPAM, SPAM["clean"], {"reset_step": "authors"}),
        (StableSPAM, SPAM["clean"], {"gamma3": 0.99}),
        (RMNP, {}, {"momentum": 0.949}),
        (RMNP, {}, {"nesterov": False}),
    ]
    for make, hyper, oracle in differences:
        worst, _ = compare(make, hyper, torch.float64, names=["tall", "wide"], oracle=oracle)
        assert min(worst.values()) > 1e-4, (make, oracle, worst)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9), (5, 129), (1, 7)], ids=str)
def test_newton_schulz_with_beta_one_half_tends_to_the_exact_whitening(shape):
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = normalize_rows(grad, 1e-8)
    exact = whitened_exact(rows.numpy())
    apart = [
        np.linalg.norm(whiten(rows, steps=steps).numpy() - exact) / np.linalg.norm(exact)
        for steps in (5, 10, 40)
    ]
    assert apart[2] < 1e-6, apart
    assert apart[0] == pytest.approx(apart[1], abs=1e-6) or apart[1] < apart[0]


def test_swans_update_has_entries_of_rms_one():
    """So that its learning rate is in the unit of the others'."""
    grads = {name: torch.randn(shape) for name, shape in HIDDEN.items() if name != "column"}
    for name, grad in grads.items():
        weight = torch.nn.Parameter(torch.zeros_like(grad))
        weight.grad = grad * 1e-3
        stacked = name.endswith("stack")
        SWAN([{"params": [weight], "role": "hidden", "stacked": stacked}], lr=1.0).step()
        assert weight.detach().square().mean().sqrt() == pytest.approx(1.0, rel=1e-4), name
