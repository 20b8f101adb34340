"""Tasks of the check of starting values: scripts that the values were not fitted to."""

from dataclasses import dataclass

from benchmarks.data.gratings import WINDOW
from benchmarks.experiments.plan import Row
from benchmarks.training.models import IMAGES, TOKENS

ALL = 10**9  # tokens to evaluate: the whole split


@dataclass(frozen=True)
class Task:
    """Training script of somebody who has a learning rate for AdamW.

    Attributes:
        text: what is trained, for the caption of a table.
        adamw_lr: where the search for its AdamW's rate begins.
        sizes: fields of `RunConfig`.
        batch_tokens: tokens of a step, if it has tokens.
        pretrained: steps of AdamW on another text before, tuned as on nano.
    """

    text: str
    adamw_lr: float
    sizes: Row
    batch_tokens: int | None = None
    pretrained: int = 0


TASKS = {
    "script": Task(
        "nanoGPT's small GPT (a tied head, learned positions)",
        1e-3,
        {"model": TOKENS, "steps": 400, "batch_size": 12, "seq_len": 64, "eval_tokens": 65536},
        12 * 64,
    ),
    "classifier": Task(
        "a vision transformer on images of ten kinds of gratings, under noise",
        1e-3,
        {"model": IMAGES, "steps": 400, "batch_size": 32, "seq_len": WINDOW, "eval_tokens": ALL},
    ),
    "fine-tuning": Task(
        "a nano Llama that AdamW has trained on another text, for 1,600 steps at its tuned rates",
        2e-4,  # a tenth of the rate that it was trained with
        {"model": "nano", "steps": 200, "batch_size": 8, "seq_len": 128, "eval_tokens": 65536},
        8 * 128,
        pretrained=1600,
    ),
}
