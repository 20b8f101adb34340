"""`differentiable=True`: autograd runs through the steps, for every role and every layout."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from optimzoo import SCALE

GROUPS = {
    "hidden": {"role": "hidden"},
    "transposed": {"role": "hidden", "transposed": True},
    "stacked": {"role": "hidden", "stacked": True},
    "embedding": {"role": "embedding"},
    "head": {"role": "head"},
    "vector": {"role": "vector"},
}
SHAPES = {"stacked": (2, 3, 2), "vector": (4,)}


def steps(group, options):
    """A function of the weight and two gradients: the weight after two steps, and its state."""

    def run(weight, *grads):
        weight = weight.clone()
        optimizer = SCALE([{"params": [weight], **group}], differentiable=True, **options)
        for grad in grads:
            weight.grad = grad
            optimizer.step()
        state = optimizer.state[weight].values() if weight in optimizer.state else ()
        return weight, *(value for value in state if value.requires_grad)

    return run


def inputs(shape):
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    return [x.requires_grad_() for x in draw]


@pytest.mark.parametrize("normalize", ["column", "row"])
@pytest.mark.parametrize("kind", GROUPS)
def test_gradients_of_two_steps(kind, normalize):
    options = {"lr": 0.3, "weight_decay": 0.1, "normalize": normalize, "other_eps": 1e-3}
    assert gradcheck(steps(GROUPS[kind], options), inputs(SHAPES.get(kind, (3, 2))))


@pytest.mark.parametrize("kind", GROUPS)
def test_second_derivatives_and_the_learning_rate(kind):
    weight, grad, _ = inputs(SHAPES.get(kind, (3, 2)))
    lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def run(weight, grad, lr):
        options = {"lr": lr, "maximize": True, "other_eps": 1e-3}
        return steps(GROUPS[kind], options)(weight, grad)[0]

    assert gradcheck(run, (weight, grad, lr))
    assert gradgradcheck(run, (weight, grad, lr))


def test_the_result_is_that_of_an_ordinary_step():
    for kind, group in GROUPS.items():
        weight, *grads = inputs(SHAPES.get(kind, (3, 2)))
        expected = torch.nn.Parameter(weight.detach().clone())
        optimizer = SCALE([{"params": [expected], **group}], lr=0.3, foreach=False)
        for grad in grads:
            expected.grad = grad.detach()
            optimizer.step()
        actual = steps(group, {"lr": 0.3})(weight, *grads)[0]
        torch.testing.assert_close(actual, expected, atol=0, rtol=0)
