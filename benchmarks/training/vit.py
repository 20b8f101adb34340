"""Small vision transformer: the classifier among the tasks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data.gratings import CLASSES, LEVELS, SIDE, WINDOW


class ViT(nn.Module):
    """Vision transformer of torch's own layers (before-normalised, with biases), from `seed`.

    Patches of 4 x 4 pixels, learned positions, the mean of the patches, a linear head.
    """

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        width, layers, heads, patch = 96, 4, 4, 4
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.patches = nn.Conv2d(1, width, patch, stride=patch)
            self.pos_embedding = nn.Parameter(0.02 * torch.randn(1, (SIDE // patch) ** 2, width))
            layer = nn.TransformerEncoderLayer(
                width, heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True
            )
            self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
            for module in self.encoder.modules():  # the copies of one layer begin alike
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                elif isinstance(module, nn.MultiheadAttention):
                    nn.init.xavier_uniform_(module.in_proj_weight)
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, CLASSES)

    def forward(self, windows: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits [B, classes] of the images in windows of `benchmarks.data.gratings`.

        With labels, what follows each number of a window, return the mean cross-entropy: the class
        follows the last pixel.
        """
        if windows.shape[1] != WINDOW:
            raise ValueError(f"a window has {windows.shape[1]} numbers; give --seq-len {WINDOW}")
        pixels = windows[:, : SIDE * SIDE].view(-1, 1, SIDE, SIDE) / (LEVELS - 1) - 0.5
        x = self.patches(4 * pixels).flatten(2).transpose(1, 2) + self.pos_embedding
        logits: Tensor = self.head(self.norm(self.encoder(x)).mean(1))
        return logits if labels is None else F.cross_entropy(logits, labels[:, SIDE * SIDE - 1])
