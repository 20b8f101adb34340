"""Converting a model, the audit, and back to dense."""

import copy

import pytest
import torch
from torch import nn

from optimzoo import create_optimizer, param_groups
from optimzoo.lowrank import LoRALinear, LowRankLinear, SparseLowRankLinear, convert, merge
from optimzoo.lowrank.convert import support_bytes
from optimzoo.models.llama import Llama, LlamaConfig

KINDS = {"low_rank": LowRankLinear, "sltrain": SparseLowRankLinear, "lora": LoRALinear}
CONFIG = LlamaConfig(50, 16, 24, 2, 2)
SQUARE, UP = (16 + 16) * 4, (16 + 24) * 4  # parameters of rank 4
TOKENS = torch.arange(20).reshape(2, 10)


def llama() -> Llama:
    return Llama(CONFIG)


@pytest.mark.parametrize("kind", KINDS)
def test_every_hidden_layer_and_nothing_else(kind):
    model = llama()
    dense = {n: p.clone() for n, p in model.state_dict().items()}
    audit = convert(model, 4, kind, sparsity=0.1)
    made = {n for n, m in model.named_modules() if type(m) is KINDS[kind]}
    assert {record.name for record in audit} == made and len(made) == 2 * 7
    assert type(model.lm_head) is not KINDS[kind] and isinstance(model.lm_head, nn.Linear)
    assert isinstance(model.model.embed_tokens, nn.Embedding)
    for name, value in model.state_dict().items():
        if name in dense:
            assert torch.equal(value, dense[name]), name
    if kind == "lora":
        torch.testing.assert_close(model(TOKENS), llama()(TOKENS))
    roles = {n: g["role"] for g in param_groups(model) for n in g["param_names"]}
    for name in made:
        assert roles[f"{name}.A"] == roles[f"{name}.B"] == "hidden"
        assert roles.get(f"{name}.values", "vector") == "vector" and f"{name}.frozen" not in roles
    assert roles["lm_head.weight"] == "head"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_audit_counts_what_there_is(kind, dtype):
    model = llama().to(dtype)
    dense = sum(p.numel() for p in model.parameters())
    audit = convert(model, 4, kind, sparsity=0.1)
    square, up, down = (
        next(r for r in audit if r.name.endswith(f".{n}_proj")) for n in ("q", "up", "down")
    )
    sparse, frozen = (kind == "sltrain") * 26, (kind == "lora") * 256
    assert (square.shape, square.before, square.trained) == ((16, 16), 256, SQUARE + sparse)
    assert square.held == SQUARE + sparse + frozen
    assert square.bytes_before == 256 * dtype.itemsize
    assert square.bytes_held == square.held * dtype.itemsize + 4 * sparse
    assert up.shape == (24, 16) and down.shape == (16, 24) and up.rank == down.rank == 4
    held = sum(r.held for r in audit)
    rest = dense - 4352
    assert rest + held == sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert rest + sum(r.trained for r in audit) == trained
    assert support_bytes(model) == sum(r.bytes_held - r.held * dtype.itemsize for r in audit)
    text = str(audit).splitlines()
    assert len(text) == 1 + 3 + 1 and max(map(len, text)) <= 100
    assert text[1].split()[:5] == ["8", "16", "x", "16", "4"]
    assert f"14 layers to {kind}: 4,352 parameters -> {held:,}" in text[-1]


def test_targets_choose_and_the_rest_can_follow():
    model = llama()
    audit = convert(model, 4, targets=r"layers\.1\..*(q|v)_proj$")
    names = [f"model.layers.1.self_attn.{n}_proj" for n in "qv"]
    assert [r.name for r in audit] == names
    convert(model, 3, "lora", targets="mlp")
    kinds = {type(m) for m in model.modules()}
    assert {LowRankLinear, LoRALinear} <= kinds and SparseLowRankLinear not in kinds
    assert merge(model) == 2 + 6


def test_the_seed_alone_decides_the_draws():
    states = []
    for seed in (0, 0, 1):
        model, before = llama(), torch.get_rng_state()
        convert(model, 4, "sltrain", seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        states.append(model.state_dict())
    same = [all(torch.equal(s[n], states[0][n]) for n in s) for s in states]
    assert same == [True, True, False]
    factors = [p for n, p in states[0].items() if n.endswith("q_proj.A")]
    assert not torch.equal(*factors)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_gives_the_dense_model(kind):
    model = llama()
    names = list(model.state_dict())
    convert(model, 4, kind)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".B"):
                p.normal_()
    before = model(TOKENS)
    random = torch.get_rng_state()
    assert merge(model) == 14
    assert torch.equal(random, torch.get_rng_state())
    assert sorted(model.state_dict()) == sorted(names)
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-4, atol=1e-4)
    assert all(p.requires_grad for p in model.parameters())
    llama().load_state_dict(model.state_dict())
    convert(model, 4, kind)  # and it is an ordinary model again


def test_biases_dtypes_modes_and_meta_stay():
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 7, bias=False), nn.Linear(7, 3)).double()
    net.eval()
    bias = net[0].bias
    convert(net, 2, "sltrain", targets="[01]")
    assert net[0].bias is bias and net[1].bias is None
    assert net[0].A.dtype == net[0].values.dtype == torch.float64
    assert not net[0].training and not net[0].was_conv1d
    assert merge(net) == 2 and net[0].bias is bias and net[1].bias is None
    assert net[0].weight.dtype == torch.float64 and not net[0].training
    with torch.device("meta"):
        empty = llama()
    audit = convert(empty, 4, "sltrain")
    assert all(t.is_meta for t in [*empty.parameters(), *empty.buffers()])
    assert str(audit) == str(convert(llama(), 4, "sltrain"))


def test_a_layer_used_twice_stays_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = self.first
            self.out = nn.Linear(6, 4)

    model = Twice()
    assert [r.name for r in convert(model, 2, targets="first|second")] == ["first"]
    assert model.first is model.second and isinstance(model.first, LowRankLinear)
    assert merge(model) == 1 and model.first is model.second


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["adamw", "scale", "galore", "muon"])
def test_optimizers_of_the_zoo_train_it(kind, name):
    model = llama()
    convert(model, 4, kind)
    frozen = copy.deepcopy([p for p in model.parameters() if not p.requires_grad])
    optimizer = create_optimizer(name, model, lr=1e-2, **({"rank": 2} if name == "galore" else {}))
    labels = TOKENS.roll(-1, 1)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(TOKENS, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for old, p in zip(frozen, (p for p in model.parameters() if not p.requires_grad), strict=True):
        assert torch.equal(old, p)


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    net[1].weight = net[0].weight
    return net


MESSAGES = [
    (llama, {"rank": 0}, r"^model\.layers\.0\.self_attn\.q_proj: rank is 0; for a 16 x 16"),
    (llama, {"rank": 17}, "rank is 17; for a 16 x 16 weight it must be from 1 to 16"),
    (llama, {"rank": 4, "kind": "lowrank"}, "kind 'lowrank' is not one of low_rank, sltrain, lora"),
    (llama, {"rank": 4, "targets": "q_prj"}, "'q_prj' match no linear layer; near are .*q_proj"),
    (llama, {"rank": 4, "targets": "lm_head"}, "'lm_head' match no linear layer; near are model"),
    (llama, {"rank": 4, "targets": "("}, r"'\(' is not a regular expression: missing"),
    (llama, {"rank": 4, "kind": "sltrain", "sparsity": 0}, "q_proj: sparsity is 0"),
    (llama, {"rank": 4, "alpha": 0.0}, r"q_proj: alpha is 0\.0"),
    (tied, {"rank": 2}, "0 and 1 share a weight; leave them out with targets"),
    (lambda: nn.Sequential(nn.Conv2d(1, 2, 3)), {"rank": 1}, "it has no hidden linear layer"),
]


@pytest.mark.parametrize(("make", "arguments", "message"), MESSAGES, ids=[m[2] for m in MESSAGES])
def test_bad_input_is_one_line_and_changes_nothing(make, arguments, message):
    model = make()
    modules = list(model.modules())
    with pytest.raises(ValueError, match=message) as caught:
        convert(model, **arguments)
    assert "\n" not in str(caught.value)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))


def test_a_rank_that_only_one_layer_cannot_have_changes_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 5))
    with pytest.raises(ValueError, match=r"^1: rank is 4; for a 2 x 8 weight"):
        convert(model, 4)
    assert type(model[0]) is nn.Linear


def test_converting_twice_and_merging_nothing():
    model = llama()
    convert(model, 4)
    with pytest.raises(ValueError, match="q_proj is converted already; merge"):
        convert(model, 4, "lora")
    merge(model)
    with pytest.raises(ValueError, match="Llama has no low-rank layer; convert it first"):
        merge(model)
    with pytest.raises(ValueError, match="LowRankLinear cannot replace itself; merge the module"):
        merge(LowRankLinear(4, 3, 2))


def test_at_rank_1_the_factors_are_lines_and_vectors():
    model = llama()
    convert(model, 1)
    roles = {n: g["role"] for g in param_groups(model) for n in g["param_names"]}
    assert {role for n, role in roles.items() if n.endswith((".A", ".B"))} == {"vector"}


def test_a_layer_with_a_forward_of_its_own_stays():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(8, 8), Doubled(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    before = model(x)
    audit = convert(model, 2, "lora")
    assert type(model[1]) is Doubled and "1" not in {record.name for record in audit}
    torch.testing.assert_close(model(x), before)
