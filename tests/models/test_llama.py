"""The benchmark model against transformers' Llama, its initialisation, and its limits."""

from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.training.flops import flops_per_token
from optimzoo.models.llama import CONFIGS, Llama, LlamaConfig, RMSNorm, get_config

# Three heads, a small RoPE base and weights large enough that attention is far from uniform: a
# wrong pairing, base or scale shows up well above the tolerance.
ODD = LlamaConfig(
    vocab_size=509,
    hidden_size=96,
    intermediate_size=251,
    num_hidden_layers=3,
    num_attention_heads=3,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=500.0,
    initializer_range=0.1,
)


def hugging_face(config, dtype=torch.float32):
    from transformers import AutoModelForCausalLM
    from transformers import LlamaConfig as HuggingFaceConfig

    fields = asdict(config)
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    reference = HuggingFaceConfig(**fields, rope_parameters=rope, use_cache=False)
    return AutoModelForCausalLM.from_config(reference, dtype=dtype)


def tokens(config, batch=2, length=37, seed=1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


def perturb_norms(model) -> None:
    """Norm weights start at one, where a forgotten weight would go unnoticed."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


def states_equal(first, second) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("base", [ODD, CONFIGS["nano"]], ids=["odd", "nano"])
@pytest.mark.parametrize("direction", ["ours_to_theirs", "theirs_to_ours"])
def test_logits_and_gradients_equal_transformers(base, tied, direction):
    config = replace(base, tie_word_embeddings=tied)
    ours, theirs = Llama(config, seed=3), hugging_face(config)
    source, target = (ours, theirs) if direction == "ours_to_theirs" else (theirs, ours)
    perturb_norms(source)
    target.load_state_dict(source.state_dict(), strict=True)
    assert states_equal(ours, theirs)

    input_ids, labels = tokens(config), tokens(config, seed=4)
    logits, expected = ours(input_ids), theirs(input_ids).logits
    assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    ours(input_ids, labels).backward()
    F.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        error, size = (parameter.grad - gradients[name]).abs().max(), gradients[name].abs().max()
        assert size > 0 and error <= 1e-5 * size, f"{name}: {error:.1e} of {size:.1e}"


def test_bf16_logits_equal_transformers():
    ours, theirs = Llama(ODD).to(torch.bfloat16), hugging_face(ODD, torch.bfloat16)
    perturb_norms(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    logits, expected = ours(tokens(ODD)), theirs(tokens(ODD)).logits
    assert logits.dtype == torch.bfloat16
    # 2**-5 is one bf16 step at 4, where the largest logits are: kernels may sum in another order.
    assert 4 < expected.abs().max() < 8
    assert_close(logits, expected, rtol=2**-7, atol=2**-5)


def test_fp32_norm_equals_torch():
    norm, x = RMSNorm(96, 1e-5), torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    perturb_norms(norm)
    assert_close(norm(x), F.rms_norm(x, (96,), norm.weight, 1e-5), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_the_fp32_cross_entropy_of_the_logits(dtype):
    model = Llama(ODD).to(dtype)
    input_ids, labels = tokens(ODD), tokens(ODD, seed=4)
    labels[0, :5] = -100
    loss, logits = model(input_ids, labels), model(input_ids)
    kept = labels != -100
    expected = -logits.float().log_softmax(-1)[kept].gather(1, labels[kept][:, None]).mean()
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(loss, F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()))


def test_a_later_token_does_not_change_earlier_logits():
    model = Llama(ODD)
    first = tokens(ODD)
    second = first.clone()
    second[:, 20] = (second[:, 20] + 1) % ODD.vocab_size
    before, after = model(first), model(second)
    assert_close(after[:, :20], before[:, :20], rtol=0, atol=1e-6)
    assert (after[:, 20:] - before[:, 20:]).abs().amax(-1).min() > 1e-3


def test_init_depends_on_the_seed_only():
    torch.manual_seed(0)
    first = Llama(CONFIGS["nano"], seed=5)
    torch.manual_seed(123)
    torch.randn(1000)
    state = torch.get_rng_state()
    second = Llama(CONFIGS["nano"], seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert states_equal(first, second)

    second.reset_parameters(6)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)
    perturb_norms(second)
    second.reset_parameters(5)
    assert torch.equal(torch.get_rng_state(), state)
    assert states_equal(first, second)


def test_init_has_the_documented_distribution():
    model = Llama(replace(CONFIGS["nano"], initializer_range=0.05))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            # Five standard errors of the estimates, for each tensor's own size.
            assert abs(parameter.mean()) < 5 * 0.05 / parameter.numel() ** 0.5, name
            assert abs(parameter.std() / 0.05 - 1) < 5 / (2 * parameter.numel()) ** 0.5, name
    assert not torch.equal(*(layer.mlp.up_proj.weight for layer in model.model.layers[:2]))


def test_init_is_the_same_in_bf16_up_to_rounding():
    model = Llama(ODD).to(torch.bfloat16)
    model.reset_parameters(5)
    assert states_equal(model, Llama(ODD, seed=5).to(torch.bfloat16))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_built_on_meta_can_be_materialised(tied):
    config = replace(ODD, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = Llama(config, seed=5)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    model.model.rope.fill_(torch.nan)  # unset memory may hold an old, correct table
    model.reset_parameters(5)
    expected = Llama(config, seed=5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert states_equal(model, expected)
    assert torch.equal(model(tokens(ODD)), expected(tokens(ODD)))


# In millions, the counts of the tables in GaLore, APOLLO and SCALE, and exactly.
PUBLISHED = {
    "60m": (58.07, 58_073_600),
    "130m": (134.11, 134_105_856),
    "350m": (367.97, 367_969_280),
    "1b": (1339.08, 1_339_082_752),
    "7b": (6738.42, 6_738_415_616),
}


def count_parameters(model: Llama) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        count = count_parameters(Llama(get_config(name)))
    millions, exact = PUBLISHED[name]
    assert count == exact
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("name", "low", "high"), [("nano", 1.2, 1.4), ("9m", 8.5, 9.5), ("20m", 20, 21)]
)
def test_small_sizes_are_what_their_names_say(name, low, high):
    with torch.device("meta"):
        assert low < count_parameters(Llama(get_config(name))) / 1e6 < high


def test_a_tied_weight_is_counted_once():
    tied = Llama(replace(ODD, tie_word_embeddings=True))
    assert count_parameters(Llama(ODD)) - count_parameters(tied) == 509 * 96


@pytest.mark.sampled(2)
@pytest.mark.parametrize("length", [256, 512])
@pytest.mark.parametrize("name", ["nano", "130m"])
def test_flops_are_three_times_the_counted_forward(name, length):
    config = get_config(name)
    with torch.device("meta"):
        model, input_ids = Llama(config), torch.zeros(2, length, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(input_ids)
    # The counter ignores the causal mask; the backward pass is twice the forward.
    masked = 6 * config.num_hidden_layers * length * config.hidden_size  # torch counts these
    expected = (flops_per_token(config, length) + masked) * 2 * length
    assert 3 * counter.get_total_flops() == expected


@pytest.mark.parametrize(
    ("name", "nearest"), [("130M", "130m"), ("nanno", "nano"), ("350", "350m"), ("NANO", "nano")]
)
def test_an_unknown_config_names_the_nearest(name, nearest):
    with pytest.raises(
        ValueError, match=rf"unknown model '{name}': did you mean {nearest}"
    ) as info:
        get_config(name)
    assert "\n" not in str(info.value)
    assert str(info.value).endswith(", ".join(CONFIGS))


def test_an_unknown_config_without_a_neighbour_lists_all():
    with pytest.raises(
        ValueError, match=r"^unknown model 'zzz': known models: pico, nano, 9m, 20m"
    ):
        get_config("zzz")


def test_a_head_size_that_is_not_even_is_an_error():
    with pytest.raises(ValueError, match=r"^hidden_size=96 is not a multiple of 2 x 32 .* heads$"):
        replace(ODD, num_attention_heads=32)


def test_a_sequence_beyond_the_limit_is_an_error():
    model = Llama(ODD)
    assert model(tokens(ODD, length=64)).shape == (2, 64, 509)
    with pytest.raises(ValueError, match=r"^65 tokens exceed max_position_embeddings=64: .*$"):
        model(tokens(ODD, length=65))


def test_autocast_stays_near_fp32():
    model = Llama(ODD)
    input_ids, labels = tokens(ODD), tokens(ODD, seed=4)
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(input_ids), model(input_ids, labels)
    loss.backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    exact = model(input_ids)
    error = (logits - exact).norm() / exact.norm()
    assert 0 < error < 0.03


@pytest.mark.parametrize(
    "mode", ["fp32", *(pytest.param(m, marks=pytest.mark.thorough) for m in ("bf16", "autocast"))]
)
def test_compiles_to_one_graph(mode):
    config = replace(ODD, num_hidden_layers=1)
    model = Llama(config).to(torch.bfloat16 if mode == "bf16" else torch.float32)
    # aot_eager traces forward and backward as inductor does, and needs no C++ compiler.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    input_ids, labels = tokens(config), tokens(config, seed=4)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        loss, expected = compiled(input_ids, labels), model(input_ids, labels)
    assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    actual = torch.autograd.grad(loss, list(model.parameters()))
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    limit = 1e-5 if mode == "fp32" else 0.03
    for (name, _), a, b in zip(model.named_parameters(), actual, wanted, strict=True):
        assert 0 < b.norm() and (a - b).norm() <= limit * b.norm(), name
