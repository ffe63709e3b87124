"""Train LlamaForCausalLM on dp=2 · pp=2 · tp=2.

    torchrun --nproc-per-node 8 train.py --steps 100

This file is yours: data, optimizer, logging and checkpoints are decided here.
"""

import argparse
from pathlib import Path

import torch

from meshwright.runtime import Trainer


def global_batch(step):
    """The batch of one step, whole and the same on every rank. Put your data here."""
    generator = torch.Generator().manual_seed(step)
    input_ids = torch.randint(256, (8, 16), generator=generator, dtype=torch.int64)
    return {"input_ids": input_ids, "labels": input_ids}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument("--resume", type=Path, help="a checkpoint to continue from")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    args = parser.parse_args()

    trainer = Trainer(
        Path(__file__).parent,
        optimizer=lambda named: torch.optim.AdamW(named, lr=3e-4),
        device=args.device,
    )
    if args.resume:
        trainer.load(args.resume)

    for step in range(trainer.num_steps + 1, args.steps + 1):
        loss = trainer.step(trainer.shard(global_batch(step)))
        if trainer.rank == 0:
            print(f"step {step}  loss {loss:.4f}", flush=True)
        if step % args.save_every == 0:
            trainer.save(args.checkpoints / f"step_{step}")


if __name__ == "__main__":
    main()
