"""Llama language model in one file, to compare optimizers on and to plan memory for.

Parameter names and numerics are those of `transformers.LlamaForCausalLM`; state dicts interchange.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama model; the field names are those of `transformers.LlamaConfig`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        size, heads = self.hidden_size, self.num_attention_heads
        if size % (2 * heads):
            raise ValueError(f"hidden_size={size} is not a multiple of 2 x {heads} attention heads")


# 60m to 7b are the sizes in the tables of GaLore, APOLLO and SCALE; the odd 5461 of 1b is theirs.
CONFIGS = {
    "pico": LlamaConfig(512, 64, 172, 2, 4),
    "nano": LlamaConfig(2048, 128, 344, 4, 4),
    "9m": LlamaConfig(4096, 256, 768, 8, 4),
    "20m": LlamaConfig(8192, 384, 1024, 8, 6),
    "60m": LlamaConfig(32000, 512, 1376, 8, 8),
    "130m": LlamaConfig(32000, 768, 2048, 12, 12),
    "350m": LlamaConfig(32000, 1024, 2736, 24, 16),
    "1b": LlamaConfig(32000, 2048, 5461, 24, 32),
    "7b": LlamaConfig(32000, 4096, 11008, 32, 32),
}


def get_config(name: str) -> LlamaConfig:
    """Return the configuration named `7b` or `llama-7b`; an unknown name gives the nearest ones."""
    short = name.removeprefix("llama-")
    if short in CONFIGS:
        return CONFIGS[short]
    nearest = difflib.get_close_matches(short.lower(), CONFIGS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    raise ValueError(f"unknown model {name!r}: {hint}known models: {', '.join(CONFIGS)}")


class Linear(nn.Linear):
    """Linear layer without bias or initial draw: `Llama.reset_parameters` fills the weight."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.RMSNorm):
    """RMSNorm that in bf16 rounds before and after the weight, as Hugging Face's; torch's once."""

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + (self.eps or 0.0))
        return self.weight * (x32 * scale).to(x.dtype)


def rope_table(config: LlamaConfig) -> Tensor:
    """Return fp32 cosines and sines, [2, max_position_embeddings, head_dim / 2]."""
    half = config.hidden_size // config.num_attention_heads // 2
    frequencies = 1.0 / config.rope_theta ** (torch.arange(half).float() / half)
    angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies)
    return torch.stack((angles.cos(), angles.sin()))


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate dimension i with i + head_dim / 2, as Hugging Face does (Meta pairs neighbours)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.head_dim = size // config.num_attention_heads
        self.q_proj, self.k_proj = Linear(size, size), Linear(size, size)
        self.v_proj, self.o_proj = Linear(size, size), Linear(size, size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        projections = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (y.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for y in projections)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = self.o_proj(x.transpose(1, 2).flatten(2))
        return x


class MLP(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return x


class Block(nn.Module):
    """One layer: attention, then the MLP, each on a normalised residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Decoder(nn.Module):
    """All layers below the head; its own module because the state dict's names say `model.`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(*shape, _weight=torch.empty(shape))  # given: draws nothing
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = nn.Buffer(rope_table(config), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        length, limit = input_ids.shape[1], self.rope.shape[1]
        if length > limit:
            way_out = "shorten it or raise the limit in LlamaConfig"
            raise ValueError(f"{length} tokens exceed max_position_embeddings={limit}: {way_out}")
        x: Tensor = self.embed_tokens(input_ids)
        cos, sin = self.rope[:, :length].to(x.dtype).unbind()
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = self.norm(x)
        return x


class Llama(nn.Module):
    """Decoder and head, initialised from `seed` alone: the global generators are not used."""

    def __init__(self, config: LlamaConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draw matrices from N(0, initializer_range), set norms to one; needed after `to_empty`.

        The draws are made on the CPU in fp32, so every device and type starts from the same model.
        """
        if self.config.tie_word_embeddings:  # to_empty unties what it moves off meta
            self.lm_head.weight = self.model.embed_tokens.weight
        self.model.rope.copy_(rope_table(self.config))
        generator = torch.Generator("cpu").manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            elif not parameter.is_meta:
                draw = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                draw.normal_(0.0, self.config.initializer_range, generator=generator)
                parameter.copy_(draw)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits [B, T, V], or with labels the mean cross-entropy, computed in fp32.

        labels[:, t] is the token after input_ids[:, t]: the data shifts them, not the model.
        """
        x: Tensor = self.lm_head(self.model(input_ids))
        return x if labels is None else F.cross_entropy(x.float().flatten(0, 1), labels.flatten())
