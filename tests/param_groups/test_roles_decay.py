"""Weight decay by role: norms and biases have none unless asked; `describe` shows it."""

import pytest
import torch
from optimizer_db import Tiny
from registered import NAMES, create
from test_roles import Model, names
from torch import nn

from optimzoo import SCALE, Muon, create_optimizer, describe, param_groups

WITH_DECAY = [name for name in NAMES if "weight_decay" in create(name, Tiny()).defaults]
WITH_DECAY += ["muon", "rmnp"] if "muon" in NAMES else []


def test_vectors_alone_have_a_decay_and_it_is_none():
    groups = param_groups(Model())
    assert {g["role"] for g in groups if "weight_decay" in g} == {"vector"}
    assert {g.get("weight_decay") for g in groups if g["role"] == "vector"} == {0.0}
    # A vector by override has none, and what is no vector any more has the optimizer's.
    groups = param_groups(Model(), {r"\.up\.weight": "vector", r"\.up\.bias": "embedding"})
    decays = {name: g.get("weight_decay") for g in groups for name in g["param_names"]}
    assert decays["layers.0.up.weight"] == 0.0 and decays["layers.0.up.bias"] is None


def test_an_override_asks_for_the_decay_of_vectors():
    groups = param_groups(Model(), {r"norm": {"weight_decay": 0.5}, r"bias": {"lr": 1.0}})
    decays = {name: g.get("weight_decay") for g in groups for name in g["param_names"]}
    assert decays["layers.0.norm.weight"] == 0.5
    assert decays["layers.0.up.bias"] == 0.0 and decays["layers.0.up.weight"] is None


@pytest.mark.parametrize("name", WITH_DECAY)
def test_decay_reaches_the_matrices_and_no_vector(name):
    model = Tiny()
    optimizer = create(name, model, weight_decay=0.25)
    decays = {g["role"]: g["weight_decay"] for g in optimizer.param_groups}
    assert decays["hidden"] == 0.25 and decays["vector"] == 0.0
    model = Tiny()
    bare = create(name, list(model.parameters()), weight_decay=0.25)
    rest = (
        0.0 if name in ("muon", "rmnp") else 0.25
    )  # what they do not train has `other_weight_decay`
    expected = {"hidden": 0.25, "vector": rest, None: 0.25}
    assert all(g["weight_decay"] == expected[g.get("role")] for g in bare.param_groups)


@pytest.mark.parametrize("name", ["scale", "adamw", "stable_spam", "muon"])
def test_without_a_gradient_to_follow_vectors_stay(name):
    """Only decay moves them: zero gradients, some steps."""
    if name not in NAMES:
        pytest.skip("torch has no Muon")
    model = Tiny()
    optimizer = create_optimizer(name, model, lr=0.5, weight_decay=0.125)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    hidden, vectors = (names(optimizer.param_groups, role) for role in ("hidden", "vector"))
    for n, p in model.named_parameters():
        if n in vectors:
            assert torch.equal(p, before[n]), n
        elif n in hidden:
            torch.testing.assert_close(p.detach(), before[n] * (1 - 0.5 * 0.125) ** 2)


def test_describe_shows_the_decay_of_each_role():
    model = Model()
    for make in (SCALE, lambda groups, **how: Muon(groups, other_weight_decay=0.1, **how)):
        overrides = {"pos_embed": "vector", r"mixing": "hidden"}
        text = describe(make(param_groups(model, overrides), weight_decay=0.0125))
        header, *rows = text.splitlines()
        assert max(map(len, text.splitlines())) <= 80
        assert header.split()[3:] == ["share", "lr", "decay", "example"]
        rows = [row for row in rows if "starting value" not in row]
        rest = "0.0125" if make is SCALE else "0.1"
        wanted = {"hidden": "0.0125", "embedding": rest, "head": rest, "vector": "0"}
        assert all(row.split()[5] == wanted[row.split()[0]] for row in rows)
    groups = param_groups(model, {"lm_head": {"weight_decay": 1e-5}})
    shown = {row.split()[0]: row.split()[4] for row in describe(groups).splitlines()[1:]}
    assert shown == {"hidden": "-", "embedding": "-", "head": "1e-05", "vector": "0"}
    assert "decay" not in describe(SCALE(param_groups(model))), "there is none to show"


class LoraEmbedding(nn.Module):
    """An embedding as PEFT wraps it: its tables in dictionaries, the first one lying down."""

    def __init__(self, table, rank=3):
        super().__init__()
        self.base_layer = table.requires_grad_(False)
        vocab, width = table.weight.shape
        self.lora_embedding_A = nn.ParameterDict({"default": torch.randn(rank, vocab)})
        self.lora_embedding_B = nn.ParameterDict({"default": torch.randn(width, rank)})
        self.trainable_tokens_delta = nn.ParameterDict({"default": torch.randn(5, width)})
        magnitude = nn.Module()
        magnitude.weight = nn.Parameter(torch.ones(1, width))
        self.lora_magnitude_vector = nn.ModuleDict({"default": magnitude})


def test_adapters_of_an_embedding_have_its_role():
    model = Model()
    model.embed = LoraEmbedding(model.embed)
    groups = param_groups(model)
    found = {n: g for g in groups for n in g["param_names"] if n.startswith("embed.")}
    roles = {n.split(".")[1]: (g["role"], g["transposed"]) for n, g in found.items()}
    assert roles == {
        "lora_embedding_A": ("embedding", True),
        "lora_embedding_B": ("hidden", False),
        "trainable_tokens_delta": ("embedding", False),
        "lora_magnitude_vector": ("vector", False),
    }
    # SCALE: one divisor for each coordinate, over the vocabulary, whichever way the table lies.
    optimizer = SCALE(groups, lr=0.5)
    low, tokens = (
        model.embed.get_parameter(f"{name}.default")
        for name in ("lora_embedding_A", "trainable_tokens_delta")
    )
    before = [low.detach().clone(), tokens.detach().clone()]
    low.grad = torch.randn_like(low) * torch.logspace(-2, 2, low.shape[0])[:, None]
    tokens.grad = torch.randn_like(tokens) * torch.logspace(-2, 2, tokens.shape[1])
    optimizer.step()
    for p, start, dim in ((low, before[0], 1), (tokens, before[1], 0)):
        moved = (p - start).detach().square().mean(dim).sqrt()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.5), atol=1e-5, rtol=1e-5)
