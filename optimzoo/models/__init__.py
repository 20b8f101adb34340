"""Language models to compare optimizers on, and to plan memory for."""

from optimzoo.models.llama import CONFIGS, Llama, LlamaConfig, get_config

__all__ = ["CONFIGS", "Llama", "LlamaConfig", "get_config"]
