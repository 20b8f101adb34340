"""N:M masks: exactly n of m, ties, odd layouts, and their packed form."""

import numpy as np
import pytest
import torch
from needs import needs_cpu_kernels
from reference.adams_numpy import nm_mask as numpy_mask

from optimzoo.kernels import native
from optimzoo.sparsity import is_nm, nm_mask, pack, unpack
from optimzoo.sparsity.masks import packed_mask

PATTERNS = [(1, 1), (1, 2), (2, 4), (1, 4), (4, 4), (2, 3), (4, 8), (3, 16)]


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_keeps_what_a_sort_of_each_group_keeps(n, m, dtype):
    for rows, groups in [(1, 1), (7, 3), (3, 129), (129, 1)]:
        # Few values, so that most groups have ties.
        weight = (draw(rows, groups * m, seed=rows) * 2).round().to(dtype)
        mask = nm_mask(weight, n, m)
        assert mask.dtype == torch.bool
        assert np.array_equal(mask.numpy(), numpy_mask(weight.double().numpy(), n, m))
        assert (mask.unflatten(1, (groups, m)).sum(-1) == n).all()


def test_of_equals_the_lower_index_wins():
    assert nm_mask(torch.zeros(2, 8), 2, 4).tolist() == [[True, True, False, False] * 2] * 2
    assert nm_mask(torch.tensor([[1.0, -2.0, 2.0, -2.0]]), 2, 4).tolist() == [
        [False, True, True, False]
    ]


def test_not_a_number_is_kept_in_sight_and_counted():
    nan, inf = float("nan"), float("inf")
    weight = torch.tensor([[1.0, nan, 3.0, 2.0, nan, nan, nan, 9.0, 1.0, -inf, inf, nan]])
    mask = nm_mask(weight, 2, 4)
    assert mask.tolist() == [[*[False, True, True, False], *[True, True, False, False],
                              *[False, True, True, False]]]  # fmt: skip


def test_layouts_group_along_the_inputs():
    matrix = draw(6, 8)
    expected = nm_mask(matrix, 2, 4)
    assert torch.equal(nm_mask(matrix.mT.contiguous(), 2, 4, transposed=True), expected.mT)
    assert torch.equal(nm_mask(matrix.mT, 2, 4, transposed=True), expected.mT)
    assert torch.equal(nm_mask(matrix.reshape(6, 2, 2, 2), 2, 4), expected.reshape(6, 2, 2, 2))
    stack = torch.stack([matrix, matrix * draw(6, 8, seed=1)])
    each = torch.stack([nm_mask(x, 2, 4) for x in stack])
    assert torch.equal(nm_mask(stack, 2, 4, stacked=True), each)
    turned = nm_mask(stack.mT.contiguous(), 2, 4, stacked=True, transposed=True)
    assert torch.equal(turned, each.mT)
    strided = torch.stack([matrix, matrix], -1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(nm_mask(strided, 2, 4), expected)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_weights_have_empty_masks(shape):
    mask = nm_mask(torch.zeros(shape), 2, 4)
    assert mask.shape == shape
    assert unpack(pack(mask), shape).shape == shape


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 4), (1, 0)])
def test_refuses_what_is_no_pattern(n, m):
    with pytest.raises(ValueError, match=f"Invalid n:m: {n}:{m}; n must be from 1 to m"):
        nm_mask(torch.ones(4, 4), n, m)


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 2), (8, 7)])
def test_refuses_inputs_that_fill_no_group(shape):
    inputs = 7 if shape == (8, 7) else 6
    with pytest.raises(ValueError, match=f"{inputs} inputs are not a multiple of m=4"):
        nm_mask(torch.ones(shape), 2, 4)
    with pytest.raises(ValueError, match="6 inputs are not a multiple of m=4"):
        nm_mask(torch.ones(6, 8), 2, 4, transposed=True)


def test_is_nm_counts_values_and_not_masks():
    weight = draw(6, 8)
    assert not is_nm(weight, 2, 4)
    pruned = weight * nm_mask(weight, 2, 4)
    assert is_nm(pruned, 2, 4)
    assert is_nm(pruned, 3, 4)
    assert not is_nm(pruned, 1, 4)
    assert is_nm(pruned.mT, 2, 4, transposed=True)
    assert is_nm(torch.zeros(6, 8), 1, 4)  # fewer than n is still n:m for the hardware
    assert not is_nm(pruned + float("nan"), 2, 4)


@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (129, 4), (3, 8), (2, 3, 5), (4, 2, 3, 2), (5,)])
def test_packing_is_one_bit_a_weight_and_loses_nothing(shape):
    mask = draw(*shape) > 0
    bits = pack(mask)
    assert bits.dtype == torch.uint8
    assert bits.shape == (shape[0], -(-mask[0].numel() // 8))
    assert torch.equal(unpack(bits, shape), mask)
    assert torch.equal(pack(mask[:1]), bits[:1])  # a shard of the mask is the mask of the shard


def test_packed_bits_are_those_of_numpy():
    mask = draw(5, 24) > 0
    expected = np.packbits(mask.numpy(), axis=1, bitorder="little")
    assert np.array_equal(pack(mask).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (1, 8), (8, 8)])
def test_the_packed_mask_of_one_pass_is_the_mask_packed(n, m, dtype):
    for rows, groups in [(1, 1), (7, 3), (3, 129), (129, 1), (5, 16)]:
        weight = (draw(rows, groups * m + m, seed=rows) * 2).round().to(dtype)
        weight[0, 0], weight[-1, -1] = float("nan"), float("-inf")
        # The last columns, at an address that no vector is aligned to, and whole.
        for part in (weight[:, m:].contiguous(), weight.flatten()[m:].view(1, -1), weight):
            assert torch.equal(packed_mask(part, n, m), pack(nm_mask(part, n, m)))


def test_the_packed_mask_of_other_layouts():
    weight = draw(6, 4, 8, dtype=torch.float32)
    for layout in ({"stacked": True}, {}, {"stacked": True, "transposed": True}):
        assert torch.equal(
            packed_mask(weight, 2, 4, **layout), pack(nm_mask(weight, 2, 4, **layout))
        )
    assert torch.equal(packed_mask(weight.mT, 1, 2), pack(nm_mask(weight.mT, 1, 2)))
    empty = torch.empty(0, 8)
    assert torch.equal(packed_mask(empty, 2, 4), pack(nm_mask(empty, 2, 4)))
    with pytest.raises(ValueError, match="6 inputs are not a multiple of m=4"):
        packed_mask(torch.ones(4, 6), 2, 4)


@needs_cpu_kernels
def test_float32_takes_the_kernel(monkeypatch):
    taken = []
    kernel = native.CPU.nm_mask
    monkeypatch.setattr(native.CPU, "nm_mask", lambda *a: taken.append(a) or kernel(*a))
    packed_mask(torch.ones(3, 8), 2, 4)
    packed_mask(torch.ones(3, 8, dtype=torch.float64), 2, 4)
    assert len(taken) == 1
