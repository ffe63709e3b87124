"""Train LlamaForCausalLM on dp=2 · pp=2 · tp=2.

    torchrun --nproc-per-node 8 train.py --steps 100
    python train.py --single-process --steps 1  # all ranks in one process, for breakpoint() and pdb

This file is yours: data, optimizer, logging and checkpoints are decided here.
"""

import argparse
from pathlib import Path

import torch

from meshwright.runtime import Trainer, run_in_one_process


def global_batch(step):
    """The batch of one step, whole and the same on every rank. Put your data here."""
    generator = torch.Generator().manual_seed(step)
    input_ids = torch.randint(256, (8, 16), generator=generator, dtype=torch.int64)
    return {"input_ids": input_ids, "labels": input_ids}


def train(args):
    """What every rank does."""
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


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument("--resume", type=Path, help="a checkpoint to continue from")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--single-process", action="store_true", help="all ranks as threads of this process, to debug")
    args = parser.parse_args()
    if args.single_process:
        run_in_one_process(lambda rank: train(args), num_ranks=8)
    else:
        train(args)


if __name__ == "__main__":
    main()
