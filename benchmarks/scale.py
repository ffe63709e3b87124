"""Compile Llama-3 405B (126 layers, meta device, sequences of 8192 tokens) for 16,384 ranks and for 128, and emit.

    python benchmarks/scale.py [--layers 126] [--only 16384]

Each mesh is compiled in a process of its own; printed are the time of every stage of the compiler and the peak memory.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from meshwright import Mesh, Plan, compile_parallel

MESHES = {16384: Mesh(dp=128, pp=16, tp=8), 128: Mesh(dp=1, pp=16, tp=8)}


def compile_for(ranks: int, layers: int) -> None:
    """Compile, emit all stage files and two rank files, print."""
    mesh = MESHES[ranks]
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=layers,
        num_attention_heads=128,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        tokens = torch.zeros(2048, 8192, dtype=torch.int64)
    print(f"{layers} layers on {mesh}, {mesh.num_ranks:,} ranks")
    started = time.perf_counter()
    program = compile_parallel(
        model,
        mesh,
        example_inputs={"input_ids": tokens, "labels": tokens},
        plan=Plan(zero=1, microbatches=16),
        progress=lambda stage, seconds: print(f"  {stage:<10} {seconds:7.2f} s", flush=True),
    )
    before = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        program.emit(f"{directory}/bundle", ranks=[0, mesh.num_ranks - 1], weights=False)
        files = list(Path(directory, "bundle", "stages").iterdir())
        longest = max(len(file.read_text().splitlines()) for file in files)
    print(
        f"  {'emit':<10} {time.perf_counter() - before:7.2f} s  ({len(files)} stage files of at most {longest} lines)"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  together   {time.perf_counter() - started:7.2f} s, peak memory {peak:.2f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=126)
    parser.add_argument("--only", type=int, choices=list(MESHES))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for ranks in [args.only] if args.only else list(MESHES):
        if args.here:
            compile_for(ranks, args.layers)
        else:
            command = [sys.executable, __file__, "--here", "--layers", str(args.layers), "--only", str(ranks)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
