"""Train a tiny Llama of transformers by Hugging Face's Trainer, with any optimizer of optimzoo.

    python examples/trainer.py

needs `pip install transformers accelerate`, downloads nothing and ends in a quarter of a minute on
one CPU core. The Trainer uses a GPU by itself where there is one; on it, make everything larger:
`--text corpus.txt --width 512 --layers 8 --batch 64 --length 1024 --steps 5000`.
"""

import argparse
import os
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import optimzoo
from optimzoo.integrations.transformers import trainer_optimizer

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--text", type=Path, help="default: this Python's standard library")
parser.add_argument("--optimizer", default="scale", help="a name of `optimzoo list`")
parser.add_argument("--lr", type=float, default=2e-3, help="of the hidden weights")
parser.add_argument("--embedding-lr", type=float, default=32e-3)
parser.add_argument("--head-lr", type=float, default=4e-3)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--width", type=int, default=64)
parser.add_argument("--layers", type=int, default=2)
parser.add_argument("--out", default="trainer", help="folder of the checkpoints")
args = parser.parse_args()

# Bytes are the tokens; a row is one example. The model shifts the labels by itself.
files = [args.text] if args.text else sorted(Path(os.__file__).parent.glob("*.py"))
tokens = torch.frombuffer(bytearray(b"\n".join(f.read_bytes() for f in files)), dtype=torch.uint8)
rows = tokens[: len(tokens) // args.length * args.length].view(-1, args.length).long()
data = [{"input_ids": row, "labels": row} for row in rows]

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=args.width,
    intermediate_size=args.width * 43 // 16,
    num_hidden_layers=args.layers,
    num_attention_heads=args.width // 32,
    max_position_embeddings=args.length,
)
model = LlamaForCausalLM(config)

arguments = TrainingArguments(
    output_dir=args.out,
    max_steps=args.steps,
    per_device_train_batch_size=args.batch,
    learning_rate=args.lr,
    lr_scheduler_type="cosine",
    warmup_steps=args.steps // 10,
    max_grad_norm=1.0,
    bf16=torch.cuda.is_available(),
    dataloader_pin_memory=torch.cuda.is_available(),
    logging_steps=10,
    logging_first_step=True,
    save_steps=args.steps,
    save_total_limit=2,
    report_to="none",
    disable_tqdm=True,
    seed=0,
)
# The groups are made from the model by role: a bare class would get the Trainer's own groups, which
# know no embedding and no head.
pair = trainer_optimizer(
    args.optimizer,
    args=arguments,
    embedding_lr=args.embedding_lr,
    head_lr=args.head_lr,
    vector_lr=1e-2,
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=data[:-64],
    eval_dataset=data[-64:],
    optimizer_cls_and_kwargs=pair,
)
trainer.train()
optimizer = trainer.optimizer.optimizer  # inside accelerate's wrapper
print(optimzoo.describe(optimizer))
print(f"{type(optimizer).__name__}: validation loss {trainer.evaluate()['eval_loss']:.4f}")
