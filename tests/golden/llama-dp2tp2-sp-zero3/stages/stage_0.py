"""Stage 0 of 1 of LlamaForCausalLM: model.embed_tokens, model.rotary_emb, model.layers.0-1, model.norm, lm_head and
the loss, on ranks 0, 1, 2, 3 of dp=2 · tp=2.

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

from meshwright.runtime import all_gather, all_reduce, all_to_all, reduce_scatter, shard_range


class LlamaDecoderLayer(nn.Module):
    """model.layers.0-1"""

    def __init__(self, param):
        super().__init__()
        self.input_layernorm_weight = param("input_layernorm.weight", (64,), tp="I -> R")                    # (64,)
        self.q_proj_weight = param("self_attn.q_proj.weight", (64, 64), tp="S(0)")                           # (32, 64)
        self.k_proj_weight = param("self_attn.k_proj.weight", (32, 64), tp="S(0)")                           # (16, 64)
        self.v_proj_weight = param("self_attn.v_proj.weight", (32, 64), tp="S(0)")                           # (16, 64)
        self.o_proj_weight = param("self_attn.o_proj.weight", (64, 64), tp="S(1)")                           # (64, 32)
        self.post_attention_layernorm_weight = param("post_attention_layernorm.weight", (64,), tp="I -> R")  # (64,)
        self.gate_proj_weight = param("mlp.gate_proj.weight", (176, 64), tp="S(0)")                          # (88, 64)
        self.up_proj_weight = param("mlp.up_proj.weight", (176, 64), tp="S(0)")                              # (88, 64)
        self.down_proj_weight = param("mlp.down_proj.weight", (64, 176), tp="S(1)")                          # (64, 88)

    def forward(self, inputs_embeds, cos, sin, causal_mask):
        # inputs_embeds (B, T/tp, 64) · cos, sin (1, T, 16) · causal_mask (B, 1, T, T)

        # input_layernorm                                                                   modeling_llama.py:64
        variance = inputs_embeds.pow(2).mean(-1, keepdim=True)                              # (B, T/tp, 1)
        hidden_states = inputs_embeds * torch.rsqrt(variance + 1e-06)                       # (B, T/tp, 64)
        hidden_states = self.input_layernorm_weight * hidden_states

        # self_attn                                                                         modeling_llama.py:243
        hidden_states = all_gather(hidden_states, "tp", dim=1, to="R")                      # (B, T, 64)  tp S(1) -> R
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
        attn_output = F.scaled_dot_product_attention(query_states, key, value, causal_mask, scale=0.25)
        attn_output = attn_output.transpose(1, 2).flatten(2)                                # (B, T, 64/tp)
        attn_output = F.linear(attn_output, self.o_proj_weight)                             # (B, T, 64)  tp P
        attn_output = reduce_scatter(attn_output, "tp", dim=1)  # (B, T/tp, 64)  tp P -> S(1)
        hidden_states = inputs_embeds + attn_output                                         # (B, T/tp, 64)

        # post_attention_layernorm                                                          modeling_llama.py:64
        residual = hidden_states
        variance = hidden_states.pow(2).mean(-1, keepdim=True)                              # (B, T/tp, 1)
        hidden_states = hidden_states * torch.rsqrt(variance + 1e-06)                       # (B, T/tp, 64)
        hidden_states = self.post_attention_layernorm_weight * hidden_states

        # mlp                                                                               modeling_llama.py:164
        hidden_states = all_gather(hidden_states, "tp", dim=1, to="R")                      # (B, T, 64)  tp S(1) -> R
        gate_proj = F.linear(hidden_states, self.gate_proj_weight)                          # (B, T, 176/tp)
        up_proj = F.linear(hidden_states, self.up_proj_weight)
        down_proj = F.linear(F.silu(gate_proj) * up_proj, self.down_proj_weight)            # (B, T, 64)  tp P
        down_proj = reduce_scatter(down_proj, "tp", dim=1)  # (B, T/tp, 64)  tp P -> S(1)
        return residual + down_proj                                                         # (B, T/tp, 64)


class Stage(nn.Module):
    """model.embed_tokens, model.rotary_emb, model.layers.0-1, model.norm, lm_head and the loss"""

    def __init__(self, param):
        super().__init__()
        param = param.typed(dp="S(0) -> R")  # at rest -> in use: gathered over dp per module, the gradient scattered
        self.embed_tokens_weight = param("model.embed_tokens.weight", (256, 64), tp="S(1)")  # (256, 32)
        self.rotary_emb_inv_freq = param.buffer("model.rotary_emb.inv_freq", (8,))           # (8,)
        self.norm_weight = param("model.norm.weight", (64,), tp="I -> R")                    # (64,)
        self.lm_head_weight = param("lm_head.weight", (256, 64), tp="S(0)")                  # (128, 64)
        self.layers = nn.ModuleList(LlamaDecoderLayer(param.scope(f"model.layers.{i}")) for i in range(0, 2))

    def prepare(self, labels):
        """Once per step, on this dp rank's whole batch: num_valid."""
        # loss_function                                                                     loss_utils.py:65
        labels = F.pad(labels, (0, 1), value=-100)                                          # (B, T + 1)

        # cross_entropy                                                                     loss_utils.py:42
        num_valid = (labels[..., 1:].flatten() != -100).sum()                               # ()  dp P
        num_valid = all_reduce(num_valid, "dp")                                             # ()  dp P -> I
        return num_valid

    def forward(self, input_ids, labels, attention_mask, num_valid):
        T = input_ids.shape[1]

        # embed_tokens                                                                      modeling_llama.py:370
        inputs_embeds = F.embedding(input_ids, self.embed_tokens_weight)                    # (B, T, 64/tp)
        position_ids = torch.arange(T, device=input_ids.device)                             # (T,)
        position_ids = position_ids.unsqueeze(0)                                            # (1, T)

        # causal_mask                                                                       masking_utils.py:846
        attention_mask = attention_mask.to(torch.bool)                                      # (B, T)
        q_indices = position_ids.unsqueeze(1)                                               # (1, 1, T)
        mask = q_indices.unsqueeze(2) <= q_indices.unsqueeze(3)                             # (1, 1, T, T)
        causal_mask = mask & attention_mask.unsqueeze(1).unsqueeze(2)                       # (B, 1, T, T)

        # rotary_emb                                                                        modeling_llama.py:111
        freqs = position_ids.unsqueeze(2).to(torch.float32) * self.rotary_emb_inv_freq      # (1, T, 8)
        emb = torch.cat((freqs, freqs), dim=-1)                                             # (1, T, 16)
        cos = emb.cos()
        sin = emb.sin()
        inputs_embeds = all_to_all(inputs_embeds, "tp", split_dim=1, concat_dim=2)  # (B, T/tp, 64)  tp S(2) -> S(1)

        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, cos, sin, causal_mask)                     # (B, T/tp, 64)

        # norm                                                                              modeling_llama.py:64
        variance = hidden_states.pow(2).mean(-1, keepdim=True)                              # (B, T/tp, 1)
        hidden_states = hidden_states * torch.rsqrt(variance + 1e-06)                       # (B, T/tp, 64)
        hidden_states = self.norm_weight * hidden_states

        # lm_head                                                                           modeling_llama.py:468
        hidden_states = all_gather(hidden_states, "tp", dim=1, to="R")                      # (B, T, 64)  tp S(1) -> R
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
        return loss.sum() / num_valid                                                       # ()  tp I · dp P
