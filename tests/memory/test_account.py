"""The memory account against the tensors that training really holds."""

from collections import Counter

import pytest
import torch
from torch import nn

from optimzoo import create_optimizer, list_optimizers, param_groups
from optimzoo.memory import account
from optimzoo.models.llama import Llama, LlamaConfig
from optimzoo.roles import role_of

# No two sizes alike; the ranks of the low-rank methods below, above and at a dimension.
CONFIG = LlamaConfig(97, 24, 37, 2, 2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOW_RANK = ("galore", "natural_galore", "fira", "apollo")
# AdamS has options without defaults and refuses bfloat16; its bytes are in test_adams_state.py.
NAMES = [n for n in list_optimizers() if n != "adams"]
CASES = [(name, {}) for name in NAMES] + [(n, {"rank": r}) for n in LOW_RANK for r in (5, 24)]
CASES += [
    ("galore", {"rank": 5, "projector": "svd", "side": "both"}),
    ("galore", {"rank": 5, "projector": "power", "side": "left"}),
    ("natural_galore", {"rank": 5, "side": "both", "history": 3, "history_dtype": "float32"}),
    ("natural_galore", {"rank": 5, "relative_damping": True}),
    ("natural_galore", {"rank": 5, "state_bits": 8}),
    ("fira", {"rank": 5, "side": "right"}),
    ("scale", {"momentum": 0.0}),
    ("scale", {"capturable": True}),
    ("sgd", {"momentum": 0.9}),
    ("adam", {"amsgrad": True}),
    ("rmsprop", {"momentum": 0.9, "centered": True}),
]
if "muon" in NAMES:
    CASES += [("muon", {"roles": ("hidden", "embedding", "head")})]
    CASES += [("muon", {"other": "adafactor"}), ("muon", {"other": "scale", "state_bits": 8})]
    CASES += [("muon", {"momentum_rank": r}) for r in (5, 24)]
    CASES += [("muon", {"momentum_rank": 5, "state_bits": 8, "rounding": "stochastic"})]


def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    tokens = torch.randint(0, 97, (2, 13), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()


def held(optimizer: torch.optim.Optimizer) -> Counter:
    """Bytes of the state by role and name, from the tensors of an optimizer that has stepped."""
    found: Counter = Counter()
    for group in optimizer.param_groups:
        for p in group["params"]:
            for name, value in optimizer.state.get(p, {}).items():
                found[role_of(p, group), name] += bytes_of([value])
    return found


@pytest.mark.sampled(6)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "hyper"), CASES, ids=str)
def test_account_is_what_training_holds_to_the_byte(name, hyper, dtype):
    model = Llama(CONFIG).to(dtype)
    counted = account(model, name, **hyper)
    optimizer = create_optimizer(name, model, lr=1e-3, **hyper)
    for step in range(3):  # what a later step holds is what the first one made
        take_step(model, optimizer, step)
        assert counted.state == held(optimizer)
    tensors = [t for s in optimizer.state.values() for t in s.values()]
    assert counted.state_total == bytes_of(tensors)
    assert counted.params == bytes_of(model.parameters())
    assert counted.grads == bytes_of(p.grad for p in model.parameters())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_on_meta_counts_as_a_real_one(name):
    with torch.device("meta"):
        shapes = Llama(CONFIG)
    assert account(shapes, name) == account(Llama(CONFIG), name)
    assert account(shapes, name, dtype=torch.bfloat16) == account(
        Llama(CONFIG).to(torch.bfloat16), name
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_not_touched(name):
    model = Llama(CONFIG, seed=1)
    first = next(model.parameters())
    first.grad = torch.full_like(first, 2.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    account(model, name, dtype=torch.bfloat16)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert (first.grad == 2).all()
    assert all(p.grad is None for p in model.parameters() if p is not first)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_roles_and_names_of_the_state():
    embedding, head = 97 * 24, 97 * 24
    hidden = 2 * (4 * 24 * 24 + 3 * 24 * 37)
    vectors = 5 * 24
    scale = account(Llama(CONFIG).to(torch.bfloat16), "scale")
    assert scale.state == {
        ("head", "exp_avg"): 2 * head,
        ("vector", "exp_avg"): 4 * vectors,
        ("vector", "exp_avg_sq"): 4 * vectors,
        ("vector", "step"): 4 * 5,
    }
    adam = account(Llama(CONFIG), "adam")
    sizes = {"embedding": embedding, "head": head, "hidden": hidden, "vector": vectors}
    counts = {"embedding": 1, "head": 1, "hidden": 14, "vector": 5}
    for role, size in sizes.items():
        assert adam.state[role, "exp_avg"] == adam.state[role, "exp_avg_sq"] == 4 * size
        assert adam.state[role, "step"] == 4 * counts[role]
    assert adam.params == adam.grads == 4 * sum(sizes.values())
    assert adam.state_total == 2 * adam.params + 4 * sum(counts.values())
    assert account(Llama(CONFIG), "sgd").state_total == 0


def test_frozen_parameters_count_as_parameters_only():
    model = Llama(CONFIG)
    every = account(model, "adam")
    model.lm_head.weight.requires_grad_(False)
    some = account(model, "adam")
    head = 4 * 97 * 24
    assert some.params == every.params
    assert some.grads == every.grads - head
    assert some.state_total == every.state_total - 2 * head - 4
    assert not any(role == "head" for role, _ in some.state)
    # `dtype` is of floating-point weights: a quantised one stays as it is, as under `model.to`.
    codes = torch.zeros(97, 24, dtype=torch.int8)
    model.lm_head.weight = nn.Parameter(codes, requires_grad=False)
    assert (
        account(model, "adam", dtype=torch.bfloat16).params == (every.params - head) // 2 + 97 * 24
    )


def test_tied_weights_count_once():
    tied = Llama(LlamaConfig(97, 24, 37, 2, 2, tie_word_embeddings=True))
    apart = account(Llama(CONFIG), "adam")
    assert account(tied, "adam").params == apart.params - 4 * 97 * 24
    assert account(tied, "scale").state["head", "exp_avg"] == 4 * 97 * 24


def test_an_optimizer_of_ones_own():
    """One that looks at its values, too: whatever it sees, the shapes are the same."""

    class Own(torch.optim.Optimizer):
        def __init__(self, groups):
            super().__init__(groups, {"lr": 1e-3})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    norm = p.grad.norm().item()
                    if not self.state[p]:
                        self.state[p]["rows"] = p.grad.new_full(p.shape[:1], norm)
                    p.mul_(1 - bool((p.grad != 0).any()) * 0.5)

    model = Llama(CONFIG)
    counted = account(model, Own)
    assert counted.state_total == 4 * sum(p.shape[0] for p in model.parameters())
    sgd = account(model, "sgd")
    assert (counted.params, counted.grads) == (sgd.params, sgd.grads)


def test_what_the_optimizer_refuses_is_refused():
    with pytest.raises(ValueError, match="unknown optimizer 'scal'; did you mean scale"):
        account(Llama(CONFIG), "scal")
    with pytest.raises(ValueError, match="no hyperparameter 'ranks'"):
        account(Llama(CONFIG), "galore", ranks=4)


def test_groups_reach_the_optimizer_as_param_groups_has_them():
    seen = []

    def make(groups):
        seen.extend(groups)
        return torch.optim.SGD(groups)

    account(Llama(CONFIG), make)
    expected = param_groups(Llama(CONFIG))
    assert [g["role"] for g in seen] == [g["role"] for g in expected]
    assert [g["param_names"] for g in seen] == [g["param_names"] for g in expected]
    assert all(p.is_meta for g in seen for p in g["params"])
