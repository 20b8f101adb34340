"""The model of the benchmarks, which is `optimzoo.models.llama`, and what a step of it costs."""

from torch import nn

from optimzoo.models.llama import CONFIGS, Llama, LlamaConfig, get_config

__all__ = ["CONFIGS", "Llama", "LlamaConfig", "count_parameters", "flops_per_token", "get_config"]


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, frozen ones included, a tied weight counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(config: LlamaConfig, seq_len: int, *, causal: bool = False) -> int:
    """Return the floating-point operations of one training step, forward and backward, per token.

    flops = 6 N + 12 L d T with N = L (4 d^2 + 3 d f) + V d, for L layers, hidden size d,
    intermediate size f, vocabulary V, sequence length T. N is the weights in a product: the head
    counts, tied or not; the embedding, a lookup, does not. Attention is counted in full (PaLM's
    convention); with ``causal`` the half of it that the mask leaves: 6 L d T. Norms, RoPE and
    softmax are left out, and so is what is computed again.
    """
    d, layers = config.hidden_size, config.num_hidden_layers
    weights = layers * (4 * d * d + 3 * d * config.intermediate_size) + config.vocab_size * d
    return 6 * weights + (6 if causal else 12) * layers * d * seq_len
