"""Starting values: ratios to AdamW's rate, moved to a width and a batch."""

import math

import numpy as np
import pytest
import torch

from optimzoo import cli, create_optimizer, describe, param_groups, starting_values, tuned_rates
from optimzoo.models.llama import Llama, LlamaConfig
from optimzoo.roles import is_position_name

ROLES = ("lr", "embedding_lr", "head_lr", "vector_lr")


def record(optimizer, rates, variant=None, **values):
    rates = dict(zip(ROLES, rates, strict=True))
    return {"optimizer": optimizer, "variant": variant or {}, "hyper": {}, "values": rates | values}


# Of roles that Adam trains; half way from AdamW's rates lie 2e-2, 1e-1 and 3e-2.
VECTOR, EMBEDDING, HEAD = 2e-2**2 / 1e-2, 1e-1**2 / 6e-2, 3e-2**2 / 8e-3


@pytest.fixture
def settings(monkeypatch):
    """Two comparisons of which every value is another one."""
    small = [
        record("adamw", (2e-3, 6e-2, 8e-3, 1e-2), betas=[0.9, 0.999], clip=1.0, weight_decay=0.1),
        record("scale", (4e-3, 3e-2, 1e-2, VECTOR), momentum=0.9, clip=0.0, weight_decay=0.0),
        record("muon", (2e-2, EMBEDDING, HEAD, 1e-2), other_betas=[0.9, 0.99], clip=1.0),
        record("muon", (3e-2, 2e-1, 3e-2, 1e-2), {"state_bits": 8, "other": "scale"}),
    ]
    large = [
        record("adamw", (1e-3, 2e-2, 4e-3, 1e-2), betas=[0.9, 0.98], clip=0.0, weight_decay=0.0),
        record("scale", (1e-3, 3e-2, 2e-3, VECTOR), momentum=0.8, clip=1.0, weight_decay=0.1),
    ]
    made = {
        "small": {"batch_tokens": 1000, "width": 128.0, "methods": small},
        "large": {"batch_tokens": 16000, "width": 64.0, "methods": large},
    }
    monkeypatch.setattr(tuned_rates, "tuned_settings", lambda: made)
    return made


def model(width=32):
    return Llama(LlamaConfig(50, width, 2 * width, 1, 2))


def rates(start):
    return [start.options[key] for key in ROLES]


def test_rates_are_ratios_to_adamws(settings):
    start = starting_values("scale", adamw_lr=5e-4)
    small = np.array([4e-3, 3e-2, 1e-2, 2e-2]) / 2e-3
    large = np.array([1e-3, 3e-2, 2e-3, 2e-2]) / 1e-3
    np.testing.assert_allclose(rates(start), 5e-4 * np.sqrt(small * large), rtol=0.05)
    assert start.settings == ("small", "large")
    factors = np.maximum(small / large, large / small)
    np.testing.assert_allclose(list(start.spread.values()), factors)
    alone = starting_values("muon", adamw_lr=1e-3)
    np.testing.assert_allclose(rates(alone), [1e-2, 5e-2, 1.5e-2, 5e-3])
    assert alone.spread == {} and alone.settings == ("small",)


def test_without_a_rate_adamws_own_falls_with_the_root_of_the_width(settings):
    np.testing.assert_allclose(rates(starting_values("muon")), [2e-2, 1e-1, 3e-2, 1e-2])
    wide = starting_values("adamw", model(512), batch_tokens=1000)
    np.testing.assert_allclose(rates(wide), np.array([2e-3, 6e-2, 8e-3, 1e-2]) / 2)


def test_rows_and_columns_of_a_fixed_norm_need_more_at_a_larger_width(settings):
    start = starting_values("scale", model(512), adamw_lr=1e-3, batch_tokens=1000)
    np.testing.assert_allclose(rates(start), [2e-3 * 2, 15e-3 * 2, 5e-3, 1e-2])
    start = starting_values("muon", model(512), adamw_lr=1e-3)
    np.testing.assert_allclose(rates(start), [1e-2 * 2, 5e-2, 1.5e-2, 5e-3])
    groups = param_groups(model(512))
    other = {"state_bits": 8, "other": "scale"}
    start = starting_values("muon", groups, adamw_lr=1e-3, **other)
    np.testing.assert_allclose(rates(start), [1.5e-2 * 2, 1e-1 * 2, 1.5e-2, 5e-3])
    assert start.options.items() >= other.items()


class Positions(torch.nn.Module):
    """A model with learned positions, and a head that may be tied to the table of tokens."""

    def __init__(self, tied):
        super().__init__()
        self.wte, self.wpe = torch.nn.Embedding(50, 32), torch.nn.Embedding(16, 32)
        self.layer = torch.nn.Linear(32, 32)
        self.lm_head = torch.nn.Linear(32, 50, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight


def test_positions_get_the_heads_rate(settings):
    tied = starting_values("scale", Positions(tied=True), adamw_lr=1e-3, batch_tokens=1000)
    np.testing.assert_allclose(rates(tied), [2e-3 / 2, 5e-3, 5e-3, 1e-2])
    assert tied.overrides == {}
    net = Positions(tied=False)
    apart = starting_values("scale", net, adamw_lr=1e-3, batch_tokens=1000)
    np.testing.assert_allclose(rates(apart), [2e-3 / 2, 15e-3 / 2, 5e-3, 1e-2])
    scope = {"optimzoo": __import__("optimzoo"), "torch": torch, "model": net}
    exec(str(apart), scope)
    optimizers = [
        create_optimizer("scale", param_groups(net, apart.overrides), **apart.options),
        scope["optimizer"],
    ]
    for optimizer in optimizers:
        found = {n: g["lr"] for g in optimizer.param_groups for n in g["param_names"]}
        assert found["wte.weight"] == 7.5e-3 and found["wpe.weight"] == found["lm_head.weight"]
        assert "starting value" not in describe(optimizer)


def test_a_role_that_adamw_was_tuned_for_has_its_ratio_to_adamws_own(settings):
    known = {"hidden": 1e-3, "embedding": 6e-3}
    start = starting_values("scale", adamw_lr=known, batch_tokens=1000)
    np.testing.assert_allclose(rates(start), [2e-3, 3e-3, 5e-3, 1e-2])
    every = {"hidden": 1e-3, "embedding": 6e-3, "head": 8e-4, "vector": 2e-4}
    np.testing.assert_allclose(
        rates(starting_values("scale", adamw_lr=every, batch_tokens=16000)),
        [1e-3, 9e-3, 4e-4, 4e-4],
    )
    assert rates(starting_values("adamw", adamw_lr=every)) == list(every.values())
    tied = starting_values("scale", Positions(tied=True), adamw_lr=known, batch_tokens=1000)
    np.testing.assert_allclose(rates(tied)[1:3], [3e-3 / 2, 5e-3])
    both = starting_values("scale", Positions(tied=False), adamw_lr=known, batch_tokens=1000)
    assert [group["lr"] for group in both.overrides.values()] == [5e-3]


@pytest.mark.parametrize(
    "name, positions",
    [
        ("transformer.wpe.weight", True),
        ("model.decoder.embed_positions.weight", True),
        ("embeddings.position_embeddings.weight", True),
        ("embeddings.token_type_embeddings.weight", True),
        ("layer.0.SelfAttention.relative_attention_bias.weight", True),
        ("visual.positional_embedding", True),
        ("vit.pos_embed", True),
        ("model.embed_tokens.weight", False),
        ("model.embed_tokens_per_layer.weight", False),
        ("composer.embedding.weight", False),
    ],
)
def test_positions_are_known_by_name(name, positions):
    assert is_position_name(name) == positions


@pytest.mark.parametrize("tokens, share", [(10, 0.0), (1000, 0.0), (4000, 0.5), (10**6, 1.0)])
def test_a_batch_lies_between_those_of_the_comparisons(settings, tokens, share):
    start = starting_values("scale", adamw_lr=1e-3, batch_tokens=tokens)
    ends = np.log([[2, 15, 5, 10], [1, 30, 2, 20]])
    expected = 1e-3 * np.exp((1 - share) * ends[0] + share * ends[1])
    np.testing.assert_allclose(rates(start), expected, rtol=0.05)
    if share != 0.5:  # as far from one as from the other
        near = 1 if share else 0
        assert start.clip == (None, 1.0)[near]
        assert start.options["momentum"] == (0.9, 0.8)[near]
        assert start.options["weight_decay"] == (0.0, 0.1)[near]


def test_the_half_life_of_beta2_stays_in_tokens(settings):
    def beta2(tokens, name="adamw", key="betas"):
        beta1, value = starting_values(name, batch_tokens=tokens).options[key]
        assert beta1 == 0.9
        return value

    assert beta2(1000) == 0.999
    assert beta2(100) == 0.999, "no longer than this"
    assert beta2(3000) == pytest.approx(0.999**3, abs=1e-4)
    assert beta2(16_000) == 0.98
    assert beta2(32_000) == pytest.approx(0.98**2, abs=1e-4)
    assert beta2(500_000) == 0.95, "no shorter than this"
    half_life = 1000 / math.log2(1 / 0.99)
    moved = beta2(2000, "muon", "other_betas")
    assert 2000 / math.log2(1 / moved) == pytest.approx(half_life, rel=0.01)


def test_warm_up_is_a_share_until_the_steps_are_known(settings):
    assert starting_values("adamw").warmup == 0.1
    assert starting_values("adamw", steps=2000).warmup == 200
    assert starting_values("adamw", steps=3).warmup == 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: starting_values("muno"), "unknown optimizer 'muno'; did you mean muon"),
        (lambda: starting_values("adams"), "adams has no tuned rows to start from; there are "),
        (lambda: starting_values("scale", normalize="row"), r"scale \(normalize='row'\) has no"),
        (lambda: starting_values("muon", adamw_lr=0.0), "adamw_lr=0.0: it must be positive"),
        (
            lambda: starting_values("muon", adamw_lr={"hidden": 1e-3, "head": -1.0}),
            "adamw_lr=-1.0: it must be positive",
        ),
        (
            lambda: starting_values("muon", adamw_lr={"head": 1e-3}),
            r"adamw_lr=\{'head': 0.001\}: by role it takes hidden and any of embedding, head, ",
        ),
        (
            lambda: starting_values("muon", adamw_lr={"hidden": 1e-3, "heads": 1e-3}),
            "by role it takes hidden and any of embedding, head, vector",
        ),
        (lambda: starting_values("muon", batch_tokens=-1), "batch_tokens=-1: it must be positive"),
        (lambda: starting_values("muon", steps=0), "steps=0: it must be positive"),
        (
            lambda: starting_values("muon", "nano"),
            "model='nano': it must be a module, or its param_groups",
        ),
        (lambda: starting_values("muon", []), "no hidden weight to take the width of"),
    ],
)
def test_errors_are_one_line_and_name_the_value(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def shipped():
    return [
        (record["optimizer"], record["variant"])
        for setting in tuned_rates.tuned_settings().values()
        for record in setting["methods"]
    ]


@pytest.mark.parametrize("name, variant", shipped(), ids=str)
def test_every_shipped_method_is_made_and_steps(name, variant, capsys):
    start = starting_values(name, model(), adamw_lr=1e-3, steps=100, **variant)
    net = model()
    optimizer = create_optimizer(name, net, **start.options)
    given = {group["role"]: group["lr"] for group in optimizer.param_groups}
    keys = dict(zip(("hidden", "embedding", "head", "vector"), ROLES, strict=True))
    assert given == {role: start.options[key] for role, key in keys.items()}
    assert "starting value" not in describe(optimizer)
    before = [p.detach().clone() for p in net.parameters()]
    net(torch.arange(20).view(2, 10)).square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    # What is printed is the call.
    scope = {"optimzoo": __import__("optimzoo"), "torch": torch, "model": net}
    exec(str(start), scope)
    printed = scope["optimizer"]
    assert type(printed) is type(optimizer)
    for mine, theirs in zip(printed.param_groups, optimizer.param_groups, strict=True):
        assert mine["lr"] == theirs["lr"]
        assert mine.get("weight_decay") == theirs.get("weight_decay")


def test_describe_names_the_rate_that_is_far_from_its_starting_value(settings):
    def lines(**rates):
        return describe(create_optimizer("muon", model(), **rates)).splitlines()[5:]

    # At width 32 the hidden rate is 1e-2 / 2 of AdamW's 1e-3, the embedding's 5e-2.
    assert lines(lr=5e-3, embedding_lr=5e-2, head_lr=1.5e-2, vector_lr=5e-3) == []
    assert lines(lr=5e-3, embedding_lr=0.39, head_lr=2e-3, vector_lr=5e-3) == []
    [line] = lines(lr=5e-3, embedding_lr=0.41, head_lr=2e-3, vector_lr=5e-3)
    assert line == "embedding: lr 0.41, starting value 0.05 for this hidden lr"
    named = lines(lr=0.05, embedding_lr=0.5, head_lr=1e-3, vector_lr=4e-3)
    assert [line.split(":")[0] for line in named] == ["head", "vector"]
    assert lines(lr=0.0, embedding_lr=1.0) == [], "in a warm-up's first step"
    untuned = create_optimizer("rmsprop", model(), lr=1.0, embedding_lr=1e-6)
    assert "starting value" not in describe(untuned)


def test_the_command_prints_code_to_paste(capsys):
    arguments = ["start", "60m", "--optimizer", "muon", "--adamw-lr", "1e-3", "--steps", "1000"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    scope = {"model": model()}
    exec(out, scope)
    assert type(scope["optimizer"]).__name__ == "Muon"
    assert "warm-up over 100 steps" in out
    assert "import torch" not in out  # nothing is clipped
    assert cli.main(["start", "pico", "--hyper", "normalize=spectral"]) == 0
    assert 'normalize="spectral"' in capsys.readouterr().out
    by_role = ["--adamw-lr", "hidden=2e-3", "embedding=0.05", "--optimizer", "adamw"]
    assert cli.main(["start", "pico", *by_role]) == 0
    assert "lr=0.002, embedding_lr=0.05" in " ".join(capsys.readouterr().out.split())
    for wrong, message in (
        (["60"], "unknown model '60'"),
        (["60m", "--optimizer", "muno"], "unknown optimizer 'muno'"),
        (["60m", "--hyper", "normalize"], "NAME=VALUE"),
        (["60m", "--steps", "0"], "steps=0"),
        (["60m", "--adamw-lr", "fast"], "--adamw-lr fast: give one rate, or hidden=RATE"),
        (["60m", "--adamw-lr", "hidden=1e-3", "2e-3"], "give one rate, or hidden=RATE"),
    ):
        assert cli.main(["start", *wrong]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
