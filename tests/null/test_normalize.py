"""Normalization: one spelling for each meaning, and nothing that computes nothing."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from meshwright import UnsupportedError
from meshwright.compiler.capture import capture
from meshwright.compiler.text import function_text
from tests.null.passes import Model, captured, check_exact, parameter, same

X = torch.randn(4, 8)
TOKENS = torch.randint(10, (4, 6))


def _text(model: nn.Module, *batch: Any) -> str:
    return function_text(captured(model, *batch).function)


def test_assertions_are_dropped() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        torch._check(x.shape[0] > 2)
        torch._assert_async(x.sum() != 3.5)
        return (x * self.weight).sum()

    same(
        _text(Model(run, weight=parameter(8)), X),
        """
        weight       weight                (8,)    float32  parameters grad
        x            input                 (4, 8)  float32  inputs
        mul_tensor   aten.mul(x, weight)   (4, 8)  float32  data grad
        sum_default  aten.sum(mul_tensor)  ()      float32  data grad
                     output sum_default
        """,
    )


def test_what_runs_without_gradient_is_inlined_and_cut_off() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        with torch.no_grad():
            scale = (self.weight * 2).abs()
        return (x * self.weight * scale).sum()

    same(
        _text(Model(run, weight=parameter(8)), X),
        """
        weight          weight                               (8,)    float32  parameters grad
        x               input                                (B, 8)  float32  inputs
        detach_default  aten.detach(weight)                  (8,)    float32  parameters
        mul_tensor      aten.mul(detach_default, 2)          (8,)    float32  parameters
        abs_default     aten.abs(mul_tensor)                 (8,)    float32  parameters
        mul_tensor_1    aten.mul(x, weight)                  (B, 8)  float32  data grad
        mul_tensor_2    aten.mul(mul_tensor_1, abs_default)  (B, 8)  float32  data grad
        sum_default     aten.sum(mul_tensor_2)               ()      float32  data grad
                        output sum_default
        """,
    )


def test_autocast_that_is_off_is_inlined() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            scale = (self.weight * 2).abs()
        return (x * scale).sum()

    same(
        _text(Model(run, weight=parameter(8)), X),
        """
        weight        weight                    (8,)    float32  parameters grad
        x             input                     (B, 8)  float32  inputs
        mul_tensor    aten.mul(weight, 2)       (8,)    float32  parameters grad
        abs_default   aten.abs(mul_tensor)      (8,)    float32  parameters grad
        mul_tensor_1  aten.mul(x, abs_default)  (B, 8)  float32  data grad
        sum_default   aten.sum(mul_tensor_1)    ()      float32  data grad
                      output sum_default
        """,
    )


def test_autocast_that_is_on_is_refused() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.up(x).float().sum()

    with pytest.raises(UnsupportedError) as error:
        _text(Model(run, up=nn.Linear(8, 8)), X)
    assert str(error.value).startswith("autocast inside the model ")
    assert str(error.value).endswith("is not supported yet\n  train in the model's own dtypes instead")


def test_what_changes_nothing_is_removed() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        x = F.dropout(x.float().contiguous().type_as(x) * 1 + 0, 0.0).clone()
        return (x.view(-1, 8)[:, :8].expand(-1, 8) * self.weight).sum()

    same(
        _text(Model(run, weight=parameter(8)), X),
        """
        weight       weight                (8,)    float32  parameters grad
        x            input                 (B, 8)  float32  inputs
        mul_tensor   aten.mul(x, weight)   (B, 8)  float32  data grad
        sum_default  aten.sum(mul_tensor)  ()      float32  data grad
                     output sum_default
        """,
    )


def test_casts_that_round_stay_in_one_spelling() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        half = (x * self.weight).half().type(torch.float32)
        return half.to(torch.float64).to("cpu").sum()

    same(
        _text(Model(run, weight=parameter(8)), X),
        """
        weight       weight                              (8,)    float32  parameters grad
        x            input                               (B, 8)  float32  inputs
        mul_tensor   aten.mul(x, weight)                 (B, 8)  float32  data grad
        to_dtype     aten.to(mul_tensor, torch.float16)  (B, 8)  float16  data grad
        to_dtype_1   aten.to(to_dtype, torch.float32)    (B, 8)  float32  data grad
        to_dtype_2   aten.to(to_dtype_1, torch.float64)  (B, 8)  float64  data grad
        sum_default  aten.sum(to_dtype_2)                ()      float64  data grad
                     output sum_default
        """,
    )


def test_dividing_integers_by_one_makes_them_real() -> None:
    def run(self: Any, x: torch.Tensor, steps: torch.Tensor) -> Any:
        return (x * self.weight * (steps / 1 + steps * 1)).sum()

    same(
        _text(Model(run, weight=parameter(8)), X, torch.ones(4, 8, dtype=torch.int64)),
        """
        weight        weight                            (8,)    float32  parameters grad
        x             input                             (B, 8)  float32  inputs
        labels        input                             (B, 8)  int64    inputs
        mul_tensor    aten.mul(x, weight)               (B, 8)  float32  data grad
        div_tensor    aten.div(labels, 1)               (B, 8)  float32  inputs
        add_tensor    aten.add(div_tensor, labels)      (B, 8)  float32  inputs
        mul_tensor_1  aten.mul(mul_tensor, add_tensor)  (B, 8)  float32  data grad
        sum_default   aten.sum(mul_tensor_1)            ()      float32  data grad
                      output sum_default
        """,
    )


def test_the_bias_of_a_linear_is_added_by_itself() -> None:
    same(
        _text(Model(lambda self, x: self.up(x).sum(), up=nn.Linear(8, 6)), X),
        """
        up_weight       up.weight                          (6, 8)  float32  parameters grad
        up_bias         up.bias                            (6,)    float32  parameters grad
        x               input                              (B, 8)  float32  inputs
        linear_default  aten.linear(x, up_weight)          (B, 6)  float32  data grad
        add_tensor      aten.add(linear_default, up_bias)  (B, 6)  float32  data grad
        sum_default     aten.sum(add_tensor)               ()      float32  data grad
                        output sum_default
        """,
    )


def test_addmm_works_on_the_unflattened_input() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        return torch.addmm(self.bias, x.view(-1, 8), self.weight).view(x.shape[0], 3, 6).sum()

    same(
        _text(Model(run, weight=parameter(8, 6), bias=parameter(6)), torch.randn(4, 3, 8)),
        """
        weight          weight                          (8, 6)     float32  parameters grad
        bias            bias                            (6,)       float32  parameters grad
        x               input                           (B, 3, 8)  float32  inputs
        matmul_default  aten.matmul(x, weight)          (B, 3, 6)  float32  data grad
        add_tensor      aten.add(matmul_default, bias)  (B, 3, 6)  float32  data grad
        sum_default     aten.sum(add_tensor)            ()         float32  data grad
                        output sum_default
        """,
    )


def test_addmm_whose_rows_stay_flat_stays_flat() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        return torch.addmm(self.bias, x.view(-1, 8), self.weight).relu().view(x.shape[0], 3, 6).sum()

    same(
        _text(Model(run, weight=parameter(8, 6), bias=parameter(6)), torch.randn(4, 3, 8)),
        """
        weight          weight                              (8, 6)     float32  parameters grad
        bias            bias                                (6,)       float32  parameters grad
        x               input                               (B, 3, 8)  float32  inputs
        view_default    aten.view(x, [-1, 8])               (3*B, 8)   float32  inputs
        matmul_default  aten.matmul(view_default, weight)   (3*B, 6)   float32  data grad
        add_tensor      aten.add(matmul_default, bias)      (3*B, 6)   float32  data grad
        relu_default    aten.relu(add_tensor)               (3*B, 6)   float32  data grad
        view_default_1  aten.view(relu_default, [B, 3, 6])  (B, 3, 6)  float32  data grad
        sum_default     aten.sum(view_default_1)            ()         float32  data grad
                        output sum_default
        """,
    )


def test_addmm_with_factors_is_a_sum_of_products() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        return torch.addmm(self.bias, x, self.weight, alpha=2, beta=0.5).sum()

    same(
        _text(Model(run, weight=parameter(8, 6), bias=parameter(6)), X),
        """
        weight          weight                              (8, 6)  float32  parameters grad
        bias            bias                                (6,)    float32  parameters grad
        x               input                               (B, 8)  float32  inputs
        matmul_default  aten.matmul(x, weight)              (B, 6)  float32  data grad
        mul_tensor      aten.mul(matmul_default, 2)         (B, 6)  float32  data grad
        mul_tensor_1    aten.mul(bias, 0.5)                 (6,)    float32  parameters grad
        add_tensor      aten.add(mul_tensor, mul_tensor_1)  (B, 6)  float32  data grad
        sum_default     aten.sum(add_tensor)                ()      float32  data grad
                        output sum_default
        """,
    )


@pytest.mark.parametrize("transposed", [lambda w: w.T, lambda w: w.t(), lambda w: w.mT, lambda w: w.transpose(0, 1)])
def test_a_product_with_a_transposed_matrix_is_a_linear(transposed: Any) -> None:
    model = Model(lambda self, x: (x @ transposed(self.weight)).sum(), weight=parameter(6, 8))
    same(
        _text(model, X),
        """
        weight          weight                    (6, 8)  float32  parameters grad
        x               input                     (B, 8)  float32  inputs
        linear_default  aten.linear(x, weight)    (B, 6)  float32  data grad
        sum_default     aten.sum(linear_default)  ()      float32  data grad
                        output sum_default
        """,
    )


def test_a_fused_norm_is_one_operator() -> None:
    same(
        _text(Model(lambda self, x: self.norm(x).sum(), norm=nn.RMSNorm(8)), X),
        """
        norm_weight       norm.weight                         (8,)    float32  parameters grad
        x                 input                               (B, 8)  float32  inputs
        rms_norm_default  aten.rms_norm(x, [8], norm_weight)  (B, 8)  float32  data grad
        sum_default       aten.sum(rms_norm_default)          ()      float32  data grad
                          output sum_default
        """,
    )


def test_a_mean_of_losses_is_a_sum_over_a_count() -> None:
    model = Model(lambda self, x, labels: F.cross_entropy(x * self.weight, labels), weight=parameter(8))
    same(
        _text(model, X, torch.randint(8, (4,))),
        """
        weight         weight                                              (8,)    float32  parameters grad
        x              input                                               (B, 8)  float32  inputs
        labels         input                                               (B,)    int64    inputs
        mul_tensor     aten.mul(x, weight)                                 (B, 8)  float32  data grad
        cross_entropy  cross_entropy(mul_tensor, labels, reduction='sum')  ()      float32  data grad
        ne_scalar      aten.ne(labels, -100)                               (B,)    bool     inputs
        sum_default    aten.sum(ne_scalar)                                 ()      int64    inputs
        div_tensor     aten.div(cross_entropy, sum_default)                ()      float32  data grad
                       output div_tensor
        """,
    )


def test_the_label_that_is_ignored_is_kept() -> None:
    def run(self: Any, x: torch.Tensor, labels: torch.Tensor) -> Any:
        return F.cross_entropy(x * self.weight, labels, ignore_index=0)

    text = _text(Model(run, weight=parameter(8)), X, torch.randint(8, (4,)))
    assert "cross_entropy(mul_tensor, labels, reduction='sum', ignore_index=0)" in text
    assert "aten.ne(labels, 0)" in text


def test_a_sum_of_losses_has_no_count() -> None:
    def run(self: Any, x: torch.Tensor, labels: torch.Tensor) -> Any:
        return F.cross_entropy(x * self.weight, labels, reduction="sum")

    same(
        _text(Model(run, weight=parameter(8)), X, torch.randint(8, (4,))),
        """
        weight         weight                                              (8,)    float32  parameters grad
        x              input                                               (B, 8)  float32  inputs
        labels         input                                               (B,)    int64    inputs
        mul_tensor     aten.mul(x, weight)                                 (B, 8)  float32  data grad
        cross_entropy  cross_entropy(mul_tensor, labels, reduction='sum')  ()      float32  data grad
                       output cross_entropy
        """,
    )


def test_losses_over_several_dims_are_losses_over_rows() -> None:
    def run(self: Any, x: torch.Tensor, labels: torch.Tensor) -> Any:
        return F.cross_entropy((self.table(x) * 2).transpose(1, 2), labels, reduction="sum")

    same(
        _text(Model(run, table=nn.Embedding(10, 8)), TOKENS, TOKENS % 8),
        """
        table_weight       table.weight                                                        (10, 8)    float32  parameters grad
        x                  input                                                               (B, T)     int64    inputs
        labels             input                                                               (B, T)     int64    inputs
        embedding_default  aten.embedding(table_weight, x)                                     (B, T, 8)  float32  data grad
        mul_tensor         aten.mul(embedding_default, 2)                                      (B, T, 8)  float32  data grad
        transpose_int      aten.transpose(mul_tensor, 1, 2)                                    (B, 8, T)  float32  data grad
        permute_default    aten.permute(transpose_int, [0, 2, 1])                              (B, T, 8)  float32  data grad
        reshape_default    aten.reshape(permute_default, [-1, 8])                              (B*T, 8)   float32  data grad
        reshape_default_1  aten.reshape(labels, [-1])                                          (B*T,)     int64    inputs
        cross_entropy      cross_entropy(reshape_default, reshape_default_1, reduction='sum')  ()         float32  data grad
                           output cross_entropy
        """,  # noqa: E501
    )


def test_the_loss_of_one_label_is_a_loss_over_rows() -> None:
    def run(self: Any, x: torch.Tensor, labels: torch.Tensor) -> Any:
        return F.cross_entropy(x @ self.weight, labels.sum(), reduction="sum")

    same(
        _text(Model(run, weight=parameter(8)), X, torch.tensor([1, 0, 1, 1])),
        """
        weight             weight                                                              (8,)    float32  parameters grad
        x                  input                                                               (B, 8)  float32  inputs
        labels             input                                                               (B,)    int64    inputs
        matmul_default     aten.matmul(x, weight)                                              (B,)    float32  data grad
        sum_default        aten.sum(labels)                                                    ()      int64    inputs
        unsqueeze_default  aten.unsqueeze(matmul_default, 0)                                   (1, B)  float32  data grad
        reshape_default    aten.reshape(sum_default, [-1])                                     (1,)    int64    inputs
        cross_entropy      cross_entropy(unsqueeze_default, reshape_default, reduction='sum')  ()      float32  data grad
                           output cross_entropy
        """,  # noqa: E501
    )


def test_class_weights_are_counted_where_labels_are_valid() -> None:
    def run(self: Any, x: torch.Tensor, labels: torch.Tensor) -> Any:
        return F.cross_entropy(x * self.weight, labels, weight=torch.ones(8), label_smoothing=0.1)

    text = _text(Model(run, weight=parameter(8)), X, torch.randint(8, (4,)))
    assert "cross_entropy(mul_tensor, labels, ones_default, reduction='sum', label_smoothing=0.1)" in text
    assert "aten.ne(labels, -100)" in text and "aten.index(ones_default" in text


def test_tied_parameters_are_one() -> None:
    table, head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
    head.weight = table.weight
    model = Model(lambda self, x: self.head(self.table(x)).sum(), table=table, head=head)
    same(
        _text(model, TOKENS),
        """
        table_weight       table.weight                                  (10, 8)     float32  parameters grad
        x                  input                                         (B, T)      int64    inputs
        embedding_default  aten.embedding(table_weight, x)               (B, T, 8)   float32  data grad
        linear_default     aten.linear(embedding_default, table_weight)  (B, T, 10)  float32  data grad
        sum_default        aten.sum(linear_default)                      ()          float32  data grad
                           output sum_default
        """,
    )


def test_results_that_nobody_reads_are_dropped() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        largest, _ = (x * self.weight).max(-1)
        self.unused * 2
        return largest.sum()

    same(
        _text(Model(run, weight=parameter(8), unused=parameter(3)), X),
        """
        weight       weight               (8,)    float32  parameters grad
        x            input                (B, 8)  float32  inputs
        mul_tensor   aten.mul(x, weight)  (B, 8)  float32  data grad
        max_dim      aten.max(mul_tensor, -1)
        getitem      getitem(max_dim, 0)  (B,)    float32  data grad
        sum_default  aten.sum(getitem)    ()      float32  data grad
                     output sum_default
        """,
    )


def test_the_same_computation_is_done_once() -> None:
    model = Model(lambda self, x: ((x * self.weight).relu() + (x * self.weight).relu()).sum(), weight=parameter(8))
    same(
        _text(model, X),
        """
        weight        weight                                (8,)    float32  parameters grad
        x             input                                 (B, 8)  float32  inputs
        mul_tensor    aten.mul(x, weight)                   (B, 8)  float32  data grad
        relu_default  aten.relu(mul_tensor)                 (B, 8)  float32  data grad
        add_tensor    aten.add(relu_default, relu_default)  (B, 8)  float32  data grad
        sum_default   aten.sum(add_tensor)                  ()      float32  data grad
                      output sum_default
        """,
    )


def test_equal_constants_of_different_types_are_not_the_same() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        whole, real = torch.pow(1, x.detach().long()), torch.pow(1.0, x.detach().long())
        return (x * self.weight * whole * real).sum()

    same(
        _text(Model(run, weight=parameter(8)), X),
        """
        weight        weight                                (8,)    float32  parameters grad
        x             input                                 (B, 8)  float32  inputs
        to_dtype      aten.to(x, torch.int64)               (B, 8)  int64    inputs
        pow_scalar    aten.pow(1, to_dtype)                 (B, 8)  int64    inputs
        pow_scalar_1  aten.pow(1.0, to_dtype)               (B, 8)  float32  inputs
        mul_tensor    aten.mul(x, weight)                   (B, 8)  float32  data grad
        mul_tensor_1  aten.mul(mul_tensor, pow_scalar)      (B, 8)  float32  data grad
        mul_tensor_2  aten.mul(mul_tensor_1, pow_scalar_1)  (B, 8)  float32  data grad
        sum_default   aten.sum(mul_tensor_2)                ()      float32  data grad
                      output sum_default
        """,
    )


def test_indexing_that_picks_one_place_is_a_slice() -> None:
    model = Model(lambda self, x: (x * self.weight)[:, torch.tensor([-1])].sum(), weight=parameter(8))
    same(
        _text(model, X),
        """
        weight        weight                           (8,)    float32  parameters grad
        x             input                            (B, 8)  float32  inputs
        mul_tensor    aten.mul(x, weight)              (B, 8)  float32  data grad
        slice_tensor  aten.slice(mul_tensor, 1, 7, 8)  (B, 1)  float32  data grad
        sum_default   aten.sum(slice_tensor)           ()      float32  data grad
                      output sum_default
        """,
    )


def test_indexing_everything_in_order_is_a_view() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        rows, columns = torch.arange(x.shape[0]), torch.arange(8)
        return (x * self.weight)[rows[:, None], columns[None]].sum()

    same(
        _text(Model(run, weight=parameter(8)), X),
        """
        weight       weight                (8,)    float32  parameters grad
        x            input                 (B, 8)  float32  inputs
        mul_tensor   aten.mul(x, weight)   (B, 8)  float32  data grad
        sum_default  aten.sum(mul_tensor)  ()      float32  data grad
                     output sum_default
        """,
    )


def test_indexing_columns_before_rows_is_no_view() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        rows, columns = torch.arange(x.shape[0]), torch.arange(8)
        return (x * self.weight)[rows[None], columns[:, None]].relu().sum()

    assert "aten.index(" in _text(Model(run, weight=parameter(8)), X)


def test_indexing_along_the_diagonal_is_no_view() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        square = F.linear(self.weight, self.weight)
        return (x.sum() * square)[torch.arange(8), torch.arange(8)].sum()

    assert "aten.index(" in _text(Model(run, weight=parameter(8, 8)), X)


def test_what_broadcasts_by_itself_is_not_expanded() -> None:
    model = Model(lambda self, x: (x * self.weight.expand(x.shape[0], 8)).sum(), weight=parameter(8))
    same(
        _text(model, X),
        """
        weight       weight                (8,)    float32  parameters grad
        x            input                 (B, 8)  float32  inputs
        mul_tensor   aten.mul(x, weight)   (B, 8)  float32  data grad
        sum_default  aten.sum(mul_tensor)  ()      float32  data grad
                     output sum_default
        """,
    )


def test_an_expansion_that_makes_the_shape_stays() -> None:
    model = Model(lambda self, x: (self.weight.expand(x.shape[0], 8) * 2).sum(), weight=parameter(8))
    same(
        _text(model, X),
        """
        weight          weight                       (8,)    float32  parameters grad
        x               input                        (B, 8)  float32  inputs
        expand_default  aten.expand(weight, [B, 8])  (B, 8)  float32  parameters grad
        mul_tensor      aten.mul(expand_default, 2)  (B, 8)  float32  parameters grad
        sum_default     aten.sum(mul_tensor)         ()      float32  parameters grad
                        output sum_default
        """,
    )


def test_parts_without_elements_are_no_parts() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        return (torch.cat([torch.empty(0), x * self.weight], 1)).sum()

    same(
        _text(Model(run, weight=parameter(8)), X),
        """
        weight       weight                (8,)    float32  parameters grad
        x            input                 (B, 8)  float32  inputs
        mul_tensor   aten.mul(x, weight)   (B, 8)  float32  data grad
        sum_default  aten.sum(mul_tensor)  ()      float32  data grad
                     output sum_default
        """,
    )


def _multi_query(self: Any, x: torch.Tensor) -> Any:
    fused = self.fused(x)
    return (fused[:, :8] * 2).sum() + fused[:, 8:10].sum() + (fused[:, 10:] * 3).sum()


def test_a_projection_cut_unevenly_is_read_part_by_part() -> None:
    same(
        _text(Model(_multi_query, fused=nn.Linear(8, 12)), X),
        """
        fused_weight_10_12_  fused.weight[10:12]                            (2, 8)  float32  parameters grad
        fused_weight_8_10_   fused.weight[8:10]                             (2, 8)  float32  parameters grad
        fused_weight_0_8_    fused.weight[0:8]                              (8, 8)  float32  parameters grad
        fused_bias_10_12_    fused.bias[10:12]                              (2,)    float32  parameters grad
        fused_bias_8_10_     fused.bias[8:10]                               (2,)    float32  parameters grad
        fused_bias_0_8_      fused.bias[0:8]                                (8,)    float32  parameters grad
        x                    input                                          (B, 8)  float32  inputs
        linear_default       aten.linear(x, fused_weight_0_8_)              (B, 8)  float32  data grad
        add_tensor           aten.add(linear_default, fused_bias_0_8_)      (B, 8)  float32  data grad
        mul_tensor           aten.mul(add_tensor, 2)                        (B, 8)  float32  data grad
        sum_default          aten.sum(mul_tensor)                           ()      float32  data grad
        linear_default_1     aten.linear(x, fused_weight_8_10_)             (B, 2)  float32  data grad
        add_tensor_1         aten.add(linear_default_1, fused_bias_8_10_)   (B, 2)  float32  data grad
        sum_default_1        aten.sum(add_tensor_1)                         ()      float32  data grad
        add_tensor_2         aten.add(sum_default, sum_default_1)           ()      float32  data grad
        linear_default_2     aten.linear(x, fused_weight_10_12_)            (B, 2)  float32  data grad
        add_tensor_3         aten.add(linear_default_2, fused_bias_10_12_)  (B, 2)  float32  data grad
        mul_tensor_1         aten.mul(add_tensor_3, 3)                      (B, 2)  float32  data grad
        sum_default_2        aten.sum(mul_tensor_1)                         ()      float32  data grad
        add_tensor_4         aten.add(add_tensor_2, sum_default_2)          ()      float32  data grad
                             output add_tensor_4
        """,
    )


@pytest.mark.parametrize(("first", "second"), [(slice(8), slice(9, 12)), (slice(8), slice(8, 11))])
def test_a_projection_of_which_a_part_is_left_out_stays_whole(first: slice, second: slice) -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        fused = self.fused(x)
        return (fused[:, first] * 2).sum() + fused[:, second].sum()

    text = _text(Model(run, fused=nn.Linear(8, 12)), X)
    assert "fused.weight[" not in text and "aten.slice" in text


def test_what_is_repeated_is_broadcast_along_a_dim_of_its_own() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        return torch.cat([x.repeat(1, 2), self.weight.repeat(x.shape[0], 1)], 1).sum()

    same(
        _text(Model(run, weight=parameter(8)), X),
        """
        weight               weight                                               (8,)       float32  parameters grad
        x                    input                                                (B, 8)     float32  inputs
        unsqueeze_default    aten.unsqueeze(x, 1)                                 (B, 1, 8)  float32  inputs
        expand_default       aten.expand(unsqueeze_default, [-1, 2, -1])          (B, 2, 8)  float32  inputs
        flatten_using_ints   aten.flatten(expand_default, 1, 2)                   (B, 16)    float32  inputs
        unsqueeze_default_1  aten.unsqueeze(weight, 0)                            (1, 8)     float32  parameters grad
        expand_default_1     aten.expand(unsqueeze_default_1, [B, -1])            (B, 8)     float32  parameters grad
        cat_default          aten.cat([flatten_using_ints, expand_default_1], 1)  (B, 24)    float32  data grad
        sum_default          aten.sum(cat_default)                                ()         float32  data grad
                             output sum_default
        """,
    )


def test_a_batch_that_is_made_by_repeating_is_cut_like_any_other() -> None:
    """Bloom's biases: four heads for every sample, the samples outside."""

    def run(self: Any, x: torch.Tensor) -> Any:
        slopes = torch.arange(4.0).unsqueeze(1).repeat(x.shape[0], 1)
        return ((x * self.weight).view(-1, 2) * slopes).pow(2).sum()

    check_exact(Model(run, weight=parameter(8)), (torch.randn(8, 8),), dp=2, mb=2)


def test_one_place_for_every_sample_is_a_gather() -> None:
    """Classifiers read the last token; a place counts from the back too."""

    def run(self: Any, tokens: torch.Tensor) -> Any:
        hidden = self.weight[tokens]
        last = (tokens > 3).sum(1) - 1 - tokens.shape[1]
        return hidden[torch.arange(tokens.shape[0]), last].pow(2).mean()

    check_exact(Model(run, weight=parameter(10, 4)), (torch.arange(48).view(8, 6) % 10,), dp=2, mb=2)


def test_the_shape_of_another_tensor_is_a_shape() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        wide = self.weight.expand_as(x).reshape(-1)
        empty = x.new_empty(x.shape[0], 8)
        empty.copy_(x)
        return (wide.view_as(x) * empty * x.reshape(-1).reshape_as(x)).sum()

    text = _text(Model(run, weight=parameter(8)), X)
    assert not any(name in text for name in ("_as(", "empty"))
    check_exact(Model(run, weight=parameter(8)), (torch.randn(8, 8),), dp=2, mb=2)


def test_integers_that_meet_numbers_are_cast_in_float64() -> None:
    """The default dtype of the model's run would round them otherwise."""

    def run(self: Any, x: torch.Tensor) -> Any:
        return (x * self.weight).sum() / ((x > 0).sum() + 1e-5)

    doubled = function_text(capture(Model(run, weight=parameter(8)), (X,), precision="fp64").function)
    assert "aten.to(sum_default_1, torch.float64)" in doubled
    assert "aten.to(" not in _text(Model(run, weight=parameter(8)), X)


def test_tensors_of_numbers_are_made_in_float64() -> None:
    """The default dtype of a rank is not that of the capture."""

    def run(self: Any, x: torch.Tensor) -> Any:
        return (x * self.weight * torch.linspace(0, 1, 8)).mean()

    doubled = function_text(capture(Model(run, weight=parameter(8)), (X,), precision="fp64").function)
    assert "aten.linspace(0, 1, 8, device=device(type='cpu'), pin_memory=False, dtype=torch.float64)" in doubled
