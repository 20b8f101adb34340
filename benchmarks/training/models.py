"""Models of a run: a Llama, nanoGPT's, a vision transformer, or one of a Hugging Face config."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training.gpt import GPT, GPTConfig
from benchmarks.training.vit import ViT
from optimzoo.models import Llama, from_config, get_config, is_config, read_config
from optimzoo.options import brief

# Beside the Llamas: nanoGPT's model, of characters or of tokens, and a classifier of images.
CHARACTERS, TOKENS, IMAGES = "nanogpt-char", "nanogpt", "vit"
OTHERS = {CHARACTERS: 65, TOKENS: 2048, IMAGES: 0}  # and the sizes of their vocabularies


def vocab_size(name: str) -> int:
    """Return the size of a model's vocabulary, which its tokenizer is trained to."""
    if name in OTHERS:
        return OTHERS[name]
    if not is_config(name):
        return get_config(name).vocab_size
    model: Any = from_config(name, "meta")
    return model.config.get_text_config().vocab_size


def config_sha256(name: str) -> str:
    """Return the sha256 of what a Hugging Face config says."""
    return hashlib.sha256(json.dumps(read_config(name), sort_keys=True).encode()).hexdigest()


def make_model(
    name: str, vocabulary: int | None = None, *, seed: int = 0, device: str = "cpu"
) -> nn.Module:
    """Return the model of a name, drawn from the seed in float32.

    Args:
        name: of a Llama, `nanogpt-char`, `nanogpt`, `vit`, or the path of a Hugging Face config.
        vocabulary: its size; default: the model's own.
        seed: of its weights.
        device: where it is drawn; on `meta` it takes no memory.

    Raises:
        ValueError: an unknown name, or a model that sees the tokens it is to predict.
    """
    if name in OTHERS:
        with torch.device(device):  # moved to meta, a tied head would be a weight of its own
            if name == IMAGES:
                return ViT(seed=seed)
            return GPT(GPTConfig(vocabulary or OTHERS[name]), seed=seed)
    if not is_config(name):
        config = get_config(name)
        with torch.device(device):
            return Llama(replace(config, vocab_size=vocabulary or config.vocab_size), seed=seed)
    changes = {} if vocabulary is None else {"vocab_size": vocabulary}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        float32 = {"dtype": "float32", "torch_dtype": "float32"}  # its name then and now
        causal = CausalLM(from_config(name, device, **changes, **float32))
    if device != "meta" and not _is_causal(causal):
        raise ValueError(f"model {name} is not causal: its tokens see those after them")
    return causal


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a model's weights from a file.

    Raises:
        ValueError: it has no weights, or those of another model.
    """
    try:
        model.load_state_dict(torch.load(path, weights_only=True))
    except OSError:
        raise
    except Exception as error:  # a file of anything
        raise ValueError(f"weights {path} are not of this model: {brief(error)}") from None


class CausalLM(nn.Module):
    """Model of `transformers` with the forward of the Llama: labels are shifted by the data.

    It has no dropout, as the Llama has none.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model.eval()

    def get_output_embeddings(self) -> Any:
        """Return the output layer, which has the role `head`."""
        return self.model.get_output_embeddings()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits [B, T, V], or with labels the mean cross-entropy, computed in fp32."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and input_ids.shape[1] > limit:
            raise ValueError(
                f"{input_ids.shape[1]} tokens exceed max_position_embeddings={limit}: shorten the "
                "sequence or raise the limit in the model's config"
            )
        x: Tensor = self.model(input_ids=input_ids).logits
        return x if labels is None else F.cross_entropy(x.float().flatten(0, 1), labels.flatten())


@torch.no_grad()
def _is_causal(model: CausalLM) -> bool:
    """Return whether the last token changes nothing before it: encoders have such heads, too."""
    ids = torch.arange(8)[None]
    one, other = (model(torch.cat((ids, torch.tensor([[x]])), 1))[:, :-1] for x in (9, 10))
    return torch.allclose(one, other, atol=1e-5)
