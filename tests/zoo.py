"""A zoo of Transformers' own model classes with small configurations, each with a batch to train on.

Every entry gives (model class, configuration class, configuration, kind of batch). The configurations change sizes
alone; dropout is off, so that one device computes the same.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Batch = dict[str, Any]
BATCH, LENGTH, VOCABULARY, CLASSES, IMAGE = 8, 12, 96, 4, 32

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_BERT = {**_TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": IMAGE,
    "patch_size": 8,
    "num_labels": CLASSES,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_EXPERTS = {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One class of the zoo. ``kind`` names the batch in BATCHES; ``without``: entries of that batch left out.

    plan: choices that it cannot do without. experts: how a mixture computes; the default is an operator of
    Transformers' own, which emitted code cannot import.
    """

    config_class: str
    config: Mapping[str, Any]
    kind: str = "causal"
    without: tuple[str, ...] = ()
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    experts: str | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)


ZOO: Mapping[str, Entry] = {
    # text: decoders
    "LlamaForCausalLM": Entry("LlamaConfig", _GROUPED),
    "GPT2LMHeadModel": Entry(
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0,
         "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "FalconForCausalLM": Entry("FalconConfig", {**_TEXT, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "Qwen2ForCausalLM": Entry("Qwen2Config", _GROUPED),
    "Qwen3ForCausalLM": Entry("Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "MistralForCausalLM": Entry("MistralConfig", {**_GROUPED, "sliding_window": None}),
    "GemmaForCausalLM": Entry("GemmaConfig", {**_GROUPED, "head_dim": 8}),
    "Gemma2ForCausalLM": Entry("Gemma2Config", {**_GROUPED, "head_dim": 8, "sliding_window": 8}),
    "PhiForCausalLM": Entry("PhiConfig", {**_TEXT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0}),
    "GPTNeoXForCausalLM": Entry("GPTNeoXConfig", {**_TEXT, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "OPTForCausalLM": Entry(
        "OPTConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "word_embed_proj_dim": 32, "max_position_embeddings": 64, "dropout": 0.0, "attention_dropout": 0.0,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "BloomForCausalLM": Entry(
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0,
         "attention_dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "Olmo2ForCausalLM": Entry("Olmo2Config", _GROUPED),
    "GraniteForCausalLM": Entry("GraniteConfig", _GROUPED),
    "StableLmForCausalLM": Entry("StableLmConfig", {**_GROUPED, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    # text: mixtures of experts and scans
    "MixtralForCausalLM": Entry("MixtralConfig", {**_EXPERTS, "sliding_window": None}, experts="batched_mm"),
    "MambaForCausalLM": Entry(
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "use_cache": False,
         "time_step_rank": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    # text: encoders
    "BertForMaskedLM": Entry("BertConfig", _BERT, "masked"),
    "BertForSequenceClassification": Entry("BertConfig", {**_BERT, "num_labels": CLASSES}, "classes"),
    "RobertaForMaskedLM": Entry("RobertaConfig", _BERT, "masked"),
    "DistilBertForMaskedLM": Entry(
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "dropout": 0.0,
         "attention_dropout": 0.0, "max_position_embeddings": 64, "pad_token_id": 0},
        "masked",
    ),
    "ElectraForMaskedLM": Entry("ElectraConfig", {**_BERT, "embedding_size": 16}, "masked"),
    "AlbertForMaskedLM": Entry(
        "AlbertConfig", {**_BERT, "embedding_size": 16, "classifier_dropout_prob": 0.0}, "masked"
    ),
    # text: encoder-decoders
    "T5ForConditionalGeneration": Entry("T5Config", _T5, "seq2seq"),
    "BartForConditionalGeneration": Entry("BartConfig", _SEQ2SEQ, "seq2seq"),
    # vision
    "ViTForImageClassification": Entry("ViTConfig", _IMAGE, "image"),
    "DeiTForImageClassification": Entry("DeiTConfig", _IMAGE, "image"),
    "BeitForImageClassification": Entry("BeitConfig", {**_IMAGE, "drop_path_rate": 0.0}, "image"),
    "Dinov2ForImageClassification": Entry(
        "Dinov2Config", {**_IMAGE, "mlp_ratio": 2, "drop_path_rate": 0.0}, "image"
    ),
    "ConvNextForImageClassification": Entry(
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": IMAGE, "num_labels": CLASSES},
        "image",
    ),
    "SwinForImageClassification": Entry(
        "SwinConfig",
        {"image_size": IMAGE, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
         "num_labels": CLASSES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0},
        "image",
    ),
    "ResNetForImageClassification": Entry(
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": CLASSES, "layer_type": "basic"},
        "image",
        plan={"batch_statistics": "microbatch"},
    ),
    # speech
    "WhisperForConditionalGeneration": Entry(
        "WhisperConfig",
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 32,
         "suppress_tokens": None, "begin_suppress_tokens": None},
        "speech_to_text",
    ),
    "Wav2Vec2ForSequenceClassification": Entry(
        "Wav2Vec2Config",
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "conv_dim": [8, 8], "conv_kernel": [4, 4], "conv_stride": [2, 2], "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "hidden_dropout": 0.0,
         "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0, "layerdrop": 0.0,
         "mask_time_prob": 0.0, "mask_feature_prob": 0.0, "num_labels": CLASSES, "classifier_proj_size": 16,
         "apply_spec_augment": False, "final_dropout": 0.0},
        "waveform",
    ),
    # several modalities
    "CLIPModel": Entry(
        "CLIPConfig",
        {"projection_dim": 16},
        "text_and_image",
        extra={
            "text_config": {**_TEXT, "hidden_dropout_prob": 0.0, "attention_dropout": 0.0},
            "vision_config": {k: v for k, v in _IMAGE.items() if "dropout" not in k and k != "num_labels"},
        },
    ),
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
    result = BATCHES[ZOO[name].kind](size, generator)
    return {key: value for key, value in result.items() if key not in ZOO[name].without}


def _tokens(size: int, generator: torch.Generator, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (size, length), generator=generator)


def _causal(size: int, generator: torch.Generator) -> Batch:
    tokens = _tokens(size, generator)
    labels = tokens.clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.4] = -100
    labels[1] = -100
    return {"input_ids": tokens, "labels": labels}


def _masked(size: int, generator: torch.Generator) -> Batch:
    mask = torch.ones(size, LENGTH, dtype=torch.int64)
    mask[1, 7:] = mask[4, 9:] = 0
    return {**_causal(size, generator), "attention_mask": mask}


def _classes(size: int, generator: torch.Generator) -> Batch:
    return {"input_ids": _tokens(size, generator), "labels": torch.randint(CLASSES, (size,), generator=generator)}


def _image(size: int, generator: torch.Generator) -> Batch:
    return {
        "pixel_values": torch.randn(size, 3, IMAGE, IMAGE, generator=generator),
        "labels": torch.randint(CLASSES, (size,), generator=generator),
    }


def _waveform(size: int, generator: torch.Generator) -> Batch:
    return {
        "input_values": torch.randn(size, 80, generator=generator),
        "labels": torch.randint(CLASSES, (size,), generator=generator),
    }


def _speech_to_text(size: int, generator: torch.Generator) -> Batch:
    return {
        "input_features": torch.randn(size, 8, 24, generator=generator),
        "labels": _causal(size, generator)["labels"],
    }


def _text_and_image(size: int, generator: torch.Generator) -> Batch:
    return {
        "input_ids": _tokens(size, generator),
        "pixel_values": torch.randn(size, 3, IMAGE, IMAGE, generator=generator),
        "return_loss": True,
    }


BATCHES: Mapping[str, Callable[[int, torch.Generator], Batch]] = {
    "causal": _causal,
    "masked": _masked,
    "classes": _classes,
    "seq2seq": _causal,
    "image": _image,
    "waveform": _waveform,
    "speech_to_text": _speech_to_text,
    "text_and_image": _text_and_image,
}
"""Kind -> (size, generator) -> batch."""
