"""Take a dense model to an exact 2:4 one: CAST's AdamS, with distillation from the dense one.

    python examples/sparse.py

trains a small Llama on the bytes of a text, then goes on with AdamS, whose masked weights fade
while the forward stays dense, and prunes: of each 4 consecutive inputs 2 weights are zero, and the
loss stays. It takes half a minute on one CPU core. On a GPU (compute capability 8.0 or newer) the
layers are then stored for sparse tensor cores.
"""

import argparse
import copy
import math
import os
from pathlib import Path

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import optimzoo
from optimzoo import sparsity
from optimzoo.models.llama import Llama, LlamaConfig

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--text", type=Path, help="default: this Python's standard library")
parser.add_argument("--dense-steps", type=int, default=100)
parser.add_argument("--sparse-steps", type=int, default=150)
parser.add_argument("--lr", type=float, default=2e-3, help="of AdamS")
parser.add_argument("--l1", type=float, default=1e-2, help="of AdamS: the decay, ramped up")
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


def train(optimizer: Optimizer, steps: int, seed: int, teacher: Llama | None = None) -> None:
    """Train the model, with the loss of a teacher's outputs too where there is one."""

    def factor(step: int) -> float:
        # Down to 0: a masked weight ends within its last steps' size of 0.
        return min(1.0, 20 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))

    scheduler = LambdaLR(optimizer, factor)
    for step in range(1, steps + 1):
        inputs, labels = batch(seed + step)
        if teacher is None:
            loss = model(inputs, labels)
        else:
            with torch.no_grad():
                targets = teacher(inputs)
            loss = sparsity.distillation_loss(model(inputs), targets, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step == 1 or step % 50 == 0:
            print(
                f"step {step}: train loss {loss.item():.4f}"
                + (" with the teacher" if teacher else "")
            )


@torch.no_grad()
def evaluate() -> float:
    """Return the loss on 10 batches that are not trained on."""
    return sum(model(*batch(10**6 + seed)).item() for seed in range(10)) / 10


config = LlamaConfig(
    vocab_size=256,
    hidden_size=args.width,
    intermediate_size=args.width * 11 // 4,
    num_hidden_layers=args.layers,
    num_attention_heads=args.width // 32,
    max_position_embeddings=args.length,
)
model = Llama(config, seed=0).to(device)
train(optimzoo.create_optimizer("adamw", model, lr=4e-3), args.dense_steps, seed=0)
print(f"dense: loss {evaluate():.4f}")

teacher = copy.deepcopy(model)
sparsity.prepare(model)  # adds the learnable scales of the rows; finalize() folds them in
optimizer = optimzoo.AdamS(
    sparsity.sparse_groups(model), lr=args.lr, l1=args.l1, total_steps=args.sparse_steps
)
train(optimizer, args.sparse_steps, seed=args.dense_steps, teacher=teacher)
print(f"trained with AdamS: loss {evaluate():.4f}")

cut = sparsity.finalize(model, optimizer)
names = [f"{name}.weight" for name in sparsity.linear_targets(model)]
assert all(sparsity.is_nm(model.get_parameter(name), 2, 4) for name in names)
print(f"pruned to 2:4: loss {evaluate():.4f}, at most {max(cut.values()):.1e} of a norm was cut")

if device == "cuda":
    model.bfloat16()
    print(f"in bfloat16: loss {evaluate():.4f}")
    print(f"stored for sparse tensor cores: {len(sparsity.to_semi_structured(model))} layers")
    print(f"semi-structured: loss {evaluate():.4f}")
else:
    print("semi-structured storage is not shown: it needs a CUDA device")
