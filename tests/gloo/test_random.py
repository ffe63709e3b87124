"""Dropout and noise: by position every mesh draws as one device does; by pieces replicas agree and pieces differ."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from meshwright.testing import exact_random
from tests import models
from tests.gloo import parity
from tests.gloo.pool import Pool

ALL = {"dp": 2, "pp": 2, "tp": 2}


def gpt2() -> nn.Module:
    """GPT-2 with the dropout that Transformers gives it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=64))


EXACT: list[tuple[dict[str, int], dict[str, Any], str]] = [
    ({"dp": 2}, {}, "uneven"),
    ({"dp": 2}, {"zero": 3, "microbatches": 3}, "uneven"),
    ({"tp": 2}, {}, "padded"),
    ({"tp": 4}, {"sequence_parallel": True}, "uneven"),
    ({"pp": 2}, {"microbatches": 3}, "uneven"),
    (ALL, {"zero": 1, "microbatches": 3}, "padded"),
]


@pytest.mark.gloo
@pytest.mark.parametrize(("mesh", "plan", "kind"), EXACT, ids=str)
def test_exact_equals_one_device(
    mesh: dict[str, int], plan: dict[str, Any], kind: str, pool: Pool, tmp_path: Path
) -> None:
    batch = models.batch("gpt2", kind)
    wanted = parity.reference(gpt2(), batch, random=lambda step: exact_random(step=step))
    parity.emit_case(tmp_path / "bundle", gpt2(), batch, mesh, {"random": "exact", **plan})
    got = pool.run("tests.gloo.parity:train", (str(tmp_path / "bundle"), batch), ranks=parity.num_ranks(mesh))
    parity.compare(got, wanted)
