"""The low-rank layers: shapes, starts, forward and backward, what they keep for the backward."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference.lowrank_numpy import sparse_layer
from torch import nn

from optimzoo import param_groups
from optimzoo.lowrank import FactoredLinear, LoRALinear, LowRankLinear, SparseLowRankLinear
from optimzoo.lowrank.sparse import index_dtype, random_support

KINDS = (LowRankLinear, SparseLowRankLinear, LoRALinear)
SHAPES = {  # out, in, rank
    "tall": (129, 7, 5),
    "wide": (7, 129, 5),
    "full": (9, 9, 9),
    "row": (1, 7, 1),
    "column": (7, 1, 1),
    "middle": (24, 17, 4),
}


def make(cls, shape="middle", dtype=torch.float64, seed=0, **options) -> FactoredLinear:
    """A layer with no zero part, so that every gradient is there to compare."""
    rows, columns, rank = SHAPES[shape]
    layer = cls(columns, rows, rank, alpha=3.0, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(seed)
    layer.reset_parameters(generator)
    with torch.no_grad():
        layer.B.normal_(generator=generator)
    return layer


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cls", KINDS)
def test_forward_and_gradients_are_those_of_the_dense_weight(cls, shape):
    layer = make(cls, shape)
    torch.manual_seed(1)
    x = torch.randn(2, 3, layer.in_features, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(2, 3, layer.out_features, dtype=torch.float64)
    trained = [p for p in layer.parameters() if p.requires_grad]
    y, dense = layer(x), F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(y, dense, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(y, [x, *trained], seed)
    theirs = torch.autograd.grad(dense, [x, *trained], seed)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)
    assert layer.weight.shape == (layer.out_features, layer.in_features)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sparse_layer_is_its_numpy_transcription(shape):
    layer = make(SparseLowRankLinear, shape, sparsity=0.2, bias=False)
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(6, layer.in_features)), rng.normal(size=(6, layer.out_features))
    parts = {n: p.detach().numpy() for n, p in layer.named_parameters()}
    expected = sparse_layer(x, **parts, indices=layer.indices.numpy(), scale=layer.scale, g=g)
    inputs = torch.tensor(x, requires_grad=True)
    y = layer(inputs)
    y.backward(torch.tensor(g))
    found = {n: p.grad for n, p in layer.named_parameters()} | {"x": inputs.grad, "y": y.detach()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-11, atol=1e-11)


def saved_sizes(make_loss) -> list[int]:
    sizes: list[int] = []

    def pack(tensor):
        sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        make_loss().backward()
    return sizes


@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_of_the_size_of_the_weight_waits_for_the_backward(autocast):
    layer = SparseLowRankLinear(96, 128, 8, sparsity=0.03)
    x = torch.randn(5, 96, requires_grad=True)
    dense = 96 * 128
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = saved_sizes(lambda: layer(x).float().sum())
        naive = saved_sizes(lambda: F.linear(x, layer.weight, layer.bias).float().sum())
    assert max(kept) == 128 * 8 and max(naive) == dense  # the measure sees W where W is kept
    assert sum(kept) < dense / 3
    assert layer.values.grad is not None


def test_frozen_parts_get_no_gradient():
    layer = make(SparseLowRankLinear)
    layer.values.requires_grad_(False)
    x = torch.randn(3, layer.in_features, dtype=torch.float64)
    layer(x).sum().backward()
    assert layer.values.grad is None and layer.B.grad is not None
    for p in layer.parameters():
        p.requires_grad_(False)
    x.requires_grad_(True)
    torch.testing.assert_close(
        torch.autograd.grad(layer(x).sum(), x)[0], layer.weight.sum(0).expand_as(x)
    )


@pytest.mark.parametrize("cls", KINDS)
def test_bf16_and_autocast_are_near_float32(cls):
    layer = make(cls, "wide", torch.float32)
    x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer(x)
        cast.float().sum().backward()
    assert cast.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters() if p.requires_grad)
    low = copy.deepcopy(layer).bfloat16()
    low.zero_grad()
    for y in (cast, low(x.bfloat16())):
        assert (y.float() - exact).norm() < 0.03 * exact.norm()
    low(x.bfloat16()).sum().backward()
    assert all(p.grad.isfinite().all() for p in low.parameters() if p.requires_grad)


@pytest.mark.parametrize("cls", KINDS)
def test_compiled_in_one_graph_it_is_the_same(cls):
    layer = make(cls)
    x = torch.randn(3, layer.in_features, dtype=torch.float64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    trained = [p for p in layer.parameters() if p.requires_grad]
    eager = torch.autograd.grad(layer(x).square().sum(), trained)
    for mine, other in zip(
        torch.autograd.grad(compiled(x).square().sum(), trained), eager, strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_the_starts_are_those_of_the_authors():
    torch.manual_seed(0)
    low = LowRankLinear(400, 300, 50)
    sparse = SparseLowRankLinear(400, 300, 50)
    lora = LoRALinear(400, 300, 50)
    assert low.scale == 32.0 / 50
    for tensor, bound in [
        *((layer.A, 1 / 20) for layer in (low, sparse, lora)),
        (low.B, 1 / math.sqrt(50)),
        (sparse.values, 1 / 20),
        (lora.frozen, 1 / 20),
    ]:
        assert 0.98 * bound < tensor.abs().max() <= bound
        assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not sparse.B.any() and not lora.B.any()
    assert not lora.frozen.requires_grad
    x = torch.randn(2, 400)
    torch.testing.assert_close(lora(x), F.linear(x, lora.frozen, lora.bias))


def test_draws_are_the_same_on_every_dtype_and_of_the_generator_alone():
    layers = []
    for dtype in (torch.float32, torch.float64):
        before = torch.get_rng_state()
        with torch.device("meta"):
            layer = SparseLowRankLinear(30, 20, 4, dtype=dtype)
        layer.to_empty(device="cpu").reset_parameters(torch.Generator().manual_seed(3))
        assert torch.equal(before, torch.get_rng_state())
        layers.append(layer)
    for one, other in zip(*(layer.state_dict().values() for layer in layers), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-7, atol=0)
    assert torch.equal(layers[0].indices, layers[1].indices)


def test_the_support_is_distinct_sorted_and_int32_where_it_fits():
    support = random_support(1000, 300, torch.Generator().manual_seed(0))
    assert support.dtype == torch.int32 and len(support) == 300
    assert (support.diff() > 0).all() and support[0] >= 0 and support[-1] < 1000
    assert index_dtype(2**31 - 1) == torch.int32 and index_dtype(2**31) == torch.int64
    with torch.device("meta"):  # both sides of the limit, without the memory
        small = SparseLowRankLinear(2**15, 2**15, 1, sparsity=1e-6)
        large = SparseLowRankLinear(2**16, 2**15, 1, sparsity=1e-6)
    assert (small.indices.dtype, large.indices.dtype) == (torch.int32, torch.int64)
    assert small.indices.numel() == round(1e-6 * 2**30)
    assert SparseLowRankLinear(3, 5, 1, sparsity=1.0).indices.tolist() == list(range(15))


@pytest.mark.parametrize("cls", KINDS)
def test_state_dict_and_deepcopy(cls, tmp_path):
    layer, other = make(cls, seed=0), make(cls, seed=1)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.weight, copy.deepcopy(layer).weight)
    assert f"rank={layer.rank}" in repr(layer) and "scale=0.75" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merging_keeps_the_function_and_starts_the_factors_anew(dtype):
    layer = make(LoRALinear, dtype=dtype)
    before, old_A = layer.weight.detach().double(), layer.A.detach().clone()
    layer.merge_(torch.Generator().manual_seed(5))
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    assert (layer.frozen.double() - before).norm() < tolerance * before.norm()
    assert not layer.B.any() and not torch.equal(layer.A, old_A)
    assert layer.A.abs().max() <= 1 / math.sqrt(layer.in_features) * 1.01
    again = make(LoRALinear, dtype=dtype)
    again.merge_(torch.Generator().manual_seed(5))
    assert torch.equal(again.A, layer.A)


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 6, 0), "rank is 0; for a 6 x 8 weight it must be from 1 to 6"),
        ((8, 6, 7), "rank is 7; for a 6 x 8 weight it must be from 1 to 6"),
        ((8, 6, -1), "rank is -1"),
    ],
)
def test_a_rank_beyond_the_shape(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(*arguments)


@pytest.mark.parametrize("alpha", [0, -1.0, math.nan])
def test_a_bad_alpha(alpha):
    with pytest.raises(ValueError, match="it must be above 0"):
        LowRankLinear(4, 4, 2, alpha=alpha)


@pytest.mark.parametrize("sparsity", [0, -0.1, 1.1, math.nan])
def test_a_bad_sparsity(sparsity):
    with pytest.raises(ValueError, match=r"it is a share of the entries, in \(0, 1\]"):
        SparseLowRankLinear(4, 4, 2, sparsity=sparsity)


def test_roles_of_the_parts():
    model = nn.Sequential(*(cls(8, 6, 3) for cls in KINDS), nn.Linear(6, 5))
    groups = {g["role"]: set(g["param_names"]) for g in param_groups(model)}
    assert groups["hidden"] >= {f"{i}.{part}" for i in range(3) for part in "BA"}
    assert groups["vector"] >= {"1.values", "0.bias", "1.bias", "2.bias"}
    assert "2.frozen" not in set().union(*groups.values())
