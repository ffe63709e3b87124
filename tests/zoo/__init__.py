"""A zoo of Transformers' own model classes with small configurations, each with a batch to train on.

The configurations change sizes alone; dropout is off, so that one device computes the same.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tests.zoo.batches import BATCHES, Batch
from tests.zoo.decoders import ATTENTION, MIXTURES, SCANS
from tests.zoo.encoders import ENCODER_DECODERS, ENCODERS
from tests.zoo.entry import Entry
from tests.zoo.several import SEVERAL
from tests.zoo.speech import SPEECH
from tests.zoo.vision import VISION

BATCH = 8
ZOO: Mapping[str, Entry] = {
    **ATTENTION, **MIXTURES, **SCANS, **ENCODERS, **ENCODER_DECODERS, **VISION, **SPEECH, **SEVERAL
}  # fmt: skip
"""Class -> how to build it."""


def build(name: str) -> nn.Module:
    """A model of the zoo with every parameter random."""
    import transformers

    entry = ZOO[name]
    torch.manual_seed(0)
    config = getattr(transformers, entry.config_class)(**entry.config, **entry.extra)
    model: Any = getattr(transformers, name)(config)
    if entry.experts is not None:
        model.set_experts_implementation(entry.experts)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(noise + (0.5 if parameter.ndim == 1 else 0.0))
    return model  # type: ignore[no-any-return]


def batch(name: str, size: int = BATCH) -> Batch:
    """A global batch for a model of the zoo."""
    generator = torch.Generator().manual_seed(1)
    return BATCHES[ZOO[name].kind](size, generator)
