"""Weights and gradients that are hardly matrices: every method moves them, and no further."""

import copy

import pytest
import torch
from optimizer_db import OPTIM_DB
from torch import nn

from optimzoo import APOLLO, SWAN, APOLLOMini, Fira, GaLore, NaturalGaLore
from optimzoo.kernels import dispatch
from optimzoo.optimizers.swan import normalize_rows

# A column, a row, one number, and both shorter than the rank.
SHAPES = [(9, 1), (1, 9), (1, 1), (8, 2), (2, 8), (12, 7)]
STEPS, LR = 4, 2**-6
GRADIENTS = {
    "normal": lambda g: g,
    "equal in a row": lambda g: g[:, :1].expand_as(g).clone(),
    "equal in a column": lambda g: g[:1].expand_as(g).clone(),
    "all equal": torch.ones_like,
    "rows of zero": lambda g: g * (torch.arange(len(g)) % 2 == 0)[:, None],
    "one entry": lambda g: g * (torch.arange(g.numel()) == 0).view(g.shape),
    "of rank 1": lambda g: g[:, :1] * g[:1],
}
LIMITED = (APOLLO, APOLLOMini, Fira)
FLAGS = ("capturable", "rounding", "maximize", "lr")  # nothing of what these do hangs on the shape
CASES = [
    pytest.param(info.optim_cls, entry.kwargs, id=f"{info.optim_cls.__name__}-{entry.desc}")
    for info in OPTIM_DB
    for entry in info.optim_inputs_func(device="cpu")
    if not any(flag in entry.kwargs for flag in FLAGS)
]
paths = pytest.mark.parametrize("path", ["kernels", "eager"])


def take_path(path, monkeypatch):
    if path == "eager":
        monkeypatch.setattr(dispatch, "backend", lambda kind: None)


def optimizer_of(cls, options, weight):
    options = {key: x for key, x in copy.deepcopy(options).items() if key != "vector_lr"}
    groups = [{"params": [weight], "role": "hidden"}]
    return cls(groups, **{**options, "lr": LR, "weight_decay": 0.0})


def updates(cls, options, shape, gradient, dtype):
    """Of each step, in learning rates; and where its gradient was not zero."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = optimizer_of(cls, options, weight)
    for _ in range(STEPS):
        grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        weight.grad = GRADIENTS[gradient](grad).to(dtype)
        before = weight.detach().clone()
        optimizer.step()
        yield (weight.detach() - before).double() / LR, weight.grad != 0


def rms(x):
    return x.square().mean().sqrt().item()


@pytest.mark.sampled(20)
@paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("cls", "options"), CASES)
def test_moves_at_its_usual_pace(cls, options, dtype, path, monkeypatch):
    take_path(path, monkeypatch)
    for shape in SHAPES:
        usual = [rms(update) for update, _ in updates(cls, options, shape, "normal", dtype)]
        assert min(usual) > 1e-3 * max(usual) > 0, shape
        for gradient in GRADIENTS:
            equal = gradient in ("all equal", "equal in a row") and shape[1] > 1
            for step, (update, given) in enumerate(updates(cls, options, shape, gradient, dtype)):
                place = (shape, gradient, step)
                assert torch.isfinite(update).all(), place
                if cls is SWAN and equal:  # its rule: a row's mean is taken off
                    assert not update.any(), place
                elif given.any():
                    assert rms(update) > 1e-4 * max(usual), place
                # APOLLO divides by the size of a random projection, which may be next to nothing.
                if cls not in (APOLLO, APOLLOMini):
                    assert rms(update) < 3 * max(usual), place


@pytest.mark.sampled(6)
@paths
@pytest.mark.parametrize(("cls", "options"), CASES)
def test_a_first_gradient_of_zero_does_not_hold_up_the_next(cls, options, path, monkeypatch):
    """Of a layer behind one that starts at zero: a subspace or a limit made of it would stay."""
    take_path(path, monkeypatch)
    for shape in [(9, 1), (1, 9), (12, 7)]:
        weights = [nn.Parameter(torch.zeros(shape)) for _ in range(2)]
        late, early = (optimizer_of(cls, options, weight) for weight in weights)
        weights[0].grad = torch.zeros(shape)
        late.step()
        assert not weights[0].any()
        generator = torch.Generator().manual_seed(0)
        gone = [0.0, 0.0]
        for _ in range(3):
            grad = torch.randn(shape, generator=generator)
            for i, optimizer in enumerate((late, early)):
                before = weights[i].detach().clone()
                weights[i].grad = grad.clone()
                optimizer.step()
                gone[i] += rms(weights[i].detach() - before)
        assert gone[1] / 8 < gone[0] < 8 * gone[1], (shape, gone)


@pytest.mark.parametrize("cls", LIMITED)
def test_a_gradient_of_zero_in_between_does_not_hold_up_the_next(cls):
    """Their norm may grow by a hundredth a step: from zero that took two thousand."""
    weight = nn.Parameter(torch.zeros(12, 7))
    optimizer = optimizer_of(cls, {"betas": (0.0, 0.999)}, weight)
    paces = []
    for step in range(9):
        grad = torch.randn(12, 7, generator=torch.Generator().manual_seed(step // 9))
        weight.grad = grad * (step not in (3, 4))
        before = weight.detach().clone()
        optimizer.step()
        paces.append(rms(weight.detach() - before))
    assert paces[3] == paces[4] == 0.0
    assert min(paces[5:]) > 0.5 * paces[2]


@pytest.mark.parametrize("cls", [GaLore, NaturalGaLore, Fira])
def test_the_first_subspace_is_that_of_the_first_gradient_that_has_one(cls):
    weights = [nn.Parameter(torch.zeros(12, 7)) for _ in range(2)]
    late, early = (optimizer_of(cls, {"rank": 2}, weight) for weight in weights)
    for _ in range(3):
        weights[0].grad = torch.zeros(12, 7)
        late.step()
    for step in range(3):
        grad = torch.randn(12, 7, generator=torch.Generator().manual_seed(step))
        for weight, optimizer in zip(weights, (late, early), strict=True):
            weight.grad = grad.clone()
            optimizer.step()
        assert torch.equal(*weights), step


@pytest.mark.parametrize("layout", [{}, {"transposed": True}, {"stacked": True}], ids=str)
def test_swan_steps_rows_of_one_entry_by_adam(layout):
    """Less their mean they are zero: such a weight stood still without a word."""
    shape = {"transposed": (1, 6), "stacked": (3, 6, 1)}.get(next(iter(layout), ""), (6, 1))
    weights = [nn.Parameter(torch.zeros(shape)) for _ in range(2)]
    optimizers = [
        SWAN([{"params": [weights[0]], "role": "hidden", **layout}], lr=LR, weight_decay=0.1),
        SWAN([{"params": [weights[1]], "role": "vector"}], lr=LR, weight_decay=0.1),
    ]
    for step in range(3):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    assert torch.equal(*weights)
    group = optimizers[0].param_groups[0]
    assert not optimizers[0].scale_invariant(weights[0], group)


@paths
def test_swans_rows_of_equal_entries_are_zero_and_not_their_rounding(path, monkeypatch):
    take_path(path, monkeypatch)
    grad = torch.tensor([0.1, 1e-4, 3e3])[:, None].expand(3, 7).contiguous()
    assert not normalize_rows(grad, 1e-8).any()
    grad[1, 2] += 1e-4
    assert normalize_rows(grad, 1e-8).any(-1).tolist() == [False, True, False]
