"""Small models for the tests, with batches that are hard on exactness, rebuilt the same in every process."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

Batch = dict[str, torch.Tensor]
VOCABULARY = 256


class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.up(self.norm(features)))
        return features + self.down(hidden)  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, width: int = 12, num_layers: int = 2):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(num_layers))
        self.head = nn.Linear(width, 1)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            features = layer(features)
        predictions = self.scale * self.head(features).squeeze(-1)
        return (predictions - targets).pow(2).mean()  # type: ignore[no-any-return]


def mlp(num_layers: int = 4) -> nn.Module:
    return MLP(num_layers=num_layers)


def llama(num_layers: int = 2, kv: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=kv,
        )  # fmt: skip
    )


def gpt2(num_layers: int = 2) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=64,
            n_layer=num_layers,
            n_head=4,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )  # fmt: skip
    )


def falcon(num_layers: int = 2, new: bool = False) -> nn.Module:
    from transformers import FalconConfig, FalconForCausalLM

    return FalconForCausalLM(
        FalconConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            new_decoder_architecture=new,
            num_kv_heads=2 if new else None,
        )  # fmt: skip
    )


def falcon_new(num_layers: int = 2) -> nn.Module:
    return falcon(num_layers, new=True)


MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "llama": llama,
    "gpt2": gpt2,
    "falcon": falcon,
    "falcon_new": falcon_new,
}


def build(name: str, num_layers: int | None = None) -> nn.Module:
    """A model with every parameter random: zero biases and unit norms would hide errors."""
    torch.manual_seed(0)
    model = MODELS[name]() if num_layers is None else MODELS[name](num_layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if parameter.ndim == 1 else 0.0) * 0.5)
    return model


def batch(name: str, kind: str = "uneven", size: int = 12, length: int = 16) -> Batch:
    """A global batch. kind: "uneven" labels (one row without any), "padded" adds an attention mask, "plain"."""
    generator = torch.Generator().manual_seed(1)
    if name == "mlp":
        return {
            "features": torch.randn(size, 12, generator=generator),
            "targets": torch.randn(size, generator=generator),
        }
    tokens = torch.randint(VOCABULARY, (size, length), generator=generator)
    labels = tokens.clone()
    if kind != "plain":
        labels[torch.rand(labels.shape, generator=generator) < 0.4] = -100
        labels[3] = -100
    result = {"input_ids": tokens, "labels": labels}
    if kind == "padded":
        mask = torch.ones_like(tokens)
        mask[1, :5] = mask[5, 12:] = mask[6, :9] = 0
        result["attention_mask"] = mask
    return result
