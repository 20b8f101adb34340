"""The benchmarks at a size for tests: a tiny model, a tiny text, a tiny plan.

`python tiny_benchmarks.py FOLDER COMMAND ...` is `python -m benchmarks COMMAND ...` with the model
`tiny`, and with the plan `tiny` and its results in FOLDER.
"""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_helpers import ROOT, load, make_texts

from benchmarks.data.corpus import Corpus
from benchmarks.experiments import plan
from benchmarks.training.checkpoint import Checkpoints
from optimzoo.models import llama
from optimzoo.models.llama import LlamaConfig

VOCAB = 320
TINY = LlamaConfig(VOCAB, 16, 24, 2, 2)
PLAN: dict[str, Any] = {
    "model": "tiny",
    "steps": 6,
    "batch_size": 2,
    "seq_len": 16,
    "eval_tokens": 64,
    "methods": {
        "adamw": {
            "label": "AdamW",
            "hyper": {"weight_decay": 0.0},
            "tuned": {
                "start": {"lr": 1e-3, "embedding_lr": 3e-3, "clip": 1.0, "betas": [0.9, 0.95]},
                "choices": {"clip": [1.0, 0.0], "betas": [[0.9, 0.95], [0.9, 0.99]]},
            },
            "paper": {"start": {"lr": 1e-2, "clip": 0.0}},
        },
        "scale": {
            "label": "SCALE",
            "tuned": {
                "start": {"lr": 1e-3, "other_lr": 3e-3, "clip": 1.0},
                "choices": {"clip": [1.0, 0.0]},
            },
            "paper": {"start": {"lr": 1e-2, "clip": 0.0}, "fixed": {"other_lr": 0.02}},
        },
    },
}


def patched(monkeypatch: Any, folder: Path) -> Path:
    """Be in a folder with the model and the plan `tiny`, on 80 columns; return it."""
    monkeypatch.setitem(llama.CONFIGS, "tiny", TINY)
    monkeypatch.setattr(plan, "_CONFIGS", folder / "configs")
    monkeypatch.setattr(plan, "_RESULTS", folder / "results")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "80")
    return folder


def write_text(folder: Path) -> list[Path]:
    """Files of words, some thousand tokens in each split."""
    texts = make_texts(60)
    cuts = {"valid.txt": texts[:8], "test.txt": texts[8:16], "train.txt": texts[16:]}
    for name, part in cuts.items():
        (folder / name).write_text("\n".join(part), encoding="utf-8")
    return [folder / name for name in cuts]


def text_words(folder: Path) -> list[str]:
    """The options for these files, which are written if they are not there."""
    names = [folder / f"{split}.txt" for split in ("valid", "test", "train")]
    if not names[0].exists():
        write_text(folder)
    return ["--data", *map(str, names), "--cache-dir", str(folder / "cache")]


def train_words(folder: Path, **options: object) -> list[str]:
    """`train` with the model `tiny` on the text of a folder, by default with SGD."""
    sizes = {"model": "tiny", "steps": 4, "batch_size": 4, "seq_len": 16, "eval_tokens": 256}
    values = {"optimizer": "sgd", "lr": 0.1, **sizes, **options}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    return ["train", *words, *text_words(folder)]


def tiny_corpus(folder: Path) -> Corpus:
    return load(write_text(folder), folder / "cache", vocab_size=VOCAB)


def saved_step(out: Path) -> int:
    """The step of a run's newest checkpoint, which is whole."""
    checkpoints = Checkpoints(out / "checkpoints")
    step = checkpoints.steps()[-1]
    assert json.loads(checkpoints.load(step)[0]["progress"])[0] == step
    return step


def assert_same_bits(row: dict[str, Any], straight: dict[str, Any]) -> None:
    """Compare the rows of a run that went on and of one that was not interrupted."""
    for key in ("curve", "valid_curve", "valid_loss", "test_loss", "state_bytes", "diverged"):
        assert row[key] == straight[key], key
    assert not row["diverged"]


def stop_at(last: int) -> Callable[[int, float, float], None]:
    """A progress callback that interrupts after step `last`."""

    def progress(step: int, loss: float, speed: float) -> None:
        if step == last:
            raise KeyboardInterrupt

    return progress


def write_plan(folder: Path, values: dict[str, Any] = PLAN) -> None:
    (folder / "configs").mkdir(exist_ok=True)
    (folder / "configs" / "tiny.json").write_text(json.dumps(values))


def start(folder: Path, words: list[str]) -> subprocess.Popen[str]:
    """A process, and session, of its own that runs a command of the benchmarks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, __file__, str(folder), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )


if __name__ in ("__main__", "__mp_main__"):  # the second: a worker process of the first
    llama.CONFIGS["tiny"] = TINY
if __name__ == "__main__":
    plan._CONFIGS, plan._RESULTS = (Path(sys.argv[1]) / name for name in ("configs", "results"))
    sys.argv = ["python -m benchmarks", *sys.argv[2:]]
    runpy.run_module("benchmarks", run_name="__main__")
