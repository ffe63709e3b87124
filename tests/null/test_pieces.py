"""Operators computed in pieces, proven by brute force: every rank's lines against one device, gradients included."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from meshwright import Plan, PlanError
from meshwright.compiler.text import function_text
from tests.null.passes import Model, check_exact, parameter, same, typed

VOCABULARY, TOKENS, WIDTH = 12, 8, 4
X = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
EVERY_PIECE = torch.tensor([0, 2, 3, 5, 6, 8, 9, 11])
"""Labels at the first and the last class of every piece of four ranks (and so of two)."""
CUT = Plan(pins={"weight": {"tp": "S(0)"}})


def _loss(**options: Any) -> nn.Module:
    """A head over the classes with a bias, and the loss of its logits."""

    def run(self: Any, x: torch.Tensor, labels: torch.Tensor) -> Any:
        return F.cross_entropy(F.linear(x, self.weight) + self.bias, labels, **options)

    return Model(run, weight=parameter(VOCABULARY, WIDTH), bias=parameter(VOCABULARY))


def _table(run: Any) -> nn.Module:
    return Model(run, weight=parameter(VOCABULARY, WIDTH), scale=parameter(WIDTH))


def _is_cut(blocks: Any) -> bool:
    return "shard_range(12, 'tp')" in function_text(blocks.main)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({}, EVERY_PIECE),
        ({}, EVERY_PIECE.where(EVERY_PIECE % 3 != 2, -100)),
        ({}, torch.full((TOKENS,), 7).where(EVERY_PIECE > 8, -100)),
        ({"ignore_index": 3}, EVERY_PIECE),
        ({"ignore_index": 0}, torch.zeros(TOKENS, dtype=torch.int64).where(EVERY_PIECE < 6, 11)),
        ({"ignore_index": -1}, EVERY_PIECE.where(EVERY_PIECE < 9, -1)),
        ({"reduction": "sum"}, EVERY_PIECE.where(EVERY_PIECE > 0, -100)),
        ({"reduction": "sum"}, torch.full((TOKENS,), -100)),
    ],
    ids=["every piece", "some ignored", "one class", "a class", "the first class", "below zero", "sum", "none valid"],
)
def test_loss_over_pieces_of_the_classes(ranks: int, options: dict[str, Any], labels: torch.Tensor) -> None:
    assert _is_cut(check_exact(_loss(**options), (X, labels), CUT, tp=ranks))


def test_loss_over_pieces_of_classes_and_batch() -> None:
    labels = EVERY_PIECE.where(EVERY_PIECE != 2, -100)
    assert _is_cut(check_exact(_loss(), (X, labels), CUT, dp=2, mb=2, tp=2))


@pytest.mark.parametrize("sizes", [{"tp": 4}, {"dp": 2, "mb": 2, "tp": 2}])
def test_loss_with_classes_in_the_middle(sizes: dict[str, int]) -> None:
    def run(self: Any, tokens: torch.Tensor, labels: torch.Tensor) -> Any:
        features = F.embedding(tokens, self.weight) * self.scale
        return F.cross_entropy(F.linear(features, self.weight).transpose(1, 2), labels)

    labels = EVERY_PIECE.where(EVERY_PIECE != 6, -100).view(4, 2)
    assert _is_cut(check_exact(_table(run), (EVERY_PIECE.view(4, 2), labels), CUT, **sizes))


@pytest.mark.parametrize("size", [1e4, -1e4, 700.0])
def test_large_logits_do_not_overflow(size: float) -> None:
    model: Any = _loss()
    with torch.no_grad():
        model.bias[VOCABULARY // 2] = size
    assert _is_cut(check_exact(model, (X, EVERY_PIECE), CUT, tp=4))


@pytest.mark.xfail(strict=True, reason="the gradient of a logsumexp over a piece of -inf alone is NaN")
@pytest.mark.parametrize("ranks", [2, 4])
def test_classes_without_probability(ranks: int) -> None:
    """All classes of the last pieces are masked out, as padded vocabularies do: no rank gives NaN."""
    banned = torch.zeros(VOCABULARY)
    banned[VOCABULARY // 2 :] = -torch.inf

    def run(self: Any, x: torch.Tensor, labels: torch.Tensor) -> Any:
        return F.cross_entropy(F.linear(x, self.weight) + self.banned, labels)

    model = Model(run, weight=parameter(VOCABULARY, WIDTH), banned=nn.Buffer(banned))
    assert _is_cut(check_exact(model, (X, EVERY_PIECE % 6), CUT, tp=ranks))


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(
    "tokens",
    [EVERY_PIECE.view(4, 2), torch.full((4, 2), 5), EVERY_PIECE, EVERY_PIECE.view(2, 2, 2)],
    ids=["every piece", "one row often", "1d", "3d"],
)
def test_rows_of_a_table_in_pieces(ranks: int, tokens: torch.Tensor) -> None:
    model = _table(lambda self, tokens: (F.embedding(tokens, self.weight) * self.scale).cos().sum())
    assert _is_cut(check_exact(model, (tokens,), CUT, tp=ranks))


def test_rows_of_a_table_in_pieces_of_the_batch() -> None:
    model = _table(lambda self, tokens: (F.embedding(tokens, self.weight) * self.scale).cos().sum())
    assert _is_cut(check_exact(model, (EVERY_PIECE.view(4, 2),), CUT, dp=2, mb=2, tp=2))


def test_a_table_that_is_also_the_head() -> None:
    def run(self: Any, tokens: torch.Tensor, labels: torch.Tensor) -> Any:
        features = F.embedding(tokens, self.weight).sin() * self.scale
        return F.cross_entropy(F.linear(features, self.weight), labels)

    model = _table(run)
    labels = EVERY_PIECE.flip(0).where(EVERY_PIECE != 6, -100)
    assert _is_cut(check_exact(model, (EVERY_PIECE, labels), CUT, tp=4))


def test_a_table_with_a_row_without_gradient_is_not_cut_by_rows() -> None:
    model = _table(lambda self, tokens: (F.embedding(tokens, self.weight, padding_idx=5) * self.scale).cos().sum())
    assert not _is_cut(check_exact(model, (EVERY_PIECE,), tp=2))
    assert not _is_cut(check_exact(model, (EVERY_PIECE,), dp=2, mb=2))


def _by_frequency(self: Any, tokens: torch.Tensor) -> Any:
    return (F.embedding(tokens, self.weight, scale_grad_by_freq=True) * self.scale).cos().sum()


def test_gradients_by_frequency_count_all_tokens() -> None:
    assert not _is_cut(check_exact(_table(_by_frequency), (torch.tensor([1, 1, 1, 2, 1, 2, 3, 1]),), tp=2))


def test_gradients_by_frequency_are_not_counted_in_pieces() -> None:
    batch = (torch.tensor([1, 1, 1, 2, 1, 2, 3, 1]),)
    assert not _is_cut(check_exact(_table(_by_frequency), batch, dp=2))
    with pytest.raises(PlanError, match="^the batch cannot be cut into microbatches without changing the result"):
        typed(_table(_by_frequency), batch, Plan(microbatches=2))


def test_the_lines_of_a_table_in_pieces() -> None:
    model = _table(lambda self, tokens: (F.embedding(tokens, self.weight) * self.scale).sum())
    same(
        function_text(typed(model, (EVERY_PIECE,), CUT, tp=2).main),
        """
        weight                weight                                                     (12, 4)  float32  parameters grad  tp S(0)
        scale                 scale                                                      (4,)     float32  parameters grad  tp R
        x                     input                                                      (B,)     int64    inputs           tp I
        shard_range           shard_range(12, 'tp')
        getitem               getitem(shard_range, 0)
        getitem_1             getitem(shard_range, 1)
        lt_scalar             aten.lt(x, getitem)                                        (B,)     bool     inputs           tp I
        ge_scalar             aten.ge(x, getitem_1)                                      (B,)     bool     inputs           tp I
        bitwise_or_tensor     aten.bitwise_or(lt_scalar, ge_scalar)                      (B,)     bool     inputs           tp I
        sub_tensor            aten.sub(x, getitem)                                       (B,)     int64    inputs           tp I
        masked_fill_scalar    aten.masked_fill(sub_tensor, bitwise_or_tensor, 0)         (B,)     int64    inputs           tp I
        embedding_default     aten.embedding(weight, masked_fill_scalar)                 (B, 4)   float32  data grad        tp P
        unsqueeze_default     aten.unsqueeze(bitwise_or_tensor, -1)                      (B, 1)   bool     inputs           tp I
        masked_fill_scalar_1  aten.masked_fill(embedding_default, unsqueeze_default, 0)  (B, 4)   float32  data grad        tp P
        mul_tensor            aten.mul(masked_fill_scalar_1, scale)                      (B, 4)   float32  data grad        tp P
        sum_default           aten.sum(mul_tensor)                                       ()       float32  data grad        tp P
        all_reduce            all_reduce(sum_default, 'tp')                              ()       float32  data grad        tp I
                              output all_reduce
        """,  # noqa: E501
    )


def test_the_lines_of_a_loss_in_pieces() -> None:
    def run(self: Any, x: torch.Tensor, labels: torch.Tensor) -> Any:
        return F.cross_entropy(F.linear(x, self.weight), labels, reduction="sum")

    same(
        function_text(typed(_table(run), (X, EVERY_PIECE), CUT, tp=2).main),
        """
        weight                weight                                               (12, 4)  float32  parameters grad  tp S(0)
        x                     input                                                (B, 4)   float32  inputs           tp I
        labels                input                                                (B,)     int64    inputs           tp I
        linear_default        aten.linear(x, weight)                               (B, 12)  float32  data grad        tp S(1)
        logsumexp_default     aten.logsumexp(linear_default, [1], True)            (B, 2)   float32  data grad        tp S(1)
        all_gather            all_gather(logsumexp_default, 'tp', dim=1, to='I')   (B, 2)   float32  data grad        tp I
        logsumexp_default_1   aten.logsumexp(all_gather, [1])                      (B,)     float32  data grad        tp I
        shard_range           shard_range(12, 'tp')
        getitem               getitem(shard_range, 0)
        getitem_1             getitem(shard_range, 1)
        lt_scalar             aten.lt(labels, getitem)                             (B,)     bool     inputs           tp I
        ge_scalar             aten.ge(labels, getitem_1)                           (B,)     bool     inputs           tp I
        bitwise_or_tensor     aten.bitwise_or(lt_scalar, ge_scalar)                (B,)     bool     inputs           tp I
        sub_tensor            aten.sub(labels, getitem)                            (B,)     int64    inputs           tp I
        masked_fill_scalar    aten.masked_fill(sub_tensor, bitwise_or_tensor, 0)   (B,)     int64    inputs           tp I
        unsqueeze_default     aten.unsqueeze(masked_fill_scalar, 1)                (B, 1)   int64    inputs           tp I
        gather_default        aten.gather(linear_default, 1, unsqueeze_default)    (B, 1)   float32  data grad        tp P
        squeeze_dim           aten.squeeze(gather_default, 1)                      (B,)     float32  data grad        tp P
        masked_fill_scalar_1  aten.masked_fill(squeeze_dim, bitwise_or_tensor, 0)  (B,)     float32  data grad        tp P
        all_reduce            all_reduce(masked_fill_scalar_1, 'tp')               (B,)     float32  data grad        tp I
        eq_scalar             aten.eq(labels, -100)                                (B,)     bool     inputs           tp I
        sub_tensor_1          aten.sub(logsumexp_default_1, all_reduce)            (B,)     float32  data grad        tp I
        masked_fill_scalar_2  aten.masked_fill(sub_tensor_1, eq_scalar, 0)         (B,)     float32  data grad        tp I
        sum_default           aten.sum(masked_fill_scalar_2)                       ()       float32  data grad        tp I
                              output sum_default
        """,  # noqa: E501
    )
