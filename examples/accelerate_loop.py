"""Train a small Llama in an Accelerate loop: gradient accumulation, saving, resuming.

    python examples/accelerate_loop.py

needs `pip install accelerate` and ends in a quarter of a minute on one CPU core. Accelerate picks
the device; `accelerate launch examples/accelerate_loop.py` takes several. `--resume` goes on from
the saved state, here for more `--steps`.
"""

import argparse
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import optimzoo
from optimzoo.models.llama import Llama, LlamaConfig

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--text", type=Path, help="default: this Python's standard library")
parser.add_argument("--optimizer", default="scale", help="a name of `optimzoo list`")
parser.add_argument("--lr", type=float, default=2e-3, help="of the hidden weights")
parser.add_argument("--embedding-lr", type=float, default=32e-3)
parser.add_argument("--head-lr", type=float, default=4e-3)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--accumulate", type=int, default=2, help="batches of one step")
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--width", type=int, default=64)
parser.add_argument("--layers", type=int, default=2)
parser.add_argument("--out", type=Path, default=Path("accelerate_loop"), help="the saved state")
parser.add_argument("--resume", action="store_true", help="go on from --out")
args = parser.parse_args()

precision = "bf16" if torch.cuda.is_available() else "no"
accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_steps=args.accumulate)

files = [args.text] if args.text else sorted(Path(os.__file__).parent.glob("*.py"))
tokens = torch.frombuffer(bytearray(b"\n".join(f.read_bytes() for f in files)), dtype=torch.uint8)
rows = tokens[: len(tokens) // (args.length + 1) * (args.length + 1)].view(-1, args.length + 1)
# Shuffled here, by a seed, so that a resumed run has the order of the one that it goes on from.
rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
loader = DataLoader(rows.long(), batch_size=args.batch, drop_last=True)

config = LlamaConfig(
    vocab_size=256,
    hidden_size=args.width,
    intermediate_size=args.width * 43 // 16,
    num_hidden_layers=args.layers,
    num_attention_heads=args.width // 32,
    max_position_embeddings=args.length,
)
model = Llama(config, seed=0)
rates = {"lr": args.lr, "embedding_lr": args.embedding_lr, "head_lr": args.head_lr}
optimizer = optimzoo.create_optimizer(args.optimizer, model, **rates, vector_lr=1e-2)
accelerator.print(optimzoo.describe(optimizer))
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

step = 0
if args.resume:
    accelerator.load_state(str(args.out))
    step = torch.load(args.out / "step.pt", weights_only=True)
    accelerator.print(f"resumed at step {step}")

for rows in accelerator.skip_first_batches(loader, step * args.accumulate):
    if step >= args.steps:
        break
    with accelerator.accumulate(model):  # the optimizer steps with each last batch alone
        loss = model(rows[:, :-1], rows[:, 1:])
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:
        step += 1
        if step == 1 or step % 10 == 0:
            accelerator.print(f"step {step}: train loss {loss.item():.6f}")

accelerator.save_state(str(args.out))
if accelerator.is_main_process:
    torch.save(step, args.out / "step.pt")
accelerator.end_training()
