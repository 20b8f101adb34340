"""Train a small Llama by Lightning: the optimizer and its schedule in `configure_optimizers`.

    python examples/lightning_module.py

needs `pip install lightning` and ends in a quarter of a minute on one CPU core. Lightning picks the
device, and saves into `lightning_module/`; `--resume FILE` goes on from there. On a GPU, make
everything larger: `--text corpus.txt --width 512 --layers 8 --batch 64 --length 1024 --steps 5000`.
"""

import argparse
import os
from pathlib import Path

import lightning
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR
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
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--width", type=int, default=64)
parser.add_argument("--layers", type=int, default=2)
parser.add_argument("--resume", metavar="FILE", help="a checkpoint to go on from")
args = parser.parse_args()


class LanguageModel(lightning.LightningModule):
    """Llama with its loss and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=args.width,
            intermediate_size=args.width * 43 // 16,
            num_hidden_layers=args.layers,
            num_attention_heads=args.width // 32,
            max_position_embeddings=args.length,
        )
        self.model = Llama(config, seed=0)

    def training_step(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        """Return the loss of one batch."""
        loss = self.model(rows[:, :-1], rows[:, 1:])
        if index % 10 == 0 or self.global_step == args.steps - 1:
            print(f"step {self.global_step + 1}: train loss {loss.item():.4f}")
        return loss

    def validation_step(self, rows: torch.Tensor, index: int) -> None:
        """Log the mean loss over the held-out rows."""
        self.log("validation loss", self.model(rows[:, :-1], rows[:, 1:]))

    def configure_optimizers(self) -> dict:
        """Return the optimizer, and a schedule that is stepped with it, not once an epoch."""
        rates = {"lr": args.lr, "embedding_lr": args.embedding_lr, "head_lr": args.head_lr}
        optimizer = optimzoo.create_optimizer(args.optimizer, self.model, **rates, vector_lr=1e-2)
        print(optimzoo.describe(optimizer))
        schedule = CosineAnnealingLR(optimizer, args.steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


lightning.seed_everything(0)
files = [args.text] if args.text else sorted(Path(os.__file__).parent.glob("*.py"))
tokens = torch.frombuffer(bytearray(b"\n".join(f.read_bytes() for f in files)), dtype=torch.uint8)
rows = tokens[: len(tokens) // (args.length + 1) * (args.length + 1)].view(-1, args.length + 1)
train_rows, valid_rows = rows[:-64].long(), rows[-64:].long()

trainer = lightning.Trainer(
    max_steps=args.steps,
    default_root_dir="lightning_module",
    precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
    devices=1,
    gradient_clip_val=1.0,
    logger=False,
    enable_progress_bar=False,
    limit_val_batches=8,
    num_sanity_val_steps=0,
)
module = LanguageModel()
loader = DataLoader(train_rows, batch_size=args.batch, shuffle=True)
trainer.fit(module, loader, ckpt_path=args.resume, weights_only=True)
[result] = trainer.validate(module, DataLoader(valid_rows, batch_size=args.batch), verbose=False)
print(f"{args.optimizer}: validation loss {result['validation loss']:.4f}")
