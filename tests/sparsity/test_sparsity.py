"""From a dense model to an N:M model: targets, weight scaling, pruning, report, export."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from zoo_models import llama, normal, reloaded, train

from optimzoo import param_groups
from optimzoo.models.llama import Llama, LlamaConfig
from optimzoo.optimizers.adams import AdamS
from optimzoo.sparsity import (
    WeightScale,
    finalize,
    is_nm,
    linear_targets,
    nm_mask,
    prepare,
    report,
    sparse_groups,
    to_semi_structured,
    unpack,
)

SHAPE = LlamaConfig(97, 24, 40, 2, 2)
LINEARS = [*(f"self_attn.{x}_proj" for x in "qkvo")]
LINEARS += [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
PATHS = [f"model.layers.{i}.{name}" for i in range(2) for name in LINEARS]


def small():
    return Llama(SHAPE, seed=3)


def cast(model, steps=6, **hyper):
    """The model prepared and trained; and its optimizer."""
    prepare(model, hyper.get("n", 2), hyper.get("m", 4), scale_blocks=hyper.pop("blocks", 2))
    options = {"lr": 0.01, "l1": 0.1, "total_steps": 5, "mask_every": 2, **hyper}
    optimizer = AdamS(sparse_groups(model), **options)
    train(model, optimizer, steps)
    return optimizer


def logits(model):
    with torch.no_grad():
        return model(torch.arange(20).view(2, 10))


def test_targets_are_the_hidden_linears_or_those_named():
    model = small()
    assert list(linear_targets(model)) == PATHS
    assert list(linear_targets(model, r"up_proj$")) == [p for p in PATHS if "up" in p]
    assert list(linear_targets(model, "lm_head")) == ["lm_head"]
    with pytest.raises(ValueError, match="Llama has no linear layer like 'nothing'; name them"):
        linear_targets(model, "nothing")
    with pytest.raises(ValueError, match="Embedding has no hidden linear layer"):
        linear_targets(nn.Embedding(4, 4))


def test_groups_say_which_weights_become_sparse():
    model = small()
    prepare(model, targets="mlp")
    groups = sparse_groups(model, targets="mlp")
    sparse = [name for g in groups if g["sparse"] for name in g["param_names"]]
    assert sparse == [f"{p}.parametrizations.weight.original" for p in PATHS if "mlp" in p]
    assert {g["role"] for g in groups if g["sparse"]} == {"hidden"}
    params = [p for g in groups for p in g["params"]]
    assert len(params) == len(set(params)) == len(list(model.parameters()))
    optimizer = AdamS(groups, lr=0.01, l1=0.1, total_steps=5)
    train(model, optimizer, 1)
    masked = [p for p in params if "mask" in optimizer.state[p]]
    assert len(masked) == len(sparse)
    named = {g["role"] for g in sparse_groups(small(), targets="lm_head") if g["sparse"]}
    assert named == {"hidden"}


def test_parametrized_weights_keep_their_roles():
    plain, model = small(), small()
    prepare(model)
    for module in (model.lm_head, model.model.embed_tokens):
        parametrize.register_parametrization(module, "weight", nn.Identity())
    expected = {n: g["role"] for g in param_groups(plain) for n in g["param_names"]}
    found = {n: g["role"] for g in param_groups(model) for n in g["param_names"]}
    scales = {n: r for n, r in found.items() if n.endswith(".scale")}
    assert set(scales.values()) == {"vector"}
    assert len(scales) == len(PATHS)
    originals = {
        n.replace("parametrizations.weight.original", "weight"): r
        for n, r in found.items()
        if n not in scales
    }
    assert originals == expected
    single = parametrize.register_parametrization(nn.Linear(4, 3), "weight", nn.Identity())
    roles = {
        n: g["role"] for g in param_groups(single, {"weight": "hidden"}) for n in g["param_names"]
    }
    assert roles == {"bias": "vector", "parametrizations.weight.original": "hidden"}


def test_scaling_starts_as_the_identity_and_learns():
    model, plain = small(), small()
    assert prepare(model) == PATHS
    assert torch.equal(logits(model), logits(plain))
    train(model, AdamS(sparse_groups(model), lr=0.01, l1=0.0, total_steps=5), 2)
    scales = [m.scale for m in model.modules() if isinstance(m, WeightScale)]
    assert [tuple(s.shape) for s in scales[:7]] == [(24, 2)] * 4 + [(40, 2)] * 2 + [(24, 2)]
    assert all((s != 1).all() for s in scales)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "columns", "blocks"), [(7, 12, 2), (1, 12, 3), (12, 4, 1)])
def test_each_block_of_a_row_has_its_factor(rows, columns, blocks, transposed):
    weight = normal(columns, rows) if transposed else normal(rows, columns)
    scaling = WeightScale(weight, blocks, transposed=transposed)
    with torch.no_grad():
        scaling.scale.copy_(normal(rows, blocks, seed=1))
        scaled = scaling(weight)
    for r in range(rows):
        for c in range(columns):
            at = (c, r) if transposed else (r, c)
            assert scaled[at] == weight[at] * scaling.scale[r, c // (columns // blocks)]


@pytest.mark.parametrize("blocks", [0, 1, 2, 4])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 8)])
def test_finalize_prunes_folds_and_leaves_a_plain_model(blocks, n, m):
    model = small()
    names, kinds = list(small().state_dict()), [type(x) for x in small().modules()]
    optimizer = cast(model, n=n, m=m, blocks=blocks)
    weights = {id(p): p.detach().clone() for p in model.parameters()}
    dense = logits(model)
    assert list(finalize(model, optimizer)) == [f"{path}.weight" for path in PATHS]
    assert list(model.state_dict()) == names
    assert [type(x) for x in model.modules()] == kinds
    for path in PATHS:
        weight = model.get_submodule(path).weight
        before = weights[id(weight)]  # the same parameter object as before
        assert is_nm(weight, n, m)
        kept = weight != 0
        assert (kept.unflatten(1, (-1, m)).sum(-1) == n).all()
        ratio = (weight / before)[kept]
        assert (ratio != 1).any() == bool(blocks)  # the scale is in the weight
    assert not torch.equal(logits(model), dense)  # so short a ramp leaves much to prune
    assert logits(model).isfinite().all()


def test_finalize_takes_the_last_mask_and_not_the_magnitudes():
    model = small()
    optimizer = cast(model, steps=1, blocks=0)
    layer = model.get_submodule(PATHS[0])
    last = nm_mask(small().get_submodule(PATHS[0]).weight, 2, 4)  # of the top of step 1
    with torch.no_grad():
        layer.weight.copy_(torch.where(last, 0.01, 1.0))
    finalize(model, optimizer)
    assert torch.equal(layer.weight != 0, last)


def test_pruning_and_folding_commute_with_the_forward():
    """The finalized model is the scaled one with the masked weights at zero."""
    model = small()
    optimizer = cast(model)
    twin = small()
    prepare(twin)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            if "mask" in optimizer.state[p]:
                q.mul_(unpack(optimizer.state[p]["mask"], p.shape))
    expected = logits(twin)
    finalize(model, optimizer)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


def test_a_copy_can_be_finalized_while_the_training_goes_on():
    model = small()
    optimizer = cast(model)
    twin = copy.deepcopy((model, optimizer))
    finalize(*twin)
    losses = train(model, optimizer, 2)
    assert all(loss == loss for loss in losses)
    assert len([m for m in model.modules() if isinstance(m, WeightScale)]) == len(PATHS)
    finalize(model, optimizer)
    assert is_nm(model.get_submodule(PATHS[0]).weight, 2, 4)


def test_finalize_refuses_what_it_cannot_prune():
    model = small()
    optimizer = AdamS(sparse_groups(model), lr=0.01, l1=0.1, total_steps=5)
    with pytest.raises(ValueError, match="AdamS has no masks yet; take a step"):
        finalize(model, optimizer)
    with pytest.raises(ValueError, match="AdamW has no masks yet"):
        finalize(model, torch.optim.AdamW(model.parameters()))
    train(model, optimizer, 1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="is no parameter of this model"):
        finalize(small(), optimizer)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 5}, "Invalid n:m: 5:4"),
        ({"scale_blocks": -1}, "Invalid scale_blocks: -1"),
        ({"m": 5, "n": 2}, r"q_proj \[24, 24\]: 24 inputs are not a multiple of m=5"),
        ({"scale_blocks": 16}, "q_proj has 24 inputs, not a multiple of 16 blocks"),
        ({"targets": "nothing"}, "no linear layer like 'nothing'"),
    ],
)
def test_prepare_refuses_in_one_line_and_changes_nothing(arguments, message):
    model = small()
    with pytest.raises(ValueError, match=message) as caught:
        prepare(model, **arguments)
    assert "\n" not in str(caught.value)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def test_prepare_refuses_to_scale_a_weight_that_another_layer_has():
    model = small()
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(
        ValueError, match=r"lm_head shares its weight \(.*leave it out with targets"
    ):
        prepare(model, targets="lm_head|layers")
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert "lm_head" in prepare(model, targets="lm_head|layers", scale_blocks=0)


def test_prepare_is_done_once():
    model = small()
    prepare(model)
    with pytest.raises(ValueError, match="q_proj is scaled already; prepare a model once"):
        prepare(model)


def test_report_counts_zeros_flips_and_magnitudes():
    weight = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        weight.weight.copy_(torch.tensor([[4.0, 2.0, 1.0, 0.0], [0.0, 0.0, 8.0, 2.0]]))
    group = {"params": [weight.weight], "role": "hidden"}
    optimizer = AdamS([group], lr=0.0, l1=0.0, total_steps=9, mask_every=1)
    weight.weight.grad = torch.zeros(2, 4)
    optimizer.step()
    first = report(weight, optimizer)
    assert first.total() == {
        "zeros": 3 / 8,
        "flips": 0.0,
        "masked_large": 1 / 8,
        "masked_mean": 0.125,
        "masked_max": 0.5,
    }
    assert first.weights[0].kept_median == 2.0
    assert "weight" in str(first) and len(str(first).splitlines()) == 2
    with torch.no_grad():
        weight.weight.copy_(torch.tensor([[4.0, 2.0, 1.0, 0.0], [8.0, 2.0, 0.0, 0.0]]))
    optimizer.step()
    assert report(weight, optimizer, first).weights[0].flips == 4
    assert report(weight, optimizer).weights[0].flips == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA says")
def test_semi_structured_needs_cuda():
    model = small()
    finalize(model, cast(model))
    with pytest.raises(RuntimeError, match=r"2:4 layers on cpu: .*need CUDA") as caught:
        to_semi_structured(model)
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="no 2:4 linear layer; finalize"):
        to_semi_structured(small())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="2:4 kernels are CUDA's alone")
def test_semi_structured_computes_what_the_pruned_model_does():
    layer = nn.Linear(256, 128, bias=False).cuda().to(torch.bfloat16)
    with torch.no_grad():
        layer.weight.mul_(nm_mask(layer.weight, 2, 4))
    model, x = nn.Sequential(layer), torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    expected = model(x)
    assert to_semi_structured(model) == ["0"]
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)


def test_a_sparse_model_is_an_ordinary_checkpoint(tmp_path):
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    assert prepare(model) == PATHS
    optimizer = AdamS(sparse_groups(model), lr=0.01, l1=0.1, total_steps=4)
    tokens = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    finalize(model, optimizer)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, expected)
    assert is_nm(again.get_submodule(PATHS[3]).weight, 2, 4)
    safetensors.save_file(model.state_dict(), tmp_path / "own.safetensors")
    ours = small()
    ours.load_state_dict(safetensors.load_file(tmp_path / "own.safetensors"))
    torch.testing.assert_close(ours(tokens), expected, rtol=1e-4, atol=1e-5)


def test_a_gpt2_is_grouped_along_its_inputs():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=97, n_embd=24, n_layer=1, n_head=2, n_positions=32)
    model = transformers.GPT2LMHeadModel(config)
    paths = prepare(model)
    assert [p.split(".")[-1] for p in paths] == ["c_attn", "c_proj", "c_fc", "c_proj"]
    optimizer = AdamS(sparse_groups(model), lr=0.01, l1=0.1, total_steps=4)
    tokens = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    finalize(model, optimizer)
    for path in paths:
        weight = model.get_submodule(path).weight  # [in, out]
        assert is_nm(weight, 2, 4, transposed=True)
        assert (weight != 0).float().mean() == 0.5


def test_masks_and_scales_resume_to_the_bit():
    model = small()
    optimizer = cast(model, steps=3)
    saved = reloaded({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    again = Llama(SHAPE, seed=9)
    prepare(again)
    other = AdamS(sparse_groups(again), lr=0.5, l1=9.0, total_steps=50)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert train(again, other, 4) == train(model, optimizer, 4)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    names = [finalize(m, o) for m, o in ((again, other), (model, optimizer))]
    assert names[0] == names[1]
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_the_zoos_small_llama_has_layers_that_cannot_be_grouped():
    with pytest.raises(ValueError, match=r"down_proj \[24, 37\]: 37 inputs"):
        prepare(llama())
