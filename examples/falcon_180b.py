"""Falcon-180B at its real size for 4,096 ranks (dp=64 · pp=8 · tp=8), compiled on this machine without one weight.

The model lives on the meta device. Printed: the stages, and parameters and bytes on a rank of each.
"""

import argparse
import math
import time

import torch
from transformers import FalconConfig, FalconForCausalLM

from meshwright import Mesh, Plan, compile_parallel
from meshwright.api import Program


def compiled(num_layers: int = 80) -> Program:
    """The program of a Falcon with the sizes of the 180B model."""
    config = FalconConfig(
        vocab_size=65024,
        hidden_size=14848,
        num_hidden_layers=num_layers,
        num_attention_heads=232,
        num_kv_heads=8,
        new_decoder_architecture=True,
    )
    with torch.device("meta"):
        model = FalconForCausalLM(config).to(torch.bfloat16)
        tokens = torch.zeros(1024, 2048, dtype=torch.int64)
    return compile_parallel(
        model,
        Mesh(dp=64, pp=8, tp=8),
        example_inputs={"input_ids": tokens, "labels": tokens},
        plan=Plan(zero=1, microbatches=16),
        progress=lambda stage, seconds: print(f"{stage:<10} {seconds:7.2f} s", flush=True),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=80)
    layers = parser.parse_args().layers
    started = time.time()
    program = compiled(layers).lowered
    total = sum(math.prod(p.shape) for p in program.capture.parameters.values())
    print(f"{program.capture.model}, {layers} layers, {total / 1e9:.1f} billion parameters, on {program.mesh}")
    print(f"compiled for {program.mesh.num_ranks:,} ranks in {time.time() - started:.0f} s")
    tensor, data = program.mesh.size("tp"), program.mesh.size("dp")
    for stage in program.stages:
        held = 0
        for placed in program.parameters.values():
            if stage.index in placed.stages:
                size = (
                    placed.segment.length * math.prod(placed.parameter.shape[1:])
                    if placed.segment
                    else math.prod(placed.parameter.shape)
                )
                held += size // (tensor if placed.held["tp"].use.is_split else 1)
        # bfloat16 parameters and gradients; ZeRO-1 splits AdamW's two moments over dp
        memory = held * 2 * 2 + held * 2 * 2 / data
        print(
            f"stage {stage.index}: {len(stage.ranks)} ranks, each {held / 1e9:6.3f} billion parameters, "
            f"{memory / 2**30:6.2f} GiB of state"
        )


if __name__ == "__main__":
    main()
