"""Images and videos."""

from collections.abc import Mapping

from tests.zoo.entry import CLASSES, IMAGE, SPECIAL, VIT, VOCABULARY, Entry

_VIT = {**VIT, "num_labels": CLASSES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_SWIN = {
    "image_size": IMAGE, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
    "num_labels": CLASSES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0,
}  # fmt: skip
_CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": IMAGE, "num_labels": CLASSES}
_PYRAMID = {
    "num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2], "strides": [4, 2], "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0, "num_labels": CLASSES,
}  # fmt: skip
_SEGFORMER = {**_PYRAMID, "sr_ratios": [2, 1], "patch_sizes": [7, 3], "decoder_hidden_size": 16,
              "classifier_dropout_prob": 0.0}  # fmt: skip

_STATISTICS = {"batch_statistics": "microbatch"}

VISION: Mapping[str, Entry] = {
    "ViTForImageClassification": Entry("ViTConfig", _VIT, "image"),
    "DeiTForImageClassification": Entry("DeiTConfig", _VIT, "image"),
    "BeitForImageClassification": Entry("BeitConfig", {**_VIT, "drop_path_rate": 0.0}, "image"),
    "Dinov2ForImageClassification": Entry(
        "Dinov2Config", {**_VIT, "mlp_ratio": 2, "drop_path_rate": 0.0}, "image"
    ),
    "ConvNextForImageClassification": Entry("ConvNextConfig", _CONVNEXT, "image"),
    "SwinForImageClassification": Entry("SwinConfig", _SWIN, "image"),
    "ResNetForImageClassification": Entry(
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": CLASSES, "layer_type": "basic"},
        "image",
        plan=_STATISTICS,
    ),
    "Swinv2ForImageClassification": Entry("Swinv2Config", _SWIN, "image"),
    "ConvNextV2ForImageClassification": Entry("ConvNextV2Config", _CONVNEXT, "image"),
    "SegformerForImageClassification": Entry("SegformerConfig", _SEGFORMER, "image"),
    "SegformerForSemanticSegmentation": Entry("SegformerConfig", _SEGFORMER, "segmentation", plan=_STATISTICS),
    "PvtForImageClassification": Entry(
        "PvtConfig",
        {**_PYRAMID, "image_size": IMAGE, "sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2]},
        "image",
    ),
    "PvtV2ForImageClassification": Entry(
        "PvtV2Config", {**_PYRAMID, "image_size": IMAGE, "sr_ratios": [2, 1], "patch_sizes": [7, 3]}, "image"
    ),
    "Data2VecVisionForImageClassification": Entry(
        "Data2VecVisionConfig", {**_VIT, "drop_path_rate": 0.0, "use_relative_position_bias": True}, "image"
    ),
    "ViTMAEForPreTraining": Entry(
        "ViTMAEConfig",
        {**VIT, "decoder_hidden_size": 16, "decoder_intermediate_size": 32, "decoder_num_hidden_layers": 2,
         "decoder_num_attention_heads": 2, "mask_ratio": 0.5, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0},
        "image_and_noise",
    ),
    "ViTForMaskedImageModeling": Entry("ViTConfig", {**_VIT, "encoder_stride": 8}, "masked_image"),
    "VideoMAEForVideoClassification": Entry("VideoMAEConfig", {**_VIT, "num_frames": 4, "tubelet_size": 2}, "video"),
    "VivitForVideoClassification": Entry("VivitConfig", {**_VIT, "num_frames": 4, "tubelet_size": [2, 8, 8]}, "video"),
    "TimesformerForVideoClassification": Entry(
        "TimesformerConfig", {**_VIT, "num_frames": 4, "drop_path_rate": 0}, "video"
    ),
    "HieraForImageClassification": Entry(
        "HieraConfig",
        {"image_size": [IMAGE, IMAGE], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "patch_size": [7, 7],
         "patch_stride": [4, 4], "patch_padding": [3, 3], "masked_unit_size": [4, 4], "query_stride": [2, 2],
         "num_query_pool": 1, "num_labels": CLASSES, "drop_path_rate": 0.0},
        "image",
    ),
    "BitForImageClassification": Entry(
        "BitConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_groups": 4, "num_labels": CLASSES,
         "layer_type": "preactivation", "drop_path_rate": 0.0},
        "image",
    ),
    "FocalNetForImageClassification": Entry(
        "FocalNetConfig",
        {"image_size": IMAGE, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32],
         "focal_levels": [2, 2], "focal_windows": [3, 3], "num_labels": CLASSES, "hidden_dropout_prob": 0.0,
         "drop_path_rate": 0.0},
        "image",
    ),
    "PoolFormerForImageClassification": Entry(
        "PoolFormerConfig",
        {"depths": [1, 1], "hidden_sizes": [8, 16], "patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1],
         "num_encoder_blocks": 2, "num_labels": CLASSES, "drop_path_rate": 0.0},
        "image",
    ),
    "RegNetForImageClassification": Entry(
        "RegNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8, "num_labels": CLASSES},
        "image",
        plan=_STATISTICS,
    ),
    "MobileNetV2ForImageClassification": Entry(
        "MobileNetV2Config",
        {"image_size": IMAGE, "depth_multiplier": 0.25, "output_stride": 8, "classifier_dropout_prob": 0.0,
         "num_labels": CLASSES},
        "image",
        plan=_STATISTICS,
    ),
    "MobileViTForImageClassification": Entry(
        "MobileViTConfig",
        {"image_size": IMAGE, "hidden_sizes": [16, 16, 32], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16],
         "num_attention_heads": 2, "mlp_ratio": 2.0, "num_labels": CLASSES, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0},
        "image",
        plan=_STATISTICS,
    ),
    "ImageGPTForImageClassification": Entry(
        "ImageGPTConfig",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0,
         "embd_pdrop": 0.0, "attn_pdrop": 0.0, "num_labels": CLASSES, **SPECIAL},
        "classes",
    ),
}  # fmt: skip
