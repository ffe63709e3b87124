"""Stage 0 of 1 of GPT2LMHeadModel: transformer.wte, transformer.wpe, transformer.h.0-1, transformer.ln_f, lm_head and
the loss, on ranks 0, 1 of tp=2.

The margin shows what a line assigns on this rank, its shape and type; a line without is like the one above.
  B, T     sequences and tokens of one microbatch of one dp rank
  192/tp   split: each tp rank has its piece of the 192
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


class GPT2Block(nn.Module):
    """transformer.h.0-1"""

    def __init__(self, param):
        super().__init__()
        self.ln_1_weight = param("ln_1.weight", (64,), tp="I")                      # (64,)
        self.ln_1_bias = param("ln_1.bias", (64,), tp="I")                          # (64,)
        self.c_attn_weight = param("attn.c_attn.weight", (64, 192), tp="S(1/3)")    # (64, 96)
        self.c_attn_bias = param("attn.c_attn.bias", (192,), tp="S(0/3)")           # (96,)
        self.attn_c_proj_weight = param("attn.c_proj.weight", (64, 64), tp="S(0)")  # (32, 64)
        self.attn_c_proj_bias = param("attn.c_proj.bias", (64,), tp="I")            # (64,)
        self.ln_2_weight = param("ln_2.weight", (64,), tp="I")                      # (64,)
        self.ln_2_bias = param("ln_2.bias", (64,), tp="I")                          # (64,)
        self.c_fc_weight = param("mlp.c_fc.weight", (64, 256), tp="S(1)")           # (64, 128)
        self.c_fc_bias = param("mlp.c_fc.bias", (256,), tp="S(0)")                  # (128,)
        self.mlp_c_proj_weight = param("mlp.c_proj.weight", (256, 64), tp="S(0)")   # (128, 64)
        self.mlp_c_proj_bias = param("mlp.c_proj.bias", (64,), tp="I")              # (64,)

    def forward(self, hidden_states):
        # hidden_states (B, T, 64) tp I

        # ln_1                                                                              modeling_gpt2.py:273
        residual = hidden_states                                                            # (B, T, 64)  tp I
        hidden_states = F.layer_norm(hidden_states, (64,), self.ln_1_weight, self.ln_1_bias, 1e-05)  # (B, T, 64)  tp I

        # attn                                                                              pytorch_utils.py:119
        hidden_states = invariant_to_replicated(hidden_states, "tp")                        # (B, T, 64)  tp I -> R
        c_attn = hidden_states @ self.c_attn_weight + self.c_attn_bias                      # (B, T, 192/tp)
        query_states, key_states, value_states = c_attn.chunk(3, dim=2)                     # (B, T, 64/tp)
        query_states = query_states.unflatten(-1, (-1, 16)).transpose(1, 2)                 # (B, 4/tp, T, 16)
        value_states = value_states.unflatten(-1, (-1, 16)).transpose(1, 2)
        key_states = key_states.unflatten(-1, (-1, 16)).transpose(1, 2)
        attn_output = F.scaled_dot_product_attention(query_states, key_states, value_states, scale=0.25, is_causal=True)
        attn_output = attn_output.transpose(1, 2).flatten(2)                                # (B, T, 64/tp)
        attn_output = attn_output @ self.attn_c_proj_weight                                 # (B, T, 64)  tp P
        attn_output = all_reduce(attn_output, "tp")                                         # (B, T, 64)  tp P -> I
        attn_output = attn_output + self.attn_c_proj_bias                                   # (B, T, 64)  tp I
        hidden_states = attn_output + residual

        # ln_2                                                                              modeling_gpt2.py:304
        residual = hidden_states
        hidden_states = F.layer_norm(hidden_states, (64,), self.ln_2_weight, self.ln_2_bias, 1e-05)

        # mlp                                                                               pytorch_utils.py:119
        hidden_states = invariant_to_replicated(hidden_states, "tp")                        # (B, T, 64)  tp I -> R
        hidden_states = hidden_states @ self.c_fc_weight + self.c_fc_bias                   # (B, T, 256/tp)
        tanh = torch.tanh((hidden_states + hidden_states.pow(3.0) * 0.044715) * 0.7978845608028654)
        hidden_states_2 = tanh + 1.0
        hidden_states = hidden_states * 0.5 * hidden_states_2
        hidden_states = hidden_states @ self.mlp_c_proj_weight                              # (B, T, 64)  tp P
        hidden_states = all_reduce(hidden_states, "tp")                                     # (B, T, 64)  tp P -> I
        hidden_states = hidden_states + self.mlp_c_proj_bias                                # (B, T, 64)  tp I
        return residual + hidden_states                                                     # (B, T, 64)  tp I


class Stage(nn.Module):
    """transformer.wte, transformer.wpe, transformer.h.0-1, transformer.ln_f, lm_head and the loss"""

    def __init__(self, param):
        super().__init__()
        self.wte_weight = param("transformer.wte.weight", (256, 64), tp="S(0)")  # (128, 64)
        self.wpe_weight = param("transformer.wpe.weight", (64, 64), tp="S(0)")   # (32, 64)
        self.ln_f_weight = param("transformer.ln_f.weight", (64,), tp="I")       # (64,)
        self.ln_f_bias = param("transformer.ln_f.bias", (64,), tp="I")           # (64,)
        self.h = nn.ModuleList(GPT2Block(param.scope(f"transformer.h.{i}")) for i in range(0, 2))

    def forward(self, input_ids, labels):
        T = input_ids.shape[1]

        # wte                                                                               modeling_gpt2.py:567
        start, stop = shard_range(256, "tp")
        elsewhere = (input_ids < start) | (input_ids >= stop)                               # (B, T)
        rows = (input_ids - start).masked_fill(elsewhere, 0)
        inputs_embeds = F.embedding(rows, self.wte_weight)                                  # (B, T, 64)  tp P
        inputs_embeds = inputs_embeds.masked_fill(elsewhere.unsqueeze(-1), 0)
        position_ids = torch.arange(T, device=input_ids.device)                             # (T,)
        position_ids = position_ids.unsqueeze(0)                                            # (1, T)

        # wpe                                                                               modeling_gpt2.py:574
        start, stop = shard_range(64, "tp")
        elsewhere = (position_ids < start) | (position_ids >= stop)
        rows = (position_ids - start).masked_fill(elsewhere, 0)
        position_embeds = F.embedding(rows, self.wpe_weight)                                # (1, T, 64)  tp P
        position_embeds = position_embeds.masked_fill(elsewhere.unsqueeze(-1), 0)
        hidden_states = inputs_embeds + position_embeds                                     # (B, T, 64)  tp P
        hidden_states = all_reduce(hidden_states, "tp")                                     # (B, T, 64)  tp P -> I

        for block in self.h:
            hidden_states = block(hidden_states)                                            # (B, T, 64)  tp I

        # ln_f                                                                              modeling_gpt2.py:617
        hidden_states = F.layer_norm(hidden_states, (64,), self.ln_f_weight, self.ln_f_bias, 1e-05)

        # lm_head                                                                           modeling_gpt2.py:695
        hidden_states = invariant_to_replicated(hidden_states, "tp")                        # (B, T, 64)  tp I -> R
        logits = F.linear(hidden_states, self.wte_weight)                                   # (B, T, 256/tp)

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
        return loss.sum() / (shift_labels != -100).sum()                                    # ()  tp I
