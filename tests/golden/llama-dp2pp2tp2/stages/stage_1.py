"""Stage 1 of 2 of LlamaForCausalLM: model.rotary_emb, model.layers.1, model.norm, lm_head and the loss, on ranks 2, 3,
6, 7 of dp=2 · pp=2 · tp=2.

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

from meshwright.runtime import all_gather, all_reduce, invariant_to_replicated, shard_range


class LlamaDecoderLayer(nn.Module):
    """model.layers.1"""

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
    """model.rotary_emb, model.layers.1, model.norm, lm_head and the loss"""

    def __init__(self, param):
        super().__init__()
        param = param.typed(dp="I -> R")  # at rest -> in use: the gradient is summed over dp once per step
        self.rotary_emb_inv_freq = param.buffer("model.rotary_emb.inv_freq", (8,))  # (8,)
        self.norm_weight = param("model.norm.weight", (64,), tp="I")                # (64,)
        self.lm_head_weight = param("lm_head.weight", (256, 64), tp="S(0)")         # (128, 64)
        self.layers_1 = LlamaDecoderLayer(param.scope("model.layers.1"))

    def prepare(self, labels):
        """Once per step, on this dp rank's whole batch: num_valid."""
        # loss_function                                                                     loss_utils.py:65
        labels = F.pad(labels, (0, 1), value=-100)                                          # (B, T + 1)

        # cross_entropy                                                                     loss_utils.py:42
        num_valid = (labels[..., 1:].flatten() != -100).sum()                               # ()  dp P
        num_valid = all_reduce(num_valid, "dp")                                             # ()  dp P -> I
        return num_valid

    def forward(self, hidden_states, labels, num_valid):
        T = hidden_states.shape[1]
        position_ids = torch.arange(T, device=hidden_states.device)                         # (T,)

        # rotary_emb                                                                        modeling_llama.py:111
        freqs = position_ids.unsqueeze(0).unsqueeze(2).to(torch.float32) * self.rotary_emb_inv_freq  # (1, T, 8)
        emb = torch.cat((freqs, freqs), dim=-1)                                             # (1, T, 16)
        cos = emb.cos()
        sin = emb.sin()
        hidden_states = self.layers_1(hidden_states, cos, sin)                              # (B, T, 64)  tp I

        # norm                                                                              modeling_llama.py:64
        variance = hidden_states.pow(2).mean(-1, keepdim=True)                              # (B, T, 1)  tp I
        hidden_states = hidden_states * torch.rsqrt(variance + 1e-06)                       # (B, T, 64)  tp I
        hidden_states = self.norm_weight * hidden_states

        # lm_head                                                                           modeling_llama.py:468
        hidden_states = invariant_to_replicated(hidden_states, "tp")                        # (B, T, 64)  tp I -> R
        logits = F.linear(hidden_states, self.lm_head_weight)                               # (B, T, 256/tp)

        # loss_function                                                                     loss_utils.py:65
        labels = F.pad(labels, (0, 1), value=-100)                                          # (B, T + 1)
        logits = logits.flatten(0, 1)                                                       # (B*T, 256/tp)
        shift_labels = labels[..., 1:].flatten()                                            # (B*T,)

        # cross_entropy                                                                     loss_utils.py:42
        log_sum = logits.logsumexp(1, keepdim=True)                                         # (B*T, 2/tp)
        log_sum = all_gather(log_sum, "tp", dim=1, to="I")                                  # (B*T, 2)  tp S(1) -> I
        log_sum = log_sum.logsumexp(1)                                                      # (B*T,)  tp I
        start, stop = shard_range(256, "tp")
        elsewhere = (shift_labels < start) | (shift_labels >= stop)                         # (B*T,)
        columns = (shift_labels - start).masked_fill(elsewhere, 0)
        loss = logits.gather(1, columns.unsqueeze(1))                                       # (B*T, 1)  tp P
        label_logit = loss.squeeze(1).masked_fill(elsewhere, 0)                             # (B*T,)  tp P
        label_logit = all_reduce(label_logit, "tp")                                         # (B*T,)  tp P -> I
        loss = (log_sum - label_logit).masked_fill(shift_labels == -100, 0)                 # (B*T,)  tp I
        return loss.sum() / num_valid                                                       # ()  tp I · dp P · mb P
