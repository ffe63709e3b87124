"""One class of the zoo, and what configurations of several families share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCABULARY, CLASSES, IMAGE = 96, 4, 32
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **SPECIAL,
}
BERT = {**TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": IMAGE,
    "patch_size": 8,
}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **SPECIAL,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One class of the zoo. ``kind`` names the batch in BATCHES.

    plan: choices that it cannot do without. experts: how a mixture computes; the default is an operator of
    Transformers' own, which emitted code cannot import.
    """

    config_class: str
    config: Mapping[str, Any]
    kind: str = "causal"
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    experts: str | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)
