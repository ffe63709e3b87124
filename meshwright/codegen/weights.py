"""The real parameters and buffers of a model on disk."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from meshwright.compiler.program import Lowered

SHARD_BYTES = 4 * 2**30


def write_weights(lowered: Lowered, directory: Path) -> None:
    """Whole tensors by the model's names, in shards, with an index; nothing for a model without real parameters."""
    tensors = lowered.capture.tensors
    names = [
        *lowered.capture.parameters,
        *lowered.buffers,
        *(n for n, b in lowered.capture.buffers.items() if n not in lowered.buffers),
    ]
    owners = dict.fromkeys(lowered.buffers[n].buffer.name if n in lowered.buffers else n for n in names)
    real = [name for name in owners if name in tensors and not tensors[name].is_meta]
    if not real:
        return
    directory.mkdir()
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = count = 0

    def flush() -> None:
        nonlocal shard, size, count
        if shard:
            file = f"weights_{count:05d}.safetensors"
            save_file(shard, directory / file)
            index.update(dict.fromkeys(shard, file))
            shard, size, count = {}, 0, count + 1

    for name in real:
        tensor = tensors[name].detach().contiguous().clone().cpu()
        if size + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor
        size += tensor.nbytes
    flush()
    (directory / "index.json").write_text(json.dumps({"weight_map": index}, indent=1) + "\n")
