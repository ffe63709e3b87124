"""A model with every kind of dropout and noise that a program can have."""

import torch
from torch import nn
from torch.nn import functional as F

WIDTH = 12


class NoisyLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.2, inplace=True)
        self.features = nn.Dropout1d(0.25)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.up(self.norm(x))) * torch.empty(4 * WIDTH).uniform_(0.9, 1.1)
        hidden = self.dropout(F.alpha_dropout(hidden, 0.1, training=self.training))
        hidden = self.features(hidden) + 0.1 * torch.randn_like(hidden) * torch.bernoulli(torch.sigmoid(hidden))
        kept = x.new_empty((x.shape[0], 1, 1)).bernoulli_(0.75)
        return x + self.down(hidden) * kept  # type: ignore[no-any-return]


class Noisy(nn.Module):
    """The loss of (B, 4, 12) features against (B,) targets."""

    def __init__(self, num_layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(NoisyLayer() for _ in range(num_layers))
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            features = layer(features)
        F.dropout(features, 0.5)  # nobody reads it, and yet torch draws it
        features = features * (0.9 + torch.rand(features.shape[0], 4, 1, dtype=features.dtype)).floor_()
        features = features + self.attention(features, features, features, need_weights=False)[0]
        features = F.feature_alpha_dropout(features, 0.2, training=self.training)
        noise = torch.normal(0.0, 0.5, (4, 1)) + torch.empty_like(targets).normal_(1.0, 0.1)[:, None, None]
        return (self.head(features + noise).mean(dim=(1, 2)) - targets).pow(2).mean()  # type: ignore[no-any-return]


def build(num_layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return Noisy(num_layers)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "features": torch.randn(12, 4, WIDTH, generator=generator),
        "targets": torch.randn(12, generator=generator),
    }
