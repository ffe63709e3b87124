"""Text and images together."""

from collections.abc import Mapping

from tests.zoo.entry import BERT, CLASSES, IMAGE, TEXT, VIT, Entry

_TOWERS = {"text_config": TEXT, "vision_config": VIT}

SEVERAL: Mapping[str, Entry] = {
    "CLIPModel": Entry("CLIPConfig", {"projection_dim": 16}, "text_and_image", extra=_TOWERS),
    "CLIPForImageClassification": Entry("CLIPConfig", {"num_labels": CLASSES}, "image", extra=_TOWERS),
    "CLIPSegForImageSegmentation": Entry(
        "CLIPSegConfig",
        {"projection_dim": 32, "reduce_dim": 16, "extract_layers": [0, 1], "decoder_num_attention_heads": 2,
         "decoder_intermediate_size": 32, "decoder_hidden_act": "relu"},
        "text_and_mask",
        extra=_TOWERS,
    ),
    "AltCLIPModel": Entry(
        "AltCLIPConfig",
        {"projection_dim": 16},
        "text_and_image",
        extra={"text_config": {**BERT, "project_dim": 32}, "vision_config": VIT},
    ),
    "SiglipModel": Entry("SiglipConfig", {}, "text_and_image", extra=_TOWERS),
    "SiglipForImageClassification": Entry("SiglipConfig", {"num_labels": CLASSES}, "image", extra=_TOWERS),
    "BlipForConditionalGeneration": Entry(
        "BlipConfig",
        {},
        "caption",
        extra={"text_config": {**BERT, "projection_dim": 16, "encoder_hidden_size": 32}, "vision_config": VIT},
    ),
    "GitForCausalLM": Entry("GitConfig", BERT, "caption", extra={"vision_config": VIT}),
    "LlavaForConditionalGeneration": Entry(
        "LlavaConfig",
        {"image_token_index": 3, "image_seq_length": 16, "vision_feature_layer": -1,
         "vision_feature_select_strategy": "full"},
        "image_tokens",
        extra={
            "text_config": {**TEXT, "num_key_value_heads": 2, "model_type": "llama"},
            "vision_config": {**VIT, "model_type": "siglip_vision_model"},
        },
    ),
    "LayoutLMForTokenClassification": Entry(
        "LayoutLMConfig", {**BERT, "num_labels": CLASSES, "max_2d_position_embeddings": 64}, "layout"
    ),
    "LayoutLMv3ForTokenClassification": Entry(
        "LayoutLMv3Config",
        {**BERT, "num_labels": CLASSES, "max_2d_position_embeddings": 64, "coordinate_size": 6, "shape_size": 4,
         "input_size": IMAGE, "patch_size": 8, "rel_pos_bins": 8, "rel_2d_pos_bins": 8},
        "layout_and_image",
    ),
    "ViltForQuestionAnswering": Entry(
        "ViltConfig",
        {**BERT, "image_size": IMAGE, "patch_size": 8, "num_labels": CLASSES, "max_image_length": 16},
        "question",
    ),
    "VisualBertForQuestionAnswering": Entry(
        "VisualBertConfig", {**BERT, "visual_embedding_dim": 16, "num_labels": CLASSES}, "regions"
    ),
}  # fmt: skip
