"""A mask becomes is_causal=True exactly when it is causal."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from meshwright.compiler.capture import capture
from tests import models

aten = torch.ops.aten


class Attention(nn.Module):
    """Attention under a mask that is made from the length alone."""

    def __init__(self, mask: Callable[[int], torch.Tensor]):
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.mask = mask

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        y = self.project(x).unsqueeze(1)
        out = nn.functional.scaled_dot_product_attention(y, y, y, attn_mask=self.mask(tokens.shape[1]))
        return out.pow(2).mean()


def _attention_of(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.fx.Node:
    graph = capture(module, batch).function.graph
    return next(n for n in graph.nodes if n.target is aten.scaled_dot_product_attention.default)  # type: ignore[no-any-return]


def _is_flagged(mask: Callable[[int], torch.Tensor]) -> bool:
    node = _attention_of(Attention(mask), {"x": torch.randn(4, 6, 8), "tokens": torch.zeros(4, 6, dtype=torch.int64)})
    return node.kwargs.get("is_causal") is True and len(node.args) == 3


def _grid(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(length)[:, None], torch.arange(length)[None, :]


CAUSAL: dict[str, Callable[[int], torch.Tensor]] = {
    "key <= query": lambda n: _grid(n)[1] <= _grid(n)[0],
    "query >= key": lambda n: _grid(n)[0] >= _grid(n)[1],
    "key < query + 1": lambda n: _grid(n)[1] < _grid(n)[0] + 1,
    "and with ones": lambda n: torch.ones(n, n, dtype=torch.bool) & (_grid(n)[1] <= _grid(n)[0]),
}


def _packed(start: int) -> Callable[[int], torch.Tensor]:
    """The mask of one packed sequence: a position that does not follow its neighbour begins another sequence."""

    def mask(length: int) -> torch.Tensor:
        positions = torch.arange(length).unsqueeze(0)
        breaks = torch.diff(positions, prepend=positions[:, :1] - start, dim=-1) != 1
        sequence = breaks.cumsum(-1)
        same = sequence[:, :, None] == sequence[:, None, :]
        return same & (_grid(length)[1] <= _grid(length)[0])

    return mask


CAUSAL["one packed sequence"] = _packed(1)

OTHER: dict[str, Callable[[int], torch.Tensor]] = {
    "strictly before": lambda n: _grid(n)[1] < _grid(n)[0] + 0,
    "key >= query": lambda n: _grid(n)[1] >= _grid(n)[0],
    "window": lambda n: (_grid(n)[1] <= _grid(n)[0]) & (_grid(n)[1] > _grid(n)[0] - 3),
    "one ahead": lambda n: _grid(n)[1] <= _grid(n)[0] + 1,
    "everything": lambda n: torch.ones(n, n, dtype=torch.bool),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_mask_is_proven(name: str) -> None:
    mask = CAUSAL[name](7)
    assert torch.equal(mask.reshape(7, 7), torch.ones(7, 7).tril().bool())
    assert _is_flagged(CAUSAL[name])


@pytest.mark.parametrize("name", OTHER)
def test_other_masks_stay(name: str) -> None:
    assert not torch.equal(OTHER[name](7), torch.ones(7, 7).tril().bool())
    assert not _is_flagged(OTHER[name])


def test_packed_form_of_transformers() -> None:
    model: Any = models.build("llama")
    model.config.use_cache = False  # then Transformers looks for packed sequences in the positions  # type: ignore[union-attr]
    node = _attention_of(model, models.batch("llama", "plain"))
    assert node.kwargs.get("is_causal") is True


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_transformers_masks(name: str) -> None:
    node = _attention_of(models.build(name), models.batch(name, "plain"))
    assert node.kwargs.get("is_causal") is True and len(node.args) == 3
    node = _attention_of(models.build(name), models.batch(name, "padded"))
    assert not node.kwargs.get("is_causal") and len(node.args) == 4
