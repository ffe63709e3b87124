"""make demo: compile a small Llama for 8 ranks, look at the code, train it on real text beside one device.

The text is the Python standard library, byte by byte. The model runs in float64 on both sides, so that what differs
is the
program and not rounding.
"""

import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from meshwright import Mesh, Plan, compile_parallel
from meshwright.runtime import Trainer
from meshwright.testing import float64

STEPS = 30
BATCH, TOKENS = 16, 64
BUNDLE = Path("build/demo")
LEARNING_RATE = 3e-3
console = Console(width=140)


def text() -> torch.Tensor:
    """Some hundred thousand bytes of the standard library's sources."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    data = b"".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def batch(data: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
    """The global batch of one step: random windows of the text."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(data) - TOKENS, (BATCH,), generator=generator)
    tokens = torch.stack([data[start : start + TOKENS] for start in starts.tolist()])
    return {"input_ids": tokens, "labels": tokens.clone()}


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TOKENS,
    )
    return LlamaForCausalLM(config)


def on_one_device() -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training without Meshwright."""
    whole = model().double().train()
    data, losses = text(), []
    optimizer = torch.optim.AdamW(whole.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        with float64():
            loss = whole(**batch(data, step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, whole.state_dict()


def on_this_rank() -> None:
    """What every one of the 8 processes runs."""
    torch.set_num_threads(1)
    trainer = Trainer(BUNDLE, optimizer=lambda named: torch.optim.AdamW(named, lr=LEARNING_RATE), device="cpu")
    data, losses = text(), []
    for step in range(STEPS):
        loss = trainer.step(trainer.shard(batch(data, step)))
        losses.append(loss.item())
        if trainer.rank == 0 and step % 10 == 0:
            print(f"step {step:3d}  loss {loss:.4f}", flush=True)
    state = trainer.full_state_dict()
    if trainer.rank == 0:
        torch.save({"losses": losses, "state": state}, BUNDLE.parent / "demo_result.pt")
    trainer.close()


def main() -> None:
    console.rule("compile a Llama for dp=2 · pp=2 · tp=2 with ZeRO-1")
    started = time.time()
    program = compile_parallel(
        model(),
        Mesh(dp=2, pp=2, tp=2),
        example_inputs=batch(text(), 0),
        plan=Plan(zero=1, microbatches=4, precision="fp64"),
        progress=lambda stage, seconds: console.print(f"  {stage:<10} {seconds:6.2f} s"),
    )
    program.emit(BUNDLE, overwrite=True)
    console.print(f"\nwritten in {time.time() - started:.1f} s; read it: {BUNDLE.resolve()}")
    stage = (BUNDLE / "stages" / "stage_0.py").read_text().splitlines()
    start = next(i for i, line in enumerate(stage) if line.strip().startswith("# self_attn"))
    console.print(Syntax("\n".join(stage[start : start + 24]), "python", background_color="default"))

    console.rule("train it on 8 processes over gloo")
    started = time.time()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8", __file__, "rank"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    console.print(f"{STEPS} steps in {time.time() - started:.1f} s, the start of 8 processes included")

    console.rule("and on one device")
    losses, state = on_one_device()
    result = torch.load(BUNDLE.parent / "demo_result.pt")
    table = Table("step", "8 ranks", "one device", "difference")
    for step in [*range(0, STEPS, 5), STEPS - 1]:
        a, b = result["losses"][step], losses[step]
        table.add_row(str(step), f"{a:.6f}", f"{b:.6f}", f"{abs(a - b):.1e}")
    console.print(table)
    differences = {n: ((result["state"][n] - v).norm() / (v.norm() + 1e-12)).item() for n, v in state.items()}
    name = max(differences, key=lambda n: differences[n])
    largest = max(abs(a - b) for a, b in zip(result["losses"], losses, strict=True))
    console.print(f"largest difference of a loss {largest:.1e}, of a parameter {differences[name]:.1e} ({name})")
    if not largest < 1e-6 or not losses[-1] < losses[0] - 0.5:
        raise SystemExit("the program does not train like one device")


if __name__ == "__main__":
    on_this_rank() if "rank" in sys.argv[1:] else main()
