"""Faults that implementations of these methods have had elsewhere, each with a test of its name.

What any torch optimizer promises is in `test_torch_contract` and `test_torch_state`; that a resumed
run is the uninterrupted one, across a refresh too, in `test_resume`; bfloat16 in
`test_zoo_precision`.
"""

import copy

import numpy as np
import pytest
import torch
from registered import others
from torch.testing import assert_close
from zoo_models import METHODS, make, normal, one_weight, reloaded, train, values

from optimzoo import create_optimizer, get_info
from optimzoo.models.llama import Llama, LlamaConfig
from optimzoo.subspace.projector import gaussian

LOW_RANK = ["galore", "natural_galore", "fira", "apollo", "apollo_mini"]
OPPOSITE = {"tall": "left", "wide": "right", "square": "left"}
SHAPES = {"tall": (37, 24), "wide": (24, 37), "square": (24, 24), "line": (1, 24)}
every_method = pytest.mark.parametrize("name", METHODS)


def llama(dtype=torch.float32, tied=False):
    """One block: the next has the same shapes, and takes as long."""
    return Llama(LlamaConfig(97, 24, 37, 1, 2, tie_word_embeddings=tied), seed=3).to(dtype)


@pytest.mark.sampled(2)
@every_method
def test_state_is_tensors_and_loads_with_weights_only(name):
    """Projector objects in the state of GaLore, Natural GaLore, Fira and APOLLO do not load."""
    model = llama()
    optimizer = make(name, model)
    train(model, optimizer, 6)
    for param, state in optimizer.state.items():
        assert all(isinstance(value, torch.Tensor) for value in state.values()), param.shape
    saved = reloaded(optimizer.state_dict())
    again = llama()
    restored = make(name, again)
    restored.load_state_dict(saved)
    again.load_state_dict(model.state_dict())
    assert train(again, restored, 6) == train(model, optimizer, 6)


@every_method
def test_other_parameters_hold_nothing_of_the_method(name):
    """Natural GaLore's code keeps a projector of None with them."""
    model = llama()
    optimizer = make(name, model)
    train(model, optimizer, 2)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if group["role"] != "hidden" and name != "stable_spam":
                assert optimizer.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("rank", [1, 5, 24, 500])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LOW_RANK)
def test_every_rank_works_on_real_shapes(name, shape, rank):
    """Some Fira and APOLLO raise in the first step at any rank below the weight's dimensions."""
    target = normal(*SHAPES[shape], seed=1)
    weight, optimizer = one_weight(name, torch.zeros_like(target), rank=rank, lr=0.05)
    low = min(rank, *target.shape) if name in ("galore", "natural_galore", "fira") else rank
    for step in range(10):
        weight.grad = weight.detach() - target
        optimizer.step()
        moment = optimizer.state[weight]["exp_avg"]
        assert sorted(moment.shape) == sorted((low, max(target.shape))), step
    assert (weight - target).norm() < target.norm()


@pytest.mark.parametrize("rank", [1, 5, 24, 500])
@pytest.mark.parametrize("shape", OPPOSITE)
@pytest.mark.parametrize("name", ["galore", "natural_galore", "fira"])
def test_the_reverse_side_works_at_every_rank(name, shape, rank):
    """`reverse_std` raises elsewhere: at ranks from the number of rows up, or below it."""
    target = normal(*SHAPES[shape], seed=1)
    weight, optimizer = one_weight(
        name, torch.zeros_like(target), rank=rank, side=OPPOSITE[shape], lr=0.05
    )
    for _ in range(10):
        weight.grad = weight.detach() - target
        optimizer.step()
    keys = [key for key in optimizer.state[weight] if key.startswith("projector")]
    assert keys == [f"projector_{OPPOSITE[shape]}"]
    assert (weight - target).norm() < target.norm()


@pytest.mark.parametrize("name", LOW_RANK)
def test_hidden_weights_are_not_silently_trained_by_adam(name):
    model = llama()
    optimizer = create_optimizer(name, model, **METHODS[name][1])
    train(model, optimizer, 1)
    for param_name, p in model.named_parameters():
        hidden = ".layers." in param_name and p.ndim == 2
        small = optimizer.state[p]["exp_avg"].numel() < p.numel()
        assert small == hidden, param_name


@every_method
def test_gradients_are_left_as_they_are(name):
    """A Fira elsewhere overwrites them with their projection."""
    model = llama()
    optimizer = make(name, model, maximize=True, weight_decay=0.1)
    train(model, optimizer, 1)
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_apollo_scales_the_gradient_itself(shape):
    """Others step along the projection back from the subspace, which has its rank."""
    grad = normal(*SHAPES[shape])
    for kind in ("channel", "tensor"):
        weight, optimizer = one_weight("apollo", torch.zeros_like(grad), rank=2, scale_type=kind)
        weight.grad = grad
        optimizer.step()
        factors = weight.detach() / grad
        lines = factors.mT if shape == "wide" else factors
        assert_close(lines, lines[:, :1].expand_as(lines))
        assert (lines < 0).all()
        assert (lines[0, 0] - lines[1, 0]).abs() < 1e-12 or kind == "channel"
        assert torch.linalg.matrix_rank(weight.detach()) == 24


def test_apollos_projection_is_gaussian_of_variance_one_over_rank():
    omega = gaussian(5, 400, 50, torch.zeros(1, dtype=torch.float64))
    assert omega.shape == (400, 50)
    assert omega.mean().abs() < 5e-3
    assert omega.var() * 50 == pytest.approx(1, abs=0.05)
    assert omega.pow(4).mean() * 2500 == pytest.approx(3, abs=0.2)  # of a normal distribution
    low = gaussian(5, 400, 50, torch.zeros(1, dtype=torch.bfloat16))
    assert low.dtype == torch.bfloat16


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_apollos_projection_is_a_hash_to_the_bit(dtype, default):
    """Checkpoints have the seed alone. By unsigned integers of NumPy, which wrap around."""
    golden, odd = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
    seed, rows, rank = 10**12 + 7, 11, 3
    start = np.uint64(seed * int(golden) % 2**64)
    bits = (np.arange(17, dtype=np.uint64) + start) * golden
    high = (bits.view(np.int64) >> 32).view(np.uint64)
    bits = (bits ^ high) * odd
    places = bits.view(np.int32).astype(np.int64) // 256
    uniform = torch.from_numpy((places + 0.5) / 2.0**23)
    expected = uniform.to(dtype).erfinv_().mul_((2 / rank) ** 0.5)[: rows * rank].view(rows, rank)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        drawn = gaussian(torch.tensor(seed), rows, rank, torch.zeros(1, dtype=dtype))
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(drawn, expected)


@every_method
def test_parameters_may_be_swapped_before_the_first_step(name):
    """As Accelerate does under FSDP: APOLLO's seeds, made at construction, are orphaned there."""
    model = llama()
    optimizer = make(name, model)
    other = copy.deepcopy(model)
    twin = dict(zip(model.parameters(), other.parameters(), strict=True))
    for group in optimizer.param_groups:
        group["params"] = [twin[p] for p in group["params"]]
    before = values(other)
    train(other, optimizer, 5)
    assert not any(torch.equal(p, q) for p, q in zip(other.parameters(), before, strict=True))


@every_method
def test_tied_embeddings_train_once_as_the_head(name):
    model = llama(tied=True)
    optimizer = make(name, model)
    losses = train(model, optimizer, 12)
    assert losses[-1] < losses[0]
    filled = [p for p in model.parameters() if optimizer.state[p]]
    assert len(filled) == len(list(model.parameters())) - 7 * (name in ("swan", "sinkgd"))


@every_method
def test_hyperparameters_reach_the_groups(name):
    """A training script of SPAM's does not pass them on."""
    cls, own = METHODS[name]
    hyper = {**own, "betas": (0.5, 0.75), "eps": 1e-3, "weight_decay": 0.25, "maximize": True}
    hyper.pop("other_lr", None)
    given = dict(hyper)
    if name in ("muon", "rmnp"):
        given |= {f"other_{key}": hyper[key] for key in ("betas", "eps", "weight_decay")}
        del given["betas"], given["eps"]
    optimizer = create_optimizer(name, llama(), **others(0.125), **given)
    assert type(optimizer) is cls
    for group in optimizer.param_groups:
        lr = hyper["lr"] if group["role"] == "hidden" else 0.125
        decay = 0.0 if group["role"] == "vector" else 0.25
        assert {k: group[k] for k in hyper} == {**hyper, "lr": lr, "weight_decay": decay}


@pytest.mark.sampled(2)
@every_method
def test_the_loaded_learning_rate_counts_and_not_the_constructors(name):
    """Natural GaLore's code divides by one that it keeps as an attribute."""
    model, again = llama(), llama()
    optimizer, restored = make(name, model), make(name, again, lr=0.5)
    train(model, optimizer, 5)
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    again.load_state_dict(model.state_dict())
    restored.load_state_dict(reloaded(optimizer.state_dict()))
    assert train(again, restored, 5) == train(model, optimizer, 5)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True)
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_method
def test_trains(name, dtype):
    model = llama(dtype)
    losses = train(model, make(name, model), 25)
    assert losses[-1] < losses[0] - 0.5, losses


@pytest.mark.sampled(4)
@pytest.mark.parametrize("quiet", [range(1), range(3, 6), range(0, 9, 2)], ids=str)
@every_method
def test_zero_gradients_leave_numbers(name, quiet):
    """At the first step, in the middle, at a refresh; for one weight or for all."""
    model = llama()
    optimizer = make(name, model, weight_decay=0.1)
    for step in range(10):
        train(model, optimizer, 1)
        for i, p in enumerate(model.parameters()):
            p.grad = torch.zeros_like(p) if i % 2 or step in quiet else p.grad
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    for state in optimizer.state.values():
        assert all(value.isfinite().all() for value in state.values())


@pytest.mark.sampled(2)
@every_method
def test_seeds_decide(name):
    """Same seed, same run, whatever torch's own generator does; it is left alone."""

    def run(**hyper):
        model = llama()
        before = torch.get_rng_state()
        train(model, make(name, model, **hyper), 6)
        assert torch.equal(torch.get_rng_state(), before)
        return values(model)

    torch.manual_seed(1)
    first = run()
    torch.manual_seed(2)
    assert all(torch.equal(p, q) for p, q in zip(first, run(), strict=True))
    if name in LOW_RANK:
        other = run(seed=1)
        assert not all(torch.equal(p, q) for p, q in zip(first, other, strict=True))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", [n for n in METHODS if n != "stable_spam"])
def test_foreach_and_fused_and_the_loop_agree(name):
    ends = []
    for foreach in (None, False, True):
        model = llama(torch.float64)
        train(model, make(name, model, foreach=foreach, weight_decay=0.1), 12)
        ends.append(values(model))
    for other in ends[1:]:
        # Stacks sum in another order, as does each CPU's code, and training enlarges it:
        # test_stacks.py has the same without it, to 1e-12.
        assert_close(other, ends[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9), (3, 8, 5)], ids=str)
@every_method
def test_a_transposed_weight_trains_as_its_transpose(name, shape):
    """GPT-2's Conv1D is [in, out]: SWAN's rows are its columns, and a square's sides change."""
    ends = []
    hyper = {"rank": 2} if name in LOW_RANK else {}
    for transposed in (False, True):
        start = normal(*shape)
        start = start.mT.contiguous() if transposed else start
        layout = {"stacked": len(shape) > 2, "transposed": transposed}
        weight, optimizer = one_weight(name, start, **layout, **hyper)
        for step in range(9):
            grad = normal(*shape, seed=step)
            weight.grad = grad.mT.contiguous() if transposed else grad
            optimizer.step()
        ends.append(weight.detach().mT if transposed else weight.detach())
    assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-9)


@every_method
def test_a_stack_trains_as_its_matrices(name):
    """Norms, ratios, limits and subspaces are those of one expert, not of all together."""
    size = torch.tensor([1.0, 1e-4, 30.0], dtype=torch.float64)[:, None, None]
    hyper = {"projector": "svd"} if name in ("galore", "natural_galore", "fira") else {}
    start = normal(3, 12, 7)
    stack, optimizer = one_weight(name, start, stacked=True, **hyper)
    apart = [one_weight(name, matrix, **hyper) for matrix in start]
    for step in range(9):
        stack.grad = normal(3, 12, 7, seed=step) * size ** (1 + step % 2)
        optimizer.step()
        for grad, (weight, own) in zip(stack.grad, apart, strict=True):
            weight.grad = grad.clone()
            own.step()
    assert_close(stack.detach(), torch.stack([w.detach() for w, _ in apart]), rtol=1e-9, atol=1e-9)


@every_method
def test_a_module_in_place_of_its_parameters_is_refused_with_the_way_out(name):
    with pytest.raises(TypeError, match=r"given a module, Llama; give it optimzoo\.param_groups"):
        get_info(name).make(llama(), lr=1e-3, **get_info(name).required)
