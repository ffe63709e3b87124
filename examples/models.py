"""The small models that the examples compile."""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class MLP(nn.Module):
    """Residual layers and a mean squared error: the least model that every kind of parallelism shows on."""

    def __init__(self, width: int = 64, num_layers: int = 4):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(num_layers))
        self.head = nn.Linear(width, 1)

    def forward(self, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            features = layer(features)
        predictions = self.head(features).squeeze(-1)
        return (predictions - targets).pow(2).mean()


class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.up(self.norm(features)))
        return features + self.down(hidden)


def mlp() -> tuple[nn.Module, dict[str, Any]]:
    """An MLP and a batch of 16 samples."""
    torch.manual_seed(0)
    return MLP(), {"features": torch.randn(16, 64), "targets": torch.randn(16)}


def llama() -> tuple[nn.Module, dict[str, Any]]:
    """A Llama of 4 layers for bytes, and a batch of 8 sequences of 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    tokens = torch.randint(256, (8, 64))
    return LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}
