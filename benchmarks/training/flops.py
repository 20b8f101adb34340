"""Floating-point operations of a training step, and model-flops utilisation (MFU)."""

from typing import Any

from optimzoo.models.llama import LlamaConfig

# Dense bfloat16 products, 1e12 operations a second, from the vendors' data sheets.
PEAK = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "4090": 165.0,
}


def peak_flops(device: str) -> float | None:
    """Return a GPU's peak in operations per second by its name, or None if it is unknown."""
    return next((1e12 * value for name, value in PEAK.items() if name in device), None)


def speed_text(row: dict[str, Any], config: LlamaConfig) -> str:
    """Format a row's median step, the optimizer's share of it, and model-flops utilisation."""
    run = row["config"]
    tokens = run["batch_size"] * run["accumulate"] * run["seq_len"]
    seconds = row["step_ms"] / 1000
    flops = flops_per_token(config, run["seq_len"]) * tokens / seconds
    share = row["optimizer_ms"] / row["step_ms"]
    text = f"step {row['step_ms']:.1f} ms, the optimizer {share:.1%} of it; "
    text += f"{flops / 1e12:.1f} model Tflop/s"
    peak = peak_flops(row["provenance"]["device"])
    return text + (f", {flops / peak:.1%} of the GPU's peak in bf16" if peak else "")


def flops_per_token(config: LlamaConfig, seq_len: int) -> int:
    """Return the floating-point operations of one training step, forward and backward, per token.

    flops = 6 N + 6 L d T with N = L (4 d^2 + 3 d f) + V d, for L layers, hidden size d,
    intermediate size f, vocabulary V, sequence length T. N is the weights in a product: the head
    counts, tied or not; the embedding, a lookup, does not. Attention is counted by the half of it
    that the causal mask leaves. Norms, RoPE and softmax are left out, and so is what is computed
    again.
    """
    d, layers = config.hidden_size, config.num_hidden_layers
    weights = layers * (4 * d * d + 3 * d * config.intermediate_size) + config.vocab_size * d
    return 6 * weights + 6 * layers * d * seq_len
