"""Step each weight in the backward and free its gradient: the peak of the gradients' bytes.

    python examples/gradient_release.py

trains a small Llama twice on the same bytes, in a quarter of a minute on one CPU core: as always,
and with `optimzoo.release`. It prints the largest number of bytes that gradients held at once, and
that the weights moved alike; on a GPU, where `--width 1024 --layers 24` fits, the allocator's peak
too.
"""

import argparse
import os
from pathlib import Path

import torch

import optimzoo
from optimzoo.models.llama import Llama, LlamaConfig

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--text", type=Path, help="default: this Python's standard library")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--length", type=int, default=64)
parser.add_argument("--width", type=int, default=128)
parser.add_argument("--layers", type=int, default=4)
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

files = [args.text] if args.text else sorted(Path(os.__file__).parent.glob("*.py"))
tokens = torch.frombuffer(bytearray(b"\n".join(f.read_bytes() for f in files)), dtype=torch.uint8)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=args.width,
    intermediate_size=args.width * 43 // 16,
    num_hidden_layers=args.layers,
    num_attention_heads=args.width // 32,
    max_position_embeddings=args.length,
)


def train(released: bool) -> Llama:
    """Train a model, print its losses and the peak of its gradients, and return it."""
    model = Llama(config, seed=0).to(device)
    rates = {"lr": 2e-3, "embedding_lr": 32e-3, "head_lr": 4e-3, "vector_lr": 1e-2}
    optimizer = optimzoo.create_optimizer("scale", model, **rates)
    if not released:
        print(optimzoo.describe(optimizer))
    peak = 0

    def measure(_: torch.Tensor) -> None:
        nonlocal peak
        peak = max(peak, sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    # Before the release: hooks run in the order in which they were made.
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(measure)
    # The norm of all gradients is known when the last one is. SCALE's matrices without momentum do
    # not depend on it, so they go at once; the head and the vectors wait for optimizer.step().
    handle = optimzoo.release(optimizer, max_norm=1.0) if released else None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(1, args.steps + 1):
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(tokens) - args.length, (args.batch, 1), generator=generator)
        rows = tokens[starts + torch.arange(args.length + 1)].long().to(device)
        loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        if handle is None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, args.steps):
            print(f"step {step}: train loss {loss.item():.4f}")
    name = "with release" if released else "without release"
    print(f"{name}: at most {peak:,} bytes of gradients at once")
    if device == "cuda":
        print(f"{name}: {torch.cuda.max_memory_allocated():,} bytes at the allocator's peak")
    return model


models = [train(released) for released in (False, True)]
pairs = zip(*(model.parameters() for model in models), strict=True)
difference = max((a - b).abs().max().item() for a, b in pairs)
print(f"largest difference of a weight between the two: {difference:.1e}")
