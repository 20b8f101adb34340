"""Cautious weight decay: on every method and path, the step without decay less its share of it."""

import copy

import numpy as np
import pytest
import torch
from needs import needs_cpu_kernels
from optimizer_db import Tiny
from reference.muon_numpy import JORDAN, iterated
from reference.rest_adam_numpy import shrunk
from registered import NAMES, create
from torch import nn
from torch.testing import assert_close

from optimzoo import SCALE, GaLore, create_optimizer, get_info

OURS = [n for n in NAMES if get_info(n).make.__module__.startswith("optimzoo.")]
LR, DECAY = 2.0**-6, 0.75
PATHS = {
    "kernels": {},
    "eager": {"fused": False},
    "foreach": {"fused": False, "foreach": True},
    "captured": {"capturable": True, "lr": torch.tensor(LR)},
    "codes": {"state_bits": 8},
    "stochastic": {"rounding": "stochastic", "seed": 5},
    "other-scale": {"other": "scale"},
    "other-adafactor": {"other": "adafactor", "foreach": True},
}
SHAPES = [(12, 5), (5, 12), (8, 8), (1, 7), (12, 5), (3, 6, 10)]


class Weights(nn.Module):
    """Embedding, head, vector; hidden weights of every form, some of which have rows of zeros."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shapes = [*SHAPES, (20, 8), (20, 8), (9,), (6, 9)]
        draws = [torch.randn(shape, generator=generator) for shape in shapes]
        self.all = nn.ParameterList(draw.to(dtype) for draw in draws)

    def groups(self, **every):
        *plain, stack, embedding, head, vector, transposed = self.all
        groups = [
            {"params": plain, "role": "hidden"},
            {"params": [stack], "role": "hidden", "stacked": True},
            {"params": [embedding], "role": "embedding"},
            {"params": [head], "role": "head"},
            {"params": [vector], "role": "vector"},
            {"params": [transposed], "role": "hidden", "transposed": True},
        ]
        return [{"weight_decay": DECAY, **group, **every} for group in groups]

    def draw_grads(self, step):
        generator = torch.Generator().manual_seed(step)
        for p in self.all:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        self.all[0].grad[2] = 0.0


def make(name, model, path, **options):
    hyper = {"lr": LR, "weight_decay_style": "cautious", **PATHS[path], **options}
    if name in ("muon", "rmnp"):
        hyper["other_lr"] = hyper["lr"]
    if "rank" in get_info(name).make.__init__.__annotations__:
        hyper.setdefault("rank", 2)
    return create(name, model.groups(), **hyper)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", OURS)
def test_a_step_is_the_one_without_decay_less_the_decay_of_what_agrees(name, path):
    model = Weights()
    try:
        optimizer = make(name, model, path)
    except (TypeError, ValueError) as refused:
        assert name in ("adams", "scale", "stable_spam"), refused
        pytest.skip(str(refused))
    rates = {"sinkgd": optimizer.defaults.get("alpha", 1.0)}
    checked = 0
    for step in range(4):
        before = [p.detach().clone() for p in model.all]
        other, bare = copy.deepcopy((model, optimizer))
        for group in bare.param_groups:
            group["weight_decay"] = 0.0
        for each, run in ((model, optimizer), (other, bare)):
            each.draw_grads(step)
            run.step()
        for group in optimizer.param_groups:
            own = group["role"] == "hidden"
            by = LR * DECAY * (rates.get(name, 1.0) if own else 1.0)
            for p in group["params"]:
                i = next(i for i, q in enumerate(model.all) if q is p)
                old, new, plain = (
                    t.detach().double().numpy() for t in (before[i], p, other.all[i])
                )
                moved = old - plain  # what rounding hides of it, or leaves, is of no sign
                sure = (np.abs(moved) > 1e-6 * np.abs(old)) | (p.grad.numpy() == 0)
                expected = plain - (old - shrunk(old, moved, by, True))
                np.testing.assert_allclose(new[sure], expected[sure], rtol=2e-6, atol=2e-6)
                checked += sure.sum()
    assert checked > 0.9 * 4 * sum(p.numel() for p in model.all)


@pytest.mark.parametrize("foreach", [False, True])
def test_spectral_scale_follows_numpy(foreach):
    model = Weights(torch.float64)
    group = model.groups()[0]
    optimizer = SCALE(
        [group], lr=LR, normalize="spectral", foreach=foreach, weight_decay_style="cautious"
    )
    expected = [p.detach().numpy().copy() for p in group["params"]]
    for step in range(30):
        model.draw_grads(step)
        for i, p in enumerate(group["params"]):
            update = np.sqrt(max(p.shape)) * iterated(p.grad.numpy(), [JORDAN] * 5)
            update *= (p.grad != 0).any(1, keepdim=True).numpy()  # not to the rounding of an SVD
            expected[i] = shrunk(expected[i], update, LR * DECAY, True) - LR * update
        optimizer.step()
    for p, value in zip(group["params"], expected, strict=True):
        assert_close(p.detach(), torch.tensor(value), rtol=1e-7, atol=1e-9)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [n for n in OURS if n != "adams"])
def test_kernels_step_as_the_eager_path(name, dtype):
    """But for what a rounding decides: an update of nearly zero, a bfloat16 weight's last bit."""
    models = [Weights(dtype) for _ in range(2)]
    optimizers = [make(name, m, path) for m, path in zip(models, ("kernels", "eager"), strict=True)]
    near = torch.finfo(dtype).eps
    for step in range(10):
        for model, optimizer in zip(models, optimizers, strict=True):
            model.draw_grads(step)
            optimizer.step()
    for p, q in zip(*(m.all for m in models), strict=True):
        wrong = (p - q).abs().float() > 8 * near * (1 + q.abs().float())
        assert wrong.float().mean() < 0.02, (p.shape, wrong.sum())


def test_a_group_may_have_its_own_style_and_a_load_brings_it():
    def optimizer(model, style):
        groups = model.groups()
        groups[0]["weight_decay_style"] = style
        return GaLore(groups, lr=LR, rank=2)

    models = [Weights() for _ in range(3)]
    styles = ("cautious", "decoupled", "decoupled")
    runs = [optimizer(m, s) for m, s in zip(models, styles, strict=True)]
    runs[2].load_state_dict(runs[0].state_dict())
    for model, run in zip(models, runs, strict=True):
        for step in range(3):
            model.draw_grads(step)
            run.step()
    for i, (p, q, r) in enumerate(zip(*(m.all for m in models), strict=True)):
        assert torch.equal(p, q) == (i >= 5)  # the first group has five weights
        assert torch.equal(p, r)


def test_an_unknown_style_and_torchs_own_are_refused_by_name():
    for name in OURS:
        groups = Weights().groups(weight_decay_style="l2")
        with pytest.raises(ValueError, match=r"weight_decay_style: 'l2'; .*decoupled, cautious$"):
            create(name, groups)
    with pytest.raises(ValueError, match="adamw has no hyperparameter 'weight_decay_style'"):
        create_optimizer("adamw", Tiny(), weight_decay_style="cautious")
    groups = Weights().groups(weight_decay_style="cautious")
    for hyper in ({}, {"rounding": "stochastic"}):
        with pytest.raises(ValueError, match="'cautious': adamw is torch's; leave it out"):
            create_optimizer("adamw", groups, **hyper)
