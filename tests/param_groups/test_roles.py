"""Roles of hand-made models: what is found, what overrides do, what is refused, what is printed."""

import copy

import pytest
import torch
from torch import nn

from optimzoo import SCALE, describe, param_groups

VOCAB, WIDTH = 97, 8


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width, bias=False)


class Model(nn.Module):
    """Every layout: tied head, raw parameters, convolutions, norms of two dimensions."""

    def __init__(self, *, tied=False):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Embedding(16, WIDTH)
        self.pos_embed = nn.Parameter(torch.randn(1, 16, WIDTH))
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.mixing = nn.Parameter(torch.randn(5, WIDTH))
        self.experts = nn.Parameter(torch.randn(3, 5, WIDTH))
        self.experts_bias = nn.Parameter(torch.zeros(3, 5))
        self.scale = nn.Parameter(torch.ones(()))
        self.conv1d = nn.Conv1d(WIDTH, 6, 3)
        self.conv2d = nn.Conv2d(2, 4, (3, 5))
        self.plane = nn.LayerNorm((4, WIDTH))
        self.layers = nn.ModuleList(Block(WIDTH) for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight


ROLES = {
    "embedding": {"embed.weight", "positions.weight", "pos_embed"},
    "head": {"lm_head.weight"},
    "hidden": {
        *("mixing", "experts", "conv1d.weight", "conv2d.weight"),
        *(f"layers.{i}.{name}.weight" for i in range(2) for name in ("up", "down")),
    },
    "vector": {
        *("cls_token", "experts_bias", "scale", "conv1d.bias", "conv2d.bias"),
        *("plane.weight", "plane.bias"),
        *(f"layers.{i}.{n}" for i in range(2) for n in ("norm.weight", "norm.bias", "up.bias")),
    },
}


def names(groups, role=None, **facts):
    """The names in the groups of `role`, or of those with `facts`."""
    return {
        name
        for group in groups
        if role in (None, group["role"]) and all(group.get(k) == v for k, v in facts.items())
        for name in group["param_names"]
    }


def assert_complete(groups, model):
    params = [p for group in groups for p in group["params"]]
    assert len(params) == len(set(params))
    assert set(params) == {p for p in model.parameters() if p.requires_grad}
    by_name = dict(model.named_parameters(remove_duplicate=False))
    for group in groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            assert by_name[name] is param


def test_roles_of_every_layout():
    model = Model()
    groups = param_groups(model)
    assert_complete(groups, model)
    for role, expected in ROLES.items():
        assert names(groups, role) == expected, role
    assert names(groups, stacked=True) == {"experts", "pos_embed"}
    assert names(groups, transposed=True) == set()
    assert names(groups, tied=True) == set()
    order = [group["role"] for group in groups]
    assert order == ["hidden", "hidden", "embedding", "embedding", "head", "vector"]


def test_every_parameter_moves_at_its_rate():
    model = Model()
    optimizer = SCALE(param_groups(model), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, value in model.state_dict().items():
        moved = (value - before[name]).square().mean().sqrt().item()
        assert moved == pytest.approx(0.1, rel=0.05), name


def test_a_tied_head_is_one_parameter_with_the_role_head():
    model = Model(tied=True)
    groups = param_groups(model)
    assert_complete(groups, model)
    assert names(groups, "head") == {"embed.weight"} == names(groups, tied=True)
    assert names(groups, "embedding") == {"positions.weight", "pos_embed"}
    assert "(tied)" in describe(groups)
    assert "tied" not in describe(Model())


def test_a_head_before_the_embedding_is_tied_all_the_same():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(WIDTH, VOCAB)
            self.embed = nn.Embedding(VOCAB, WIDTH)
            self.embed.weight = self.lm_head.weight

    groups = param_groups(Backwards())
    assert names(groups, "head") == {"lm_head.weight"} == names(groups, tied=True)


def test_a_head_without_a_telling_name_is_found_by_the_vocabulary():
    class Plain(nn.Module):
        def __init__(self, *, head):
            super().__init__()
            self.tokens = nn.Embedding(VOCAB, 16)
            self.places = nn.Embedding(16, 16)
            if head:
                self.readout = nn.Linear(16, VOCAB)
            self.body = nn.Linear(16, 16)

    assert names(param_groups(Plain(head=True)), "head") == {"readout.weight"}
    # As many positions as outputs: the square layer is no head.
    headless = param_groups(Plain(head=False))
    assert names(headless, "hidden") == {"body.weight"}
    assert "no output head was found" in describe(headless)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own
def test_wrappers_are_looked_through():
    plain = Model(tied=True)
    expected = [group["param_names"] for group in param_groups(plain)]
    wrapped = [
        nn.DataParallel(plain),
        torch.compile(plain),
        nn.DataParallel(torch.compile(plain)),
        torch.compile(nn.DataParallel(plain)),
    ]
    for model in wrapped:
        groups = param_groups(model)
        assert [group["param_names"] for group in groups] == expected
        assert_complete(groups, plain)
    inside = Model(tied=True)
    inside.layers[1] = torch.compile(inside.layers[1])
    assert [group["param_names"] for group in param_groups(inside)] == expected


def test_a_frozen_model_with_adapters():
    model = Model().requires_grad_(False)
    model.layers[0].up.lora_A = nn.Linear(WIDTH, 2, bias=False)
    model.layers[0].up.lora_B = nn.Linear(2, 3 * WIDTH, bias=False)
    groups = param_groups(model)
    assert_complete(groups, model)
    assert [group["role"] for group in groups] == ["hidden"]
    assert names(groups) == {"layers.0.up.lora_A.weight", "layers.0.up.lora_B.weight"}
    with pytest.raises(ValueError, match="Model has no trainable parameter; set requires_grad"):
        param_groups(model.requires_grad_(False))


def test_parameters_that_their_model_marks_are_vectors():
    model = Model()
    model.mixing._no_weight_decay = True
    assert "mixing" in names(param_groups(model), "vector")


def test_the_first_override_that_matches_wins():
    model = Model()
    overrides = [
        (r"layers\.0\.", {"lr": 0.5}),
        (r"layers\.\d+\.down", "vector"),
        (r"\.up\.", {"role": "embedding", "lr": 0.25, "weight_decay": 0.1}),
    ]
    groups = param_groups(model, overrides)
    assert_complete(groups, model)
    assert names(groups, "embedding") == ROLES["embedding"] | {
        *("layers.1.up.weight", "layers.1.up.bias"),
    }
    assert "layers.1.down.weight" in names(groups, "vector")
    assert "layers.0.down.weight" in names(groups, "hidden")
    rates = {name: group.get("lr") for group in groups for name in group["param_names"]}
    assert {name for name, lr in rates.items() if lr == 0.5} == {
        name for name in rates if name.startswith("layers.0.")
    }
    assert {name for name, lr in rates.items() if lr == 0.25} == {
        *("layers.1.up.weight", "layers.1.up.bias"),
    }
    as_mapping = param_groups(model, dict(overrides))
    assert [g["param_names"] for g in as_mapping] == [g["param_names"] for g in groups]


def test_options_of_overrides_reach_the_optimizer():
    model = Model()
    overrides = {"lm_head": {"lr": 0.5, "momentum": 0.75}, r"\.norm\.": {"lr": 0.125}}
    optimizer = SCALE(param_groups(model, overrides), lr=0.25, vector_lr=0.0625)
    rates = {(g["role"], g["param_names"][0]): g["lr"] for g in optimizer.param_groups}
    assert rates.pop(("head", "lm_head.weight")) == 0.5
    assert rates.pop(("vector", "layers.0.norm.weight")) == 0.125
    assert {lr for (role, _), lr in rates.items() if role == "vector"} == {0.0625}
    assert {lr for (role, _), lr in rates.items() if role != "vector"} == {0.25}
    assert [g["momentum"] for g in optimizer.param_groups if g["role"] == "head"] == [0.75]


def test_a_tied_weight_answers_to_each_of_its_names():
    model = Model(tied=True)
    for pattern in (r"^embed\.weight$", r"^lm_head\.weight$"):
        groups = param_groups(model, {pattern: {"lr": 0.5}})
        assert names(groups, "head") == {"embed.weight"} == names(groups, lr=0.5)
        assert names(param_groups(model, {pattern: "embedding"}), "head") == set()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lm_heda": "head"}, r"'lm_heda' decides no trainable parameter: it matches none"),
        ([("layers", "hidden"), (r"layers\.1", "vector")], "an earlier one took them all"),
        ([("up", {"lr": 1}), ("up", {"lr": 2})], "'up' decides no trainable parameter"),
        ({"lm_head(": "head"}, r"'lm_head\(' is not a regular expression: "),
        ({"lm_head": "heda"}, "role 'heda'; the roles are hidden, embedding, head, vector"),
        ({"lm_head": {"role": "body"}}, "'lm_head' asks for the role 'body'"),
    ],
)
def test_overrides_that_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        param_groups(Model(), overrides)
    assert "\n" not in str(caught.value)


def test_parameters_without_their_model_are_refused():
    with pytest.raises(TypeError, match=r"takes the model, .* not a list of parameters"):
        param_groups([nn.Parameter(torch.ones(2))])


def test_an_override_that_only_frozen_parameters_match_is_refused():
    model = Model()
    model.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match="decides no trainable parameter"):
        param_groups(model, {"lm_head": "head"})


@pytest.mark.parametrize("tied", [False, True])
def test_describe_fits_and_adds_up(tied):
    model = Model(tied=tied)
    groups = param_groups(model, {"mixing": {"lr": 1.0}})
    text = describe(groups)
    header, *rows = text.splitlines()
    assert max(map(len, text.splitlines())) <= 80
    assert header.split() == ["role", "tensors", "parameters", "share", "example"]
    assert [row.split()[0] for row in rows] == [group["role"] for group in groups]
    counted = sum(int(row.split()[2].replace(",", "")) for row in rows)
    assert counted == sum(p.numel() for p in model.parameters())
    assert sum(int(row.split()[1]) for row in rows) == len(list(model.parameters()))
    assert sum(float(row.split()[3].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.5)
    told = describe(SCALE(groups, lr=0.25)).splitlines()
    assert max(map(len, told)) <= 80
    assert told[0].split() == ["role", "tensors", "parameters", "share", "lr", "example"]
    rates = [1.0 if "lr" in group else 0.25 for group in groups]
    assert [float(row.split()[4]) for row in told[1 : len(groups) + 1]] == rates
    assert [row.split()[:4] for row in told[1 : len(groups) + 1]] == [r.split()[:4] for r in rows]
    if not tied:
        assert describe(model) == describe(param_groups(model))


def test_describe_of_the_widest_rows_keeps_within_the_width():
    weight = nn.Parameter(torch.empty(3, 100_000, 100_000, device="meta"))
    group = {"params": [weight], "param_names": ["model.layers.0." * 9], "role": "hidden"}
    flags = {"transposed": True, "stacked": True, "tied": True}
    for width in (80, 100):
        for facts in ({}, flags, {"tied": True}):
            assert max(map(len, describe([{**group, **facts}], width=width).splitlines())) <= width


def test_describe_of_bare_parameters():
    text = describe(torch.optim.SGD(Model().parameters(), lr=1.0))
    assert "by shape" in text
    assert "no output head" not in text


def test_a_table_of_positions_is_no_vocabulary():
    """As many positions as a hidden layer has outputs: that layer is not the head."""
    model = nn.Module()
    model.pos_embed = nn.Embedding(64, 64)
    model.up, model.down, model.fc = nn.Linear(64, 256), nn.Linear(256, 64), nn.Linear(64, 10)
    roles = {n: g["role"] for g in param_groups(model) for n in g["param_names"]}
    assert roles["down.weight"] == "hidden"
