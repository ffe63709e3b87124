"""Language models that continue text: attention, mixtures of experts, scans, and what mixes them."""

from collections.abc import Mapping

from tests.zoo.entry import CLASSES, SPECIAL, TEXT, VOCABULARY, Entry

_GROUPED = {**TEXT, "num_key_value_heads": 2}
_NEAR = {**_GROUPED, "head_dim": 8, "sliding_window": 8}
_GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, **SPECIAL,
}  # fmt: skip
_EXPERTS = {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {
    **TEXT, "num_key_value_heads": 4, "num_hidden_layers": 3, "moe_intermediate_size": 16, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "kv_lora_rank": 16,
    "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip
_MAMBA = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "use_cache": False,
    "time_step_rank": 4, **SPECIAL,
}  # fmt: skip
_MAMBA2 = {**_GROUPED, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
           "mamba_chunk_size": 8}  # fmt: skip

ATTENTION: Mapping[str, Entry] = {
    "LlamaForCausalLM": Entry("LlamaConfig", _GROUPED),
    "GPT2LMHeadModel": Entry("GPT2Config", _GPT2),
    "FalconForCausalLM": Entry("FalconConfig", {**TEXT, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "Qwen2ForCausalLM": Entry("Qwen2Config", _GROUPED),
    "Qwen3ForCausalLM": Entry("Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "MistralForCausalLM": Entry("MistralConfig", {**_GROUPED, "sliding_window": None}),
    "GemmaForCausalLM": Entry("GemmaConfig", {**_GROUPED, "head_dim": 8}),
    "Gemma2ForCausalLM": Entry("Gemma2Config", {**_GROUPED, "head_dim": 8, "sliding_window": 8}),
    "PhiForCausalLM": Entry("PhiConfig", {**TEXT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0}),
    "GPTNeoXForCausalLM": Entry("GPTNeoXConfig", {**TEXT, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
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
    "Phi3ForCausalLM": Entry("Phi3Config", {**_GROUPED, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "CohereForCausalLM": Entry("CohereConfig", _GROUPED),
    "Gemma3ForCausalLM": Entry("Gemma3TextConfig", _NEAR),
    "Starcoder2ForCausalLM": Entry("Starcoder2Config", {**_GROUPED, "residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "MptForCausalLM": Entry(
        "MptConfig",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 64},
    ),
    "GPTJForCausalLM": Entry("GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    "GPTNeoForCausalLM": Entry(
        "GPTNeoConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4,
         "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, "resid_dropout": 0.0,
         "embed_dropout": 0.0, "attention_dropout": 0.0, **SPECIAL},
    ),
    "GPTBigCodeForCausalLM": Entry("GPTBigCodeConfig", _GPT2),
    "NemotronForCausalLM": Entry("NemotronConfig", {**_GROUPED, "head_dim": 8}),
    "GlmForCausalLM": Entry("GlmConfig", {**_GROUPED, "head_dim": 8}),
    "XLNetLMHeadModel": Entry(
        "XLNetConfig",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "dropout": 0.0,
         "use_mems_train": False, **SPECIAL},
    ),
    "GPT2ForSequenceClassification": Entry("GPT2Config", {**_GPT2, "num_labels": CLASSES}, "classes"),
    "LlamaForSequenceClassification": Entry("LlamaConfig", {**_GROUPED, "num_labels": CLASSES}, "classes"),
}  # fmt: skip
MIXTURES: Mapping[str, Entry] = {
    "MixtralForCausalLM": Entry(
        "MixtralConfig",
        {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0,
         "sliding_window": None},
        experts="batched_mm",
    ),
    "Qwen2MoeForCausalLM": Entry(
        "Qwen2MoeConfig",
        {**_EXPERTS, "shared_expert_intermediate_size": 32, "output_router_logits": True, "router_aux_loss_coef": 0.1},
        experts="batched_mm",
    ),
    "Qwen3MoeForCausalLM": Entry("Qwen3MoeConfig", {**_EXPERTS, "head_dim": 8}, experts="batched_mm"),
    "OlmoeForCausalLM": Entry("OlmoeConfig", _EXPERTS, experts="batched_mm"),
    "GptOssForCausalLM": Entry("GptOssConfig", {**_NEAR, "num_local_experts": 4}, experts="batched_mm"),
    "Llama4ForCausalLM": Entry(
        "Llama4TextConfig",
        {**_GROUPED, "head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 4, "num_experts_per_tok": 1,
         "interleave_moe_layer_step": 1, "attention_chunk_size": 16},
    ),
    "DeepseekV2ForCausalLM": Entry("DeepseekV2Config", {**_LATENT, "topk_method": "greedy"}, experts="batched_mm"),
    "DeepseekV3ForCausalLM": Entry("DeepseekV3Config", _LATENT, experts="batched_mm"),
}  # fmt: skip
SCANS: Mapping[str, Entry] = {
    "MambaForCausalLM": Entry("MambaConfig", _MAMBA),
    "FalconMambaForCausalLM": Entry("FalconMambaConfig", _MAMBA),
    "Mamba2ForCausalLM": Entry(
        "Mamba2Config",
        {**_MAMBA, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8, "expand": 2},
    ),
    "BambaForCausalLM": Entry("BambaConfig", {**_MAMBA2, "attn_layer_indices": [1]}),
    "FalconH1ForCausalLM": Entry("FalconH1Config", {**_MAMBA2, "mamba_d_ssm": 64}),
    "Zamba2ForCausalLM": Entry(
        "Zamba2Config",
        {**TEXT, "mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 8, "chunk_size": 8,
         "num_mem_blocks": 1, "layers_block_type": ["mamba", "hybrid"], "use_mem_rope": False, "adapter_rank": 8},
    ),
    "JambaForCausalLM": Entry(
        "JambaConfig",
        {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1,
         "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
         "use_mamba_kernels": False, "use_cache": False},
        experts="batched_mm",
    ),
    "Lfm2ForCausalLM": Entry(
        "Lfm2Config",
        {**_GROUPED, "block_ff_dim": 32, "block_multiple_of": 8, "layer_types": ["conv", "full_attention"]},
    ),
    "RecurrentGemmaForCausalLM": Entry(
        "RecurrentGemmaConfig",
        {**_GROUPED, "lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3,
         "block_types": ["recurrent", "recurrent", "attention"]},
    ),
    "RwkvForCausalLM": Entry(
        "RwkvConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64, "use_cache": False,
         **SPECIAL},
    ),
    "Qwen3NextForCausalLM": Entry(
        "Qwen3NextConfig",
        {**_EXPERTS, "head_dim": 8, "shared_expert_intermediate_size": 16, "linear_num_value_heads": 4,
         "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "layer_types": ["linear_attention", "full_attention"]},
        experts="batched_mm",
    ),
}  # fmt: skip
