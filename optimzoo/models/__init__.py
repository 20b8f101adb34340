"""Language models to compare optimizers on, and to plan memory for."""

from optimzoo.models.hugging_face import from_config, is_config, read_config
from optimzoo.models.llama import CONFIGS, Llama, LlamaConfig, get_config
from optimzoo.models.public import PublicModel, find_public, public_models

__all__ = [
    "CONFIGS",
    "Llama",
    "LlamaConfig",
    "PublicModel",
    "find_public",
    "from_config",
    "get_config",
    "is_config",
    "public_models",
    "read_config",
]
