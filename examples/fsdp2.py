"""Train a sharded Llama (FSDP2) with any optimizer of optimzoo, save it, go on in other processes.

    torchrun --nproc-per-node 2 examples/fsdp2.py

trains for 20 steps in two processes, with NCCL on GPUs and gloo on CPUs, in a quarter of a minute,
and saves into `fsdp2/step-20`. A checkpoint fits any number of processes:

    torchrun --nproc-per-node 4 examples/fsdp2.py --steps 10
    torchrun --nproc-per-node 2 examples/fsdp2.py --steps 20 --resume fsdp2/step-10

end with the loss of the first command, up to rounding. On GPUs, make everything larger: `--text
corpus.txt --width 2048 --layers 24 --batch 64 --length 1024 --steps 1000`. The default rates are
SCALE's tuned on a nano Llama (optimzoo's README); tune them for your model.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import optimzoo
from optimzoo.models.llama import Llama, LlamaConfig

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--text", type=Path, help="default: this Python's standard library")
parser.add_argument("--optimizer", default="scale", help="a name of `optimzoo list`")
parser.add_argument("--lr", type=float, default=2e-3, help="of the hidden weights")
parser.add_argument("--embedding-lr", type=float, default=32e-3)
parser.add_argument("--head-lr", type=float, default=4e-3)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--batch", type=int, default=8, help="rows of all processes together")
parser.add_argument("--length", type=int, default=64)
parser.add_argument("--width", type=int, default=128)
parser.add_argument("--layers", type=int, default=2)
parser.add_argument("--out", default="fsdp2", help="folder of the checkpoints")
parser.add_argument("--resume", metavar="FOLDER", help="a checkpoint to go on from")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if device == "cuda" else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
if args.batch % world:
    parser.error(f"--batch {args.batch} is not a multiple of {world} processes")

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
model = Llama(config, seed=0).to(device)
half = torch.bfloat16 if device == "cuda" else None
policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
for block in model.model.layers:
    fully_shard(block, mp_policy=policy)
fully_shard(model, mp_policy=policy)

# After the sharding, so that the optimizer gets the sharded parameters.
rates = {"lr": args.lr, "embedding_lr": args.embedding_lr, "head_lr": args.head_lr}
optimizer = optimzoo.create_optimizer(args.optimizer, model, **rates, vector_lr=1e-2)
if rank == 0:
    print(optimzoo.describe(optimizer))

first = 0
if args.resume:
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    saved = {**parts, "step": 0}
    dcp.load(saved, checkpoint_id=args.resume)
    set_state_dict(
        model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"]
    )
    first = saved["step"]

for step in range(first + 1, args.steps + 1):
    # All processes draw the whole batch of a step, and each takes its rows.
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(tokens) - args.length, (args.batch, 1), generator=generator)
    rows = tokens[starts + torch.arange(args.length + 1)][rank::world].long().to(device)
    loss = model(rows[:, :-1], rows[:, 1:])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach() / world
    dist.all_reduce(mean)
    if rank == 0 and (step == first + 1 or step == args.steps or step % 10 == 0):
        print(f"step {step}: train loss {mean.item():.6f}")

weights, state = get_state_dict(model, optimizer)
whole = {"model": weights, "optimizer": state, "step": args.steps}
dcp.save(whole, checkpoint_id=f"{args.out}/step-{args.steps}")
own = [value for entry in optimizer.state.values() for value in entry.values()]
local = [v.to_local() if hasattr(v, "to_local") else v for v in own if isinstance(v, torch.Tensor)]
print(f"process {rank} of {world} holds {sum(v.nbytes for v in local):,} bytes of state")
dist.destroy_process_group()
