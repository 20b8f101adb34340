"""How much of a GPU a training run uses, and how much of its step is the optimizer's."""

from typing import Any

from benchmarks.llama import LlamaConfig, flops_per_token

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
    """Operations a second of a GPU by its name; None if it is not in the table."""
    return next((1e12 * value for name, value in PEAK.items() if name in device), None)


def speed_text(row: dict[str, Any], config: LlamaConfig) -> str:
    """The optimizer's share of the median step, and the model-flops utilisation."""
    run = row["config"]
    tokens = run["batch_size"] * run["accumulate"] * run["seq_len"]
    seconds = row["step_ms"] / 1000
    flops = flops_per_token(config, run["seq_len"], causal=True) * tokens / seconds
    share = row["optimizer_ms"] / row["step_ms"]
    text = f"step {row['step_ms']:.1f} ms, the optimizer {share:.1%} of it; "
    text += f"{flops / 1e12:.1f} model Tflop/s"
    peak = peak_flops(row["provenance"]["device"])
    return text + (f", {flops / peak:.1%} of the GPU's peak in bf16" if peak else "")
