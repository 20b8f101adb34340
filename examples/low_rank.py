"""Pretrain with low-rank weights that are balanced and restarted, then merge them to dense ones.

    python examples/low_rank.py

converts the hidden layers of a small Llama to W = s·BA, trains it on the bytes of a text with a
restart every 40 steps (balanced factors, moments from zero, the rate climbing back), and merges it:
the dense model has the same loss. It takes a quarter of a minute on one CPU core. What restarts
bring depends on the length of the run: the paper's shortest has 11,000 steps, one in 200 a restart.
"""

import argparse
import math
import os
from pathlib import Path

import torch

import optimzoo
from optimzoo import lowrank
from optimzoo.models.llama import Llama, LlamaConfig

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--text", type=Path, help="default: this Python's standard library")
parser.add_argument("--optimizer", default="adamw", help="a name of `optimzoo list`")
parser.add_argument("--lr", type=float, default=4e-3)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--every", type=int, default=40, help="steps between two restarts")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--length", type=int, default=64)
parser.add_argument("--width", type=int, default=64)
parser.add_argument("--layers", type=int, default=2)
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

files = [args.text] if args.text else sorted(Path(os.__file__).parent.glob("*.py"))
tokens = torch.frombuffer(bytearray(b"\n".join(f.read_bytes() for f in files)), dtype=torch.uint8)


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw inputs and the bytes after them."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - args.length, (args.batch, 1), generator=generator)
    rows = tokens[starts + torch.arange(args.length + 1)].long().to(device)
    return rows[:, :-1], rows[:, 1:]


def cosine(step: int) -> float:
    """Return the factor of the rate: a tenth of the steps up, then a cosine down."""
    warmup = args.steps // 10
    done = (step - warmup) / (args.steps - warmup)
    return (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * done))


config = LlamaConfig(
    vocab_size=256,
    hidden_size=args.width,
    intermediate_size=args.width * 43 // 16,
    num_hidden_layers=args.layers,
    num_attention_heads=args.width // 32,
    max_position_embeddings=args.length,
)
model = Llama(config, seed=0)
print(lowrank.convert(model, rank=args.rank))  # before the optimizer: it gets the factors
model.to(device)

optimizer = optimzoo.create_optimizer(args.optimizer, model, lr=args.lr)
restarts = lowrank.Restarts(model, optimizer, every=args.every)
scheduler = restarts.scheduler(cosine)
for step in range(1, args.steps + 1):
    loss = model(*batch(step))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    restarted = restarts.step()
    scheduler.step()
    optimizer.zero_grad()
    if step == 1 or step % 10 == 0:
        print(f"step {step}: train loss {loss.item():.4f}" + (", restarted" if restarted else ""))

with torch.no_grad():
    parameters, before = sum(p.numel() for p in model.parameters()), model(*batch(0)).item()
    layers = lowrank.merge(model)
    dense, after = sum(p.numel() for p in model.parameters()), model(*batch(0)).item()
print(f"low rank: loss {before:.4f}, {parameters:,} parameters")
print(f"{layers} layers merged: loss {after:.4f}, {dense:,} parameters")
