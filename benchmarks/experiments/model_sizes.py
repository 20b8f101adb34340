"""Sizes of models and batches: the settings of a plan at each of them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelSize:
    """Settings that a model size changes in a plan for nano.

    Attributes:
        sizes: fields of `RunConfig` for every run.
        rank: of the low-rank methods.
        gap: steps between two refreshes of a subspace, and between two restarts.
        tuning_steps: steps of a tuning run.
        centre: where tuning starts, as multiples of nano's best `lr` and of its other rates.
        one_line: tune all learning rates together; else each of them, and the options.
    """

    sizes: dict[str, Any]
    rank: int
    gap: int
    tuning_steps: int
    centre: tuple[float, float] = (1.0, 1.0)
    one_line: bool = True


NANO_TOKENS = 4 << 20  # three a weight


def _pico(batch: int) -> ModelSize:
    """Return the settings of pico at a batch size; the paper's order of norms depends on it."""
    sizes = {"model": "pico", "steps": 100, "batch_size": batch, "seq_len": 64}
    return ModelSize({**sizes, "eval_tokens": 65536}, 16, 50, tuning_steps=100, centre=(4.0, 0.5))


def _batch(tokens: int, centre: tuple[float, float] = (1.0, 1.0)) -> ModelSize:
    """Return nano at a batch of so many tokens: 4 M tokens a run, tuned on a quarter of them."""
    steps, sequences = NANO_TOKENS // tokens, tokens // 128
    part = min(sequences, 16)  # the logits of more leave a CPU's cache
    sizes = {"model": "nano", "steps": steps, "batch_size": part, "seq_len": 128}
    sizes |= {"accumulate": sequences // part, "eval_tokens": 65536, "compile": True}
    return ModelSize(sizes, 32, max(10, steps // 8), steps // 4, centre, one_line=False)


# 60m: 16,384 tokens a step, a tuning run 10 M tokens, a final one 60 M. bf16 throughout, as
# the papers train.
_GPU = {"seq_len": 256, "eval_tokens": 1_048_576, "precision": "bf16", "compile": True}
_FULL = {**_GPU, "batch_size": 64, "accumulate": 8, "eval_tokens": 10_000_000}


def _full(model: str, steps: int, rank: int) -> ModelSize:
    """Return the published protocol: 512 sequences of 256 tokens per step, published rates."""
    return ModelSize({"model": model, "steps": steps, **_FULL}, rank, 200, steps)


MODEL_SIZES = {
    "nano-1k": _batch(1024),
    "nano-4k": _batch(4096, centre=(2.0, 1.0)),  # between the neighbours' best
    "nano-16k": _batch(16384, centre=(2.0, 2.0)),
    "60m-full": _full("60m", 11_000, 128),
    "130m-full": _full("130m", 20_000, 256),
    "350m-full": _full("350m", 60_000, 256),
    # A run of every part on a CPU, in seconds.
    "dry": ModelSize(
        {"model": "pico", "steps": 4, "batch_size": 2, "seq_len": 32, "eval_tokens": 256},
        rank=4,
        gap=2,
        tuning_steps=2,
    ),
    "pico-1k": _pico(16),
    "pico-4k": _pico(64),
    "pico-16k": _pico(256),
    # Two hours on two cores: half a million tokens per method, a quarter for a tuning run.
    "9m": ModelSize(
        {"model": "9m", "steps": 500, "batch_size": 8, "seq_len": 128, "eval_tokens": 65536},
        rank=64,
        gap=100,
        tuning_steps=125,
    ),
    # Of half, once and twice nano's rates the lowest were best by far (60m-first-tune.json).
    "60m": ModelSize(
        {"model": "60m", "steps": 3664, "batch_size": 64, **_GPU}, 128, 200, 612, (0.25, 0.25)
    ),
    "130m": ModelSize({"model": "130m", "steps": 7328, "batch_size": 64, **_GPU}, 256, 200, 1224),
    "350m": ModelSize({"model": "350m", "steps": 14656, "batch_size": 64, **_GPU}, 256, 200, 2448),
}


def rescaled(options: dict[str, Any], size: ModelSize) -> dict[str, Any]:
    """Return a method's options with the rank and the gap of another model size."""
    values: dict[str, Any] = {"rank": size.rank, "update_proj_gap": size.gap, "every": size.gap}
    values |= {"recovery_steps": min(10, size.gap // 2)}
    if size.sizes.get("precision") == "bf16":
        values["ns_dtype"] = None  # the GPU's own

    def changed(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return rescaled(value, size)
        return values[key] if value and key in values else value  # no recovery stays none

    return {key: changed(key, value) for key, value in options.items()}
