"""Stage 0 of 1 of FalconForCausalLM: transformer.word_embeddings, transformer.rotary_emb, transformer.h.0-1,
transformer.ln_f, lm_head and the loss, on ranks 0, 1 of tp=2.

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


class FalconDecoderLayer(nn.Module):
    """transformer.h.0-1"""

    def __init__(self, param):
        super().__init__()
        self.input_layernorm_weight = param("input_layernorm.weight", (64,), tp="I")         # (64,)
        self.input_layernorm_bias = param("input_layernorm.bias", (64,), tp="I")             # (64,)
        self.query_key_value_weight_0 = param(
            "self_attention.query_key_value.weight", (96, 64), segment=(0, 0, 64), tp="S(0)"
        )  # (32, 64)
        self.query_key_value_weight_64 = param(
            "self_attention.query_key_value.weight", (96, 64), segment=(0, 64, 16), tp="I -> R"
        )  # (16, 64)
        self.query_key_value_weight_80 = param(
            "self_attention.query_key_value.weight", (96, 64), segment=(0, 80, 16), tp="I -> R"
        )  # (16, 64)
        self.dense_weight = param("self_attention.dense.weight", (64, 64), tp="S(1)")        # (64, 32)
        self.dense_h_to_4h_weight = param("mlp.dense_h_to_4h.weight", (256, 64), tp="S(0)")  # (128, 64)
        self.dense_4h_to_h_weight = param("mlp.dense_4h_to_h.weight", (64, 256), tp="S(1)")  # (64, 128)

    def forward(self, inputs_embeds, cos, sin):
        # inputs_embeds (B, T, 64) tp I · cos, sin (1, T, 16)

        # input_layernorm                                                                   modeling_falcon.py:585
        attention_layernorm_out = F.layer_norm(
            inputs_embeds, (64,), self.input_layernorm_weight, self.input_layernorm_bias, 1e-05
        )  # (B, T, 64)  tp I

        # self_attention                                                                    modeling_falcon.py:61
        attention_layernorm_out = invariant_to_replicated(attention_layernorm_out, "tp")    # (B, T, 64)  tp I -> R
        fused_qkv = F.linear(attention_layernorm_out, self.query_key_value_weight_0)        # (B, T, 64/tp)
        fused_qkv_2 = F.linear(attention_layernorm_out, self.query_key_value_weight_64)     # (B, T, 16)  tp R
        fused_qkv_3 = F.linear(attention_layernorm_out, self.query_key_value_weight_80)
        query_layer = fused_qkv.unflatten(-1, (-1, 16)).transpose(1, 2)                     # (B, 4/tp, T, 16)
        key_layer = fused_qkv_2.unsqueeze(2).transpose(1, 2)                                # (B, 1, T, 16)  tp R
        cos = cos.unsqueeze(1)                                                              # (1, 1, T, 16)
        sin = sin.unsqueeze(1)
        rotate_half = torch.cat((-query_layer[..., 8:], query_layer[..., :8]), dim=-1)      # (B, 4/tp, T, 16)
        query_layer = query_layer * cos + rotate_half * sin
        rotate_half = torch.cat((-key_layer[..., 8:], key_layer[..., :8]), dim=-1)          # (B, 1, T, 16)  tp R
        key_layer = key_layer * cos + rotate_half * sin
        value_layer = fused_qkv_3.unsqueeze(2).transpose(1, 2)
        attn_output = F.scaled_dot_product_attention(query_layer, key_layer, value_layer, is_causal=True)
        attn_output = attn_output.permute(0, 2, 1, 3).flatten(2)                            # (B, T, 64/tp)
        attn_output = F.linear(attn_output, self.dense_weight)                              # (B, T, 64)  tp P

        # mlp                                                                               modeling_falcon.py:61
        dense_h_to_4h = F.linear(attention_layernorm_out, self.dense_h_to_4h_weight)        # (B, T, 256/tp)
        x = F.gelu(dense_h_to_4h)
        mlp_output = F.linear(x, self.dense_4h_to_h_weight)                                 # (B, T, 64)  tp P
        mlp_output = mlp_output + attn_output
        mlp_output = all_reduce(mlp_output, "tp")                                           # (B, T, 64)  tp P -> I

        # dropout_add                                                                       modeling_falcon.py:196
        return inputs_embeds + mlp_output                                                   # (B, T, 64)  tp I


class Stage(nn.Module):
    """transformer.word_embeddings, transformer.rotary_emb, transformer.h.0-1, transformer.ln_f, lm_head and
    the loss"""

    def __init__(self, param):
        super().__init__()
        self.word_embeddings_weight = param("transformer.word_embeddings.weight", (256, 64), tp="S(0)")  # (128, 64)
        self.rotary_emb_inv_freq = param.buffer("transformer.rotary_emb.inv_freq", (8,))                 # (8,)
        self.ln_f_weight = param("transformer.ln_f.weight", (64,), tp="I")                               # (64,)
        self.ln_f_bias = param("transformer.ln_f.bias", (64,), tp="I")                                   # (64,)
        self.h = nn.ModuleList(FalconDecoderLayer(param.scope(f"transformer.h.{i}")) for i in range(0, 2))

    def forward(self, input_ids, labels):
        T = input_ids.shape[1]

        # word_embeddings                                                                   modeling_falcon.py:731
        start, stop = shard_range(256, "tp")
        elsewhere = (input_ids < start) | (input_ids >= stop)                               # (B, T)
        rows = (input_ids - start).masked_fill(elsewhere, 0)
        inputs_embeds = F.embedding(rows, self.word_embeddings_weight)                      # (B, T, 64)  tp P
        inputs_embeds = inputs_embeds.masked_fill(elsewhere.unsqueeze(-1), 0)
        position_ids = torch.arange(T, device=input_ids.device)                             # (T,)

        # rotary_emb                                                                        modeling_falcon.py:141
        freqs = position_ids.unsqueeze(0).unsqueeze(2).to(torch.float32) * self.rotary_emb_inv_freq  # (1, T, 8)
        emb = torch.cat((freqs, freqs), dim=-1)                                             # (1, T, 16)
        cos = emb.cos()
        sin = emb.sin()

        # word_embeddings                                                                   modeling_falcon.py:731
        inputs_embeds = all_reduce(inputs_embeds, "tp")                                     # (B, T, 64)  tp P -> I

        # dropout_add                                                                       modeling_falcon.py:196

        hidden_states = inputs_embeds
        for block in self.h:
            hidden_states = block(hidden_states, cos, sin)                                  # (B, T, 64)  tp I

        # ln_f                                                                              modeling_falcon.py:806
        hidden_states = F.layer_norm(hidden_states, (64,), self.ln_f_weight, self.ln_f_bias, 1e-05)

        # lm_head                                                                           modeling_falcon.py:893
        hidden_states = invariant_to_replicated(hidden_states, "tp")                        # (B, T, 64)  tp I -> R
        lm_logits = F.linear(hidden_states, self.word_embeddings_weight)                    # (B, T, 256/tp)

        # loss_function                                                                     loss_utils.py:65
        labels = F.pad(labels, (0, 1), value=-100)                                          # (B, T + 1)
        logits = lm_logits.flatten(0, 1)                                                    # (B*T, 256/tp)
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
        return loss.sum() / (shift_labels != -100).sum()                                    # ()  tp I
