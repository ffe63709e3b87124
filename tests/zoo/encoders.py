"""Encoders of text with their heads, and encoder-decoders."""

from collections.abc import Mapping

from tests.zoo.entry import BERT, CLASSES, SEQ2SEQ, TEXT, VOCABULARY, Entry

_T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_DEBERTA = {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_dropout": 0.0}
_LED = {key: value for key, value in SEQ2SEQ.items() if key != "max_position_embeddings"}

ENCODERS: Mapping[str, Entry] = {
    "BertForMaskedLM": Entry("BertConfig", BERT, "masked"),
    "BertForSequenceClassification": Entry("BertConfig", {**BERT, "num_labels": CLASSES}, "classes"),
    "RobertaForMaskedLM": Entry("RobertaConfig", BERT, "masked"),
    "DistilBertForMaskedLM": Entry(
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "dropout": 0.0,
         "attention_dropout": 0.0, "max_position_embeddings": 64, "pad_token_id": 0},
        "masked",
    ),
    "ElectraForMaskedLM": Entry("ElectraConfig", {**BERT, "embedding_size": 16}, "masked"),
    "AlbertForMaskedLM": Entry(
        "AlbertConfig", {**BERT, "embedding_size": 16, "classifier_dropout_prob": 0.0}, "masked"
    ),
    "DebertaForMaskedLM": Entry("DebertaConfig", _DEBERTA, "masked"),
    "DebertaV2ForMaskedLM": Entry("DebertaV2Config", {**_DEBERTA, "position_biased_input": False}, "masked"),
    "ModernBertForMaskedLM": Entry(
        "ModernBertConfig", {**TEXT, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}, "masked"
    ),
    "BigBirdForMaskedLM": Entry("BigBirdConfig", {**BERT, "attention_type": "original_full"}, "masked"),
    "FNetForMaskedLM": Entry("FNetConfig", {**TEXT, "hidden_dropout_prob": 0.0}),
    "MPNetForMaskedLM": Entry("MPNetConfig", BERT, "masked"),
    "RoFormerForMaskedLM": Entry("RoFormerConfig", {**BERT, "embedding_size": 32}, "masked"),
    "ConvBertForMaskedLM": Entry(
        "ConvBertConfig", {**BERT, "embedding_size": 32, "conv_kernel_size": 3}, "masked"
    ),
    "MobileBertForMaskedLM": Entry(
        "MobileBertConfig",
        {**BERT, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
        "masked",
    ),
    "EsmForMaskedLM": Entry(
        "EsmConfig", {**BERT, "mask_token_id": 3, "position_embedding_type": "rotary"}, "masked"
    ),
    "FunnelForMaskedLM": Entry(
        "FunnelConfig",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1],
         "num_decoder_layers": 1, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
        "masked",
    ),
    "LongformerForMaskedLM": Entry("LongformerConfig", {**BERT, "attention_window": [4, 4]}, "masked"),
    "BertForQuestionAnswering": Entry("BertConfig", BERT, "spans"),
    "BertForTokenClassification": Entry("BertConfig", {**BERT, "num_labels": CLASSES}, "token_classes"),
    "BertForMultipleChoice": Entry("BertConfig", BERT, "choices"),
    "BertForPreTraining": Entry("BertConfig", BERT, "pretraining"),
    "T5ForSequenceClassification": Entry(
        "T5Config", {**_T5, "num_labels": CLASSES, "classifier_dropout": 0.0}, "ended_classes"
    ),
}  # fmt: skip
ENCODER_DECODERS: Mapping[str, Entry] = {
    "T5ForConditionalGeneration": Entry("T5Config", _T5, "seq2seq"),
    "BartForConditionalGeneration": Entry("BartConfig", SEQ2SEQ, "seq2seq"),
    "UMT5ForConditionalGeneration": Entry("UMT5Config", _T5, "seq2seq"),
    "MBartForConditionalGeneration": Entry("MBartConfig", SEQ2SEQ, "seq2seq_begun"),
    "PegasusForConditionalGeneration": Entry("PegasusConfig", SEQ2SEQ, "seq2seq"),
    "MarianMTModel": Entry("MarianConfig", SEQ2SEQ, "seq2seq"),
    "M2M100ForConditionalGeneration": Entry("M2M100Config", SEQ2SEQ, "seq2seq"),
    "BlenderbotForConditionalGeneration": Entry("BlenderbotConfig", SEQ2SEQ, "seq2seq"),
    "LEDForConditionalGeneration": Entry(
        "LEDConfig",
        {**_LED, "attention_window": [4, 4], "max_encoder_position_embeddings": 64,
         "max_decoder_position_embeddings": 64},
        "seq2seq",
    ),
    "SwitchTransformersForConditionalGeneration": Entry(
        "SwitchTransformersConfig",
        {**_T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
         "expert_capacity": 64},
        "seq2seq_masked",
    ),
}  # fmt: skip
