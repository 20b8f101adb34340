"""Fine-tune on prompts and completions by TRL's SFTTrainer, with any optimizer of optimzoo.

    python examples/trl_sft.py

needs `pip install trl`, downloads nothing and ends in half a minute on one CPU core: a tiny Llama
learns to write words backwards. On a GPU take a model and data of your own:
`--model Qwen/Qwen3-0.6B --data pairs.jsonl --adamw-lr 2e-5 --bf16 --batch 16 --steps 1000`, with a
line `{"prompt": "...", "completion": "..."}` an example.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer

import optimzoo

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", help="of the hub, or a folder; default: a tiny one, untrained")
parser.add_argument("--data", type=Path, help="JSON lines of prompts and completions")
parser.add_argument("--optimizer", default="scale", help="a name of `optimzoo list`")
parser.add_argument("--adamw-lr", type=float, default=2e-3, help="rate that AdamW would have here")
parser.add_argument("--bf16", action="store_true", help="weights in bfloat16, without a copy in 32")
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--out", default="trl_sft", help="folder of the checkpoints")
args = parser.parse_args()

torch.manual_seed(0)
if args.model:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
else:  # bytes are the tokens
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(models.BPE(letters, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens(["<end>", "<pad>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="<end>", pad_token="<pad>"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config)
if args.bf16:
    model = model.bfloat16()

if args.data:
    pairs = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
else:
    words = random.Random(0)
    drawn = ["".join(words.choices("abcdef", k=words.randint(2, 4))) for _ in range(4096)]
    pairs = [{"prompt": f"{word}: ", "completion": word[::-1]} for word in drawn]
held_out = min(len(pairs) // 8, 256)

arguments = SFTConfig(
    output_dir=args.out,
    max_steps=args.steps,
    per_device_train_batch_size=args.batch,
    lr_scheduler_type="cosine",
    warmup_steps=args.steps // 10,
    max_length=1024 if args.model else 32,
    completion_only_loss=True,  # the prompt's tokens have no loss
    bf16=False,  # autocast, for weights in 32 bits; --bf16 stores them in 16
    dataloader_pin_memory=torch.cuda.is_available(),
    logging_steps=max(1, args.steps // 5),
    save_steps=args.steps,
    report_to="none",
    disable_tqdm=True,
    seed=0,
)
start = optimzoo.starting_values(args.optimizer, model, adamw_lr=args.adamw_lr)
# A change of 2e-5 is less than a bfloat16 weight can show: rounded to nearest, most are lost.
options = start.options | ({"rounding": "stochastic"} if args.bf16 else {})
optimizer = optimzoo.create_optimizer(args.optimizer, model, **options)
print(optimzoo.describe(optimizer))
trainer = SFTTrainer(
    model,
    arguments,
    train_dataset=Dataset.from_list(pairs[held_out:]),
    eval_dataset=Dataset.from_list(pairs[:held_out]),
    processing_class=tokenizer,
    optimizers=(optimizer, None),
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
used = trainer.optimizer.optimizer  # inside accelerate's wrapper
assert used is optimizer, "the trainer made an optimizer of its own"
after = trainer.evaluate()["eval_loss"]
print(f"{type(used).__name__}: validation loss {before:.4f}, then {after:.4f}")
