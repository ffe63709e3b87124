"""Speech, sound and other series."""

from collections.abc import Mapping

from tests.zoo.entry import CLASSES, SEQ2SEQ, VIT, VOCABULARY, Entry

_WAV2VEC2 = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "conv_dim": [8, 8],
    "conv_kernel": [4, 4], "conv_stride": [2, 2], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0, "final_dropout": 0.0, "layerdrop": 0.0, "mask_time_prob": 0.0, "mask_feature_prob": 0.0,
    "apply_spec_augment": False, "num_labels": CLASSES, "classifier_proj_size": 16,
}  # fmt: skip
_SERIES = {
    "num_input_channels": 2, "context_length": 24, "prediction_length": 4, "patch_length": 4, "patch_stride": 4,
    "d_model": 16,
}  # fmt: skip

SPEECH: Mapping[str, Entry] = {
    "WhisperForConditionalGeneration": Entry(
        "WhisperConfig",
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 32,
         "suppress_tokens": None, "begin_suppress_tokens": None},
        "speech_to_text",
    ),
    "Speech2TextForConditionalGeneration": Entry(
        "Speech2TextConfig",
        {**SEQ2SEQ, "input_feat_per_channel": 8, "num_conv_layers": 2, "conv_kernel_sizes": [3, 3],
         "conv_channels": 16, "max_source_positions": 64, "max_target_positions": 64},
        "features_to_text",
    ),
    "MoonshineForConditionalGeneration": Entry(
        "MoonshineConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "encoder_num_hidden_layers": 2,
         "decoder_num_hidden_layers": 2, "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4,
         "pad_token_id": 0},
        "waveform_to_text",
    ),
    "Wav2Vec2ForSequenceClassification": Entry("Wav2Vec2Config", _WAV2VEC2, "waveform"),
    "Wav2Vec2ForCTC": Entry("Wav2Vec2Config", {**_WAV2VEC2, "vocab_size": 20, "pad_token_id": 0}, "ctc"),
    "HubertForSequenceClassification": Entry("HubertConfig", _WAV2VEC2, "waveform"),
    "WavLMForSequenceClassification": Entry("WavLMConfig", _WAV2VEC2, "waveform"),
    "UniSpeechSatForSequenceClassification": Entry("UniSpeechSatConfig", _WAV2VEC2, "waveform"),
    "Data2VecAudioForSequenceClassification": Entry(
        "Data2VecAudioConfig", {**_WAV2VEC2, "conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2}, "waveform"
    ),
    "Wav2Vec2BertForSequenceClassification": Entry(
        "Wav2Vec2BertConfig",
        {**_WAV2VEC2, "conformer_conv_dropout": 0.0, "conv_depthwise_kernel_size": 3,
         "feature_projection_input_dim": 8},
        "features",
    ),
    "Wav2Vec2ConformerForSequenceClassification": Entry(
        "Wav2Vec2ConformerConfig",
        {**_WAV2VEC2, "conformer_conv_dropout": 0.0, "conv_depthwise_kernel_size": 3},
        "waveform",
        plan={"batch_statistics": "microbatch"},
    ),
    "ASTForAudioClassification": Entry(
        "ASTConfig",
        {**{key: value for key, value in VIT.items() if key != "image_size"}, "num_mel_bins": 16, "max_length": 24,
         "frequency_stride": 8, "time_stride": 8, "num_labels": CLASSES, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0},
        "spectrogram",
    ),
    "PatchTSTForPrediction": Entry(
        "PatchTSTConfig",
        {**_SERIES, "num_attention_heads": 2, "num_hidden_layers": 2, "ffn_dim": 32, "attention_dropout": 0.0,
         "positional_dropout": 0.0, "ff_dropout": 0.0, "path_dropout": 0.0, "head_dropout": 0.0,
         "norm_type": "layernorm", "loss": "mse"},
        "series",
    ),
    "PatchTSMixerForPrediction": Entry(
        "PatchTSMixerConfig",
        {**_SERIES, "num_layers": 2, "dropout": 0.0, "head_dropout": 0.0, "norm_mlp": "LayerNorm"},
        "series",
    ),
}  # fmt: skip
