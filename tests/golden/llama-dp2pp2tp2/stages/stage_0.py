"""Stage 0 of 2 of LlamaForCausalLM: model.embed_tokens, model.rotary_emb and model.layers.0, on ranks 0, 1, 4, 5 of
dp=2 · pp=2 · tp=2.

The margin shows what a line assigns on this rank, its shape and type; a line without is like the one above.
  B, T     sequences and tokens of one microbatch of one dp rank
  64/tp    split: each tp rank has its piece of the 64
  tp I     the same on every tp rank, and so is its gradient
  tp R     the same, but of its gradient each tp rank has a part, still to be summed
  tp P     each tp rank has a part, still to be summed
Edit at will: autograd derives the backward, that of the conversions included.
"""

# The margin is aligned, which a formatter would undo.
# fmt: off
import torch
import torch.nn.functional as F
from torch import nn

from meshwright.runtime import all_gather, all_reduce, invariant_to_replicated


class LlamaDecoderLayer(nn.Module):
    """model.layers.0"""

    def __init__(self, param):
        super().__init__()
        self.input_layernorm_weight = param("input_layernorm.weight", (64,), tp="I")                    # (64,)
        self.q_proj_weight = param("self_attn.q_proj.weight", (64, 64), tp="S(0)")                      # (32, 64)
        self.k_proj_weight = param("self_attn.k_proj.weight", (32, 64), tp="S(0)")                      # (16, 64)
        self.v_proj_weight = param("self_attn.v_proj.weight", (32, 64), tp="S(0)")                      # (16, 64)
        self.o_proj_weight = param("self_attn.o_proj.weight", (64, 64), tp="S(1)")                      # (64, 32)
        self.post_attention_layernorm_weight = param("post_attention_layernorm.weight", (64,), tp="I")  # (64,)
        self.gate_proj_weight = param("mlp.gate_proj.weight", (176, 64), tp="S(0)")                     # (88, 64)
        self.up_proj_weight = param("mlp.up_proj.weight", (176, 64), tp="S(0)")                         # (88, 64)
        self.down_proj_weight = param("mlp.down_proj.weight", (64, 176), tp="S(1)")                     # (64, 88)

    def forward(self, inputs_embeds, cos, sin):
        # inputs_embeds (B, T, 64) tp I · cos, sin (1, T, 16)

        # input_layernorm                                                                   modeling_llama.py:64
        variance = inputs_embeds.pow(2).mean(-1, keepdim=True)                              # (B, T, 1)  tp I
        hidden_states = inputs_embeds * torch.rsqrt(variance + 1e-06)                       # (B, T, 64)  tp I
        hidden_states = self.input_layernorm_weight * hidden_states

        # self_attn                                                                         modeling_llama.py:243
        hidden_states = invariant_to_replicated(hidden_states, "tp")                        # (B, T, 64)  tp I -> R
        query_states = F.linear(hidden_states, self.q_proj_weight)                          # (B, T, 64/tp)
        query_states = query_states.unflatten(-1, (-1, 16)).transpose(1, 2)                 # (B, 4/tp, T, 16)
        key_states = F.linear(hidden_states, self.k_proj_weight)                            # (B, T, 32/tp)
        key_states = key_states.unflatten(-1, (-1, 16)).transpose(1, 2)                     # (B, 2/tp, T, 16)
        value_states = F.linear(hidden_states, self.v_proj_weight)                          # (B, T, 32/tp)
        cos = cos.unsqueeze(1)                                                              # (1, 1, T, 16)
        sin = sin.unsqueeze(1)
        rotate_half = torch.cat((-query_states[..., 8:], query_states[..., :8]), dim=-1)    # (B, 4/tp, T, 16)
        query_states = query_states * cos + rotate_half * sin
        rotate_half = torch.cat((-key_states[..., 8:], key_states[..., :8]), dim=-1)        # (B, 2/tp, T, 16)
        key_states = key_states * cos + rotate_half * sin
        value = value_states.unflatten(-1, (-1, 16)).transpose(1, 2).unsqueeze(2)           # (B, 2/tp, 1, T, 16)
        value = value.expand(-1, -1, 2, -1, -1)                                             # (B, 2/tp, 2, T, 16)
        value = value.flatten(1, 2)                                                         # (B, 4/tp, T, 16)
        key = key_states.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2)
        attn_output = F.scaled_dot_product_attention(query_states, key, value, scale=0.25, is_causal=True)
        attn_output = attn_output.transpose(1, 2).flatten(2)                                # (B, T, 64/tp)
        attn_output = F.linear(attn_output, self.o_proj_weight)                             # (B, T, 64)  tp P
        attn_output = all_reduce(attn_output, "tp")                                         # (B, T, 64)  tp P -> I
        hidden_states = inputs_embeds + attn_output                                         # (B, T, 64)  tp I

        # post_attention_layernorm                                                          modeling_llama.py:64
        residual = hidden_states
        variance = hidden_states.pow(2).mean(-1, keepdim=True)                              # (B, T, 1)  tp I
        hidden_states = hidden_states * torch.rsqrt(variance + 1e-06)                       # (B, T, 64)  tp I
        hidden_states = self.post_attention_layernorm_weight * hidden_states

        # mlp                                                                               modeling_llama.py:164
        hidden_states = invariant_to_replicated(hidden_states, "tp")                        # (B, T, 64)  tp I -> R
        gate_proj = F.linear(hidden_states, self.gate_proj_weight)                          # (B, T, 176/tp)
        up_proj = F.linear(hidden_states, self.up_proj_weight)
        down_proj = F.linear(F.silu(gate_proj) * up_proj, self.down_proj_weight)            # (B, T, 64)  tp P
        down_proj = all_reduce(down_proj, "tp")                                             # (B, T, 64)  tp P -> I
        return residual + down_proj                                                         # (B, T, 64)  tp I


class Stage(nn.Module):
    """model.embed_tokens, model.rotary_emb and model.layers.0"""

    def __init__(self, param):
        super().__init__()
        param = param.typed(dp="I -> R")  # at rest -> in use: the gradient is summed over dp once per step
        self.embed_tokens_weight = param("model.embed_tokens.weight", (256, 64), tp="S(1)")  # (256, 32)
        self.rotary_emb_inv_freq = param.buffer("model.rotary_emb.inv_freq", (8,))           # (8,)
        self.layers_0 = LlamaDecoderLayer(param.scope("model.layers.0"))

    def forward(self, input_ids):
        T = input_ids.shape[1]

        # embed_tokens                                                                      modeling_llama.py:370
        inputs_embeds = F.embedding(input_ids, self.embed_tokens_weight)                    # (B, T, 64/tp)
        position_ids = torch.arange(T, device=input_ids.device)                             # (T,)

        # rotary_emb                                                                        modeling_llama.py:111
        freqs = position_ids.unsqueeze(0).unsqueeze(2).to(torch.float32) * self.rotary_emb_inv_freq  # (1, T, 8)
        emb = torch.cat((freqs, freqs), dim=-1)                                             # (1, T, 16)
        cos = emb.cos()
        sin = emb.sin()
        inputs_embeds = all_gather(inputs_embeds, "tp", dim=2, to="I")                      # (B, T, 64)  tp S(2) -> I
        hidden_states = self.layers_0(inputs_embeds, cos, sin)                              # (B, T, 64)  tp I
        return hidden_states
