"""Small models that are hard on exactness, each for one reason, with the batch to train on."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, VOCABULARY, LENGTH, SIZE = 8, 20, 6, 8
Batch = dict[str, Any]


class Layer(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=bias)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Model(nn.Module):
    """Embedding, four layers, head; what is hard comes in subclasses."""

    def __init__(self, num_layers: int = 4, vocabulary: int = VOCABULARY):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(num_layers))
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return x  # type: ignore[no-any-return]

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.hidden(tokens))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class StopGradient(Model):
    """A detach, and a no-grad region, on products without bias; a matrix that is read there alone has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.hidden(tokens)
        logits: torch.Tensor = self.head(x)
        with torch.no_grad():
            target = (self.head(x * 2.0) + self.teacher(x)).softmax(-1)
        distance = (logits.softmax(-1) - target).pow(2).mean()
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + distance + (logits * logits.detach()).mean()
        return total  # type: ignore[no-any-return]


class Detached(Model):
    """Parameters that the loss depends on through a detach alone: no gradient, so no weight decay either."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Linear(WIDTH, WIDTH)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        x = super().hidden(tokens)
        return x * torch.sigmoid(self.aside(x)).detach()


class Weighted(Model):
    """A weight for each token, normalized over the global batch, and two losses added."""

    def forward(  # type: ignore[override]
        self, tokens: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        logits = self.head(self.hidden(tokens))
        chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return -(chosen * weights).sum() / weights.sum() + 0.1 * logits.pow(2).mean()  # type: ignore[no-any-return]


class ClassWeights(Model):
    """Cross entropy with class weights and label smoothing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.linspace(0.5, 2.0, VOCABULARY))

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.hidden(tokens)).flatten(0, 1)
        assert isinstance(self.weights, torch.Tensor)
        return F.cross_entropy(logits, labels.flatten(), weight=self.weights, label_smoothing=0.1)


class Frozen(Model):
    """Frozen parameters, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed.weight.requires_grad_(False)
        self.layers[1].up.weight.requires_grad_(False)  # type: ignore[union-attr]
        self.layers[2].requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))


class Tied(Model):
    """The embedding is the head, over all stages, and two layers share a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight
        self.layers[3].up.weight = self.layers[0].up.weight  # type: ignore[union-attr]


class TwiceInABlock(Model):
    """One weight at two sites of every block, and one parameter that all stages use."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(layer(x)) * self.scale + torch.tanh(self.mix(self.mix(x)))
        return x  # type: ignore[no-any-return]


class Skips(Model):
    """Values of the first layers used after the last, a mask and indices made from data among them."""

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        first = self.embed(tokens)
        x = second = self.layers[0](first)
        chosen = second.argmax(-1)
        large = second > 0.1
        for layer in self.layers[1:]:
            x = layer(x)
        x = torch.where(large, x, first * second)
        return x + F.one_hot(chosen, WIDTH).to(x.dtype) * second.mean(-1, keepdim=True)  # type: ignore[no-any-return]


class OddSizes(Model):
    """Dims that two ranks cannot halve: 7 heads, 21 words."""

    def __init__(self) -> None:
        super().__init__(vocabulary=21)
        self.query = nn.Linear(WIDTH, 21)
        self.out = nn.Linear(21, WIDTH)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        x = super().hidden(tokens)
        heads = self.query(x).unflatten(-1, (7, 3)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class UnevenSkip(Model):
    """A value of 7 features on its way from the first layer to the last, over all stages."""

    def __init__(self) -> None:
        super().__init__()
        self.note, self.recall = nn.Linear(WIDTH, 7), nn.Linear(7, WIDTH)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        noted = torch.tanh(self.note(x))
        for layer in self.layers:
            x = layer(x)
        return x + self.recall(noted)  # type: ignore[no-any-return]


class Buffers(Model):
    """A buffer that is read, a table of positions, and constants made in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.linspace(-1, 1, 2 * LENGTH * WIDTH).view(2 * LENGTH, WIDTH))
        self.register_buffer("decay", torch.linspace(0, 1, WIDTH), persistent=False)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.positions, torch.Tensor) and isinstance(self.decay, torch.Tensor)
        x = super().hidden(tokens) + self.positions[: tokens.shape[1]]
        ramp = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(-1)
        return x * self.decay + torch.ones_like(x) * ramp


class Scattered(Model):
    """Writes in place: shifted tokens, rows replaced where a mask says so, a running sum."""

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        shifted = tokens.new_zeros(tokens.shape)
        shifted[:, 1:] = tokens[:, :-1].clone()
        shifted[:, 0] = 1
        x = self.hidden(shifted)
        x = x.clone()
        x[:, 0] += 1.0
        x.masked_fill_((tokens == 3).unsqueeze(-1), 0.5)
        return F.cross_entropy(self.head(x.cumsum(1)).flatten(0, 1), labels.flatten())


class Reductions(Model):
    """Losses that are summed, averaged over all elements or divided by the size of the batch, and with soft targets."""

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.hidden(tokens))
        rows = logits.flatten(0, 1)
        soft = rows.detach().roll(1, -1).softmax(-1)
        total = F.cross_entropy(rows, soft) + F.kl_div(rows.log_softmax(-1), soft, reduction="batchmean")
        total = total + F.binary_cross_entropy_with_logits(rows, soft) + 0.1 * logits.square().sum() / logits.shape[0]
        return total + 0.01 * F.smooth_l1_loss(rows, torch.zeros_like(rows), reduction="sum", beta=0.5)


class Contrastive(nn.Module):
    """Every sample against every other of the global batch."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b = F.normalize(self.left(x), dim=-1), F.normalize(self.right(y), dim=-1)
        scores = a @ b.t()
        truth = torch.arange(x.shape[0], device=x.device)
        return (F.cross_entropy(scores, truth) + F.cross_entropy(scores.t(), truth)) / 2


class Mixed(nn.Module):
    """What all samples give together goes on through weights, beside a penalty on a weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        together = torch.tanh(self.up(x).mean(0))
        apart = (self.down(together) - self.up(y)).pow(2).mean()
        return apart + torch.tanh(self.down(together)).sum() + 0.1 * self.up.weight.pow(2).sum()  # type: ignore[no-any-return]


class Composite(Model):
    """Losses that torch composes of other operators."""

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.hidden(tokens)
        near = F.triplet_margin_loss(x, x.roll(1, 1) * 0.5, x.flip(1))
        logits = self.head(x).flatten(0, 1)
        product = torch.tensordot(x, self.head.weight, ([2], [1]))
        logarithms = logits.log_softmax(-1).view(*labels.shape, -1).transpose(1, 2)
        every = F.cross_entropy(logits, labels.flatten(), reduction="none")
        return near + F.nll_loss(logarithms, labels) + product.pow(2).mean() + (every * every).mean()  # type: ignore[no-any-return]


class Divisors(Model):
    """Means of the inputs alone, and sizes of the batch, as divisors."""

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.hidden(tokens)).flatten(0, 1)
        valid = labels != -100
        every = F.cross_entropy(logits, labels.flatten(), reduction="none")
        mean = every.sum() / valid.to(logits.dtype).mean() / tokens.numel()
        return mean + logits.tanh().sum() / tokens.shape[0]  # type: ignore[no-any-return]


class Complex(nn.Module):
    """A Fourier transform and complex products."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = torch.view_as_complex(self.first(x).unflatten(-1, (-1, 2)))
        z = torch.fft.ifft(torch.fft.fft(z, dim=-1) * torch.exp(1j * z.angle()), dim=-1)
        return (self.second(z.abs()) - y).pow(2).mean()  # type: ignore[no-any-return]


def _tokens(size: int = SIZE, vocabulary: int = VOCABULARY) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocabulary, (size, LENGTH), generator=generator)
    labels = torch.randint(vocabulary, (size, LENGTH), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    labels[: size // 2] = -100  # the first of two replicas, and of two microbatches, has nothing to learn
    labels[0, 0] = 4 if size == 2 else -100
    return {"tokens": tokens, "labels": labels}


def _vectors() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(SIZE, WIDTH, generator=generator), "y": torch.randn(SIZE, WIDTH, generator=generator)}


HARD: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "nothing to learn": (Model, _tokens),
    "stop gradient": (StopGradient, _tokens),
    "detached": (Detached, _tokens),
    "weighted": (Weighted, lambda: {**_tokens(), "weights": torch.rand(SIZE, LENGTH)}),
    "class weights": (ClassWeights, _tokens),
    "frozen": (Frozen, _tokens),
    "tied": (Tied, _tokens),
    "twice in a block": (TwiceInABlock, _tokens),
    "skips": (Skips, _tokens),
    "odd sizes": (OddSizes, lambda: _tokens(vocabulary=21)),
    "uneven skip": (UnevenSkip, _tokens),
    "buffers": (Buffers, _tokens),
    "scattered": (Scattered, _tokens),
    "reductions": (Reductions, _tokens),
    "contrastive": (Contrastive, _vectors),
    "mixed": (Mixed, _vectors),
    "composite": (Composite, _tokens),
    "complex": (Complex, _vectors),
    "divisors": (Divisors, _tokens),
}
"""Name -> how to build the model and the batch."""


def build(name: str) -> nn.Module:
    """A model with every parameter random."""
    torch.manual_seed(0)
    model = HARD[name][0]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim < 2) * 0.5)
    return model


def batch(name: str) -> Batch:
    """The global batch."""
    torch.manual_seed(2)
    return HARD[name][1]()
