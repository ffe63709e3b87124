"""Small models that write to buffers in forward, each for one reason, with the batch to train on."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

SIZE, WIDTH, LENGTH, CLASSES = 8, 4, 6, 4
Batch = dict[str, Any]


class Classifier(nn.Module):
    """Layers on sequences (samples, channels, length), a mean over the length and a head."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x.mean(-1)), y)


class Layer(nn.Module):
    """A convolution and a normalization with a skip over both."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.norm(self.conv(x)))


def _stack(**options: Any) -> Classifier:
    return Classifier(*(Layer(nn.BatchNorm1d(WIDTH, **options)) for _ in range(4)))


def _frozen() -> nn.Module:
    """Fine-tuning: some batch norms stay in eval mode inside a model in training mode."""
    model = _stack()
    for layer in model.layers[1:3]:
        layer.get_submodule("norm").eval()
    return model


class EveryKind(nn.Module):
    """Batch norms of one to three dims, and of vectors; one of them is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Sequential(nn.Conv3d(2, WIDTH, 2), nn.BatchNorm3d(WIDTH, momentum=0.3))
        self.image = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 2), nn.SyncBatchNorm(WIDTH, eps=1e-3))
        self.vector = nn.BatchNorm1d(WIDTH, momentum=None)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        volume = self.volume(x.view(-1, 2, 2, 2, 3))
        image = self.image(volume.squeeze(2).expand(-1, -1, 2, -1))
        first = self.vector(image.mean((2, 3)))
        return F.cross_entropy(self.head(self.vector(first * first)), y)


class Averages(nn.Module):
    """Running averages and counters, written in every way that models have."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(LENGTH, LENGTH) for _ in range(3))
        self.head = nn.Linear(LENGTH, CLASSES)
        self.level: torch.Tensor = nn.Buffer(torch.full((LENGTH,), 0.5))
        self.total: torch.Tensor = nn.Buffer(torch.tensor(1.0))
        self.table: torch.Tensor = nn.Buffer(torch.linspace(-1, 1, 3 * LENGTH).view(3, LENGTH))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x[:, 0]
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        x = x * self.level  # as it was
        if self.training:
            self.level = 0.9 * self.level + 0.1 * x.mean(0).detach()
            self.total.mul_(0.5).add_(x.detach().pow(2).sum())
            with torch.no_grad():
                self.table[1] = x.amax(0)
        return F.cross_entropy(self.head(x), y)


class Counters(nn.Module):
    """What is counted does not depend on activations, so that several microbatches are no hindrance."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(LENGTH, LENGTH) for _ in range(3))
        self.head = nn.Linear(LENGTH, CLASSES)
        self.steps: torch.Tensor = nn.Buffer(torch.tensor(3))
        self.seen: torch.Tensor = nn.Buffer(torch.tensor(0))
        self.mean_weight: torch.Tensor = nn.Buffer(torch.zeros(LENGTH, LENGTH))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x[:, 0] * (1 + 1 / self.steps.to(x.dtype))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        loss = F.cross_entropy(self.head(x), y) * (1 + 1 / self.steps.to(x.dtype))
        if self.training:
            with torch.no_grad():
                self.mean_weight.lerp_(self.get_parameter("layers.0.weight"), 0.25)
            self.seen.add_((y > 1).sum())
            self.steps += 1
        return loss


def batch() -> Batch:
    """The global batch: samples differ in level, so that pieces have other statistics than the whole."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SIZE, WIDTH, LENGTH, generator=generator)
    return {"x": x + torch.arange(SIZE).view(-1, 1, 1), "y": torch.randint(CLASSES, (SIZE,), generator=generator)}


WRITTEN: Mapping[str, Callable[[], nn.Module]] = {
    "stack": _stack,
    "average of all": lambda: _stack(momentum=None),
    "not affine": lambda: _stack(affine=False),
    "not tracking": lambda: _stack(track_running_stats=False),
    "frozen": _frozen,
    "every kind": EveryKind,
    "averages": Averages,
    "counters": Counters,
}
"""Name -> how to build the model."""


def build(name: str) -> nn.Module:
    """A model in training mode with every parameter and running statistic random."""
    torch.manual_seed(0)
    model = WRITTEN[name]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim < 2) * 0.5)
        for path, buffer in model.named_buffers():
            if path.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model
