"""Pretrain a small Llama on the bytes of a text file, with any optimizer of optimzoo.

    python examples/pretrain.py

trains the default model with SCALE for 100 steps, in 20 seconds on one CPU core; with `--optimizer
adamw` it is AdamW beside it. Each prints its validation loss and the bytes of its state at the end.
An interrupted run goes on with `--resume`, to the same bits. On a GPU, make everything larger:

    python examples/pretrain.py --text corpus.txt --width 512 --layers 8 --batch 64 --length 1024 \
        --steps 5000 --save-every 500

Rates and clipping depend on the model, the batch and the number of steps: tune them for yours.
"""

import argparse
import math
import os
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR

import optimzoo
from optimzoo.models.llama import Llama, LlamaConfig

# The tuned rows of optimzoo's README (benchmarks/results/nano-compare.json): width and layers as
# here, a vocabulary of 2,048, 400 steps of 1,024 tokens. Muon's is without clipping: `--clip inf`.
TUNED = {
    "scale": {"lr": 0.002, "embedding_lr": 0.032, "head_lr": 0.004, "vector_lr": 0.01},
    "adamw": {"lr": 0.002, "embedding_lr": 0.064, "head_lr": 0.008, "vector_lr": 0.01},
    "muon": {"lr": 0.02, "embedding_lr": 0.128, "head_lr": 0.032, "vector_lr": 0.01},
    "sgd": {"lr": 0.1, "embedding_lr": 20.0, "head_lr": 10.0, "vector_lr": 10.0},
}
TUNED["adamw"]["weight_decay"] = 0.1

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--text", type=Path, help="default: this Python's standard library")
parser.add_argument("--optimizer", default="scale", help="a name of `optimzoo list`")
parser.add_argument("--lr", type=float, help="of the hidden weights; default: the tuned row's")
parser.add_argument("--embedding-lr", type=float)
parser.add_argument("--head-lr", type=float)
parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradients")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--width", type=int, default=128)
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--save-every", type=int, default=50)
parser.add_argument("--checkpoint", type=Path, default=Path("pretrain.pt"))
parser.add_argument("--resume", action="store_true", help="go on from --checkpoint")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

# Bytes are the tokens; the last tenth is held out.
files = [args.text] if args.text else sorted(Path(os.__file__).parent.glob("*.py"))
tokens = torch.frombuffer(bytearray(b"\n".join(f.read_bytes() for f in files)), dtype=torch.uint8)
split = len(tokens) * 9 // 10
train_tokens, valid_tokens = tokens[:split], tokens[split:]


def batch(tokens: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw inputs and the bytes after them; a seed for each step, so resuming needs no state."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - args.length, (args.batch, 1), generator=generator)
    rows = tokens[starts + torch.arange(args.length + 1)].long().to(device)
    return rows[:, :-1], rows[:, 1:]


def loss_of(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy, in bfloat16 on a GPU."""
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        return model(inputs, labels)


@torch.no_grad()
def evaluate() -> float:
    """Return the loss on 10 held-out batches, always the same."""
    return sum(loss_of(*batch(valid_tokens, seed)).item() for seed in range(10)) / 10


def schedule(step: int) -> float:
    """Return the factor of all rates: a tenth of the steps up, then a cosine down to a tenth."""
    warmup = args.steps // 10
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, args.steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


config = LlamaConfig(
    vocab_size=256,
    hidden_size=args.width,
    intermediate_size=args.width * 43 // 16,
    num_hidden_layers=args.layers,
    num_attention_heads=args.width // 32,
    max_position_embeddings=args.length,
)
model = Llama(config, seed=0).to(device)

rates = dict(TUNED.get(args.optimizer, {}))
rates |= {k: v for k in ("lr", "embedding_lr", "head_lr") if (v := getattr(args, k)) is not None}
if "lr" not in rates:
    parser.error(
        f"{args.optimizer} has no tuned rates here; give --lr, or one of {', '.join(TUNED)}"
    )
optimizer = optimzoo.create_optimizer(args.optimizer, model, **rates)
scheduler = LambdaLR(optimizer, schedule)
print(optimzoo.describe(optimizer))

first = 0
if args.resume:
    saved = torch.load(args.checkpoint, weights_only=True, map_location=device)
    if saved["name"] != args.optimizer:
        parser.error(f"{args.checkpoint} was trained with {saved['name']}, not {args.optimizer}")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    first = saved["step"]
    print(f"resumed at step {first}")

for step in range(first + 1, args.steps + 1):
    loss = loss_of(*batch(train_tokens, step))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    if step == 1 or step % 10 == 0:
        print(f"step {step}: train loss {loss.item():.4f}")
    if step % args.save_every == 0 or step == args.steps:
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        state = {name: part.state_dict() for name, part in parts.items()}
        unfinished = args.checkpoint.with_suffix(".unfinished")
        torch.save({**state, "name": args.optimizer, "step": step}, unfinished)
        os.replace(unfinished, args.checkpoint)  # a run killed before this keeps the older one
        print(f"step {step}: validation loss {evaluate():.4f}, saved")

held = [value for entry in optimizer.state.values() for value in entry.values()]
state_bytes = sum(value.nbytes for value in held if isinstance(value, torch.Tensor))
print(f"validation loss {evaluate():.6f}, {args.optimizer} holds {state_bytes:,} bytes of state")
