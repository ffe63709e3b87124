"""Capture: one function with symbolic sizes, parameters by their names, and clear words where that cannot be."""

from typing import Any

import pytest
import sympy
import torch
from torch import nn
from torch.utils._sympy.functions import Min

from meshwright import PlanError, UnsupportedError
from meshwright.compiler.capture import capture
from meshwright.compiler.exporting import always_equal
from meshwright.compiler.graph import Capture
from meshwright.compiler.text import function_text
from tests.null.passes import Model, captured, parameter, same

X = torch.randn(4, 8)
TOKENS = torch.randint(10, (4, 6))
MASK = torch.ones(4, 6, dtype=torch.int64)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.scale = nn.Buffer(torch.ones(8), persistent=False)
        self.offset = nn.Buffer(torch.ones(8))
        self.unread = nn.Buffer(torch.ones(3))
        self.neither = nn.Buffer(torch.ones(3), persistent=False)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, strength: float = 2.0) -> Any:
        features = self.table(tokens) * self.scale + self.offset
        return (features * mask[..., None]).pow(2).mean() * strength


def _tagger(**more: Any) -> Capture:
    return capture(Tagger(), {"tokens": TOKENS, "mask": MASK, **more})


def _sizes(found: Capture) -> dict[str, int]:
    return {str(symbol): size for symbol, size in found.symbols.items()}


def test_batch_and_sequence_are_symbols() -> None:
    same(
        function_text(_tagger().function),
        """
        table_weight       table.weight                             (10, 8)    float32  parameters grad
        scale              scale                                    (8,)       float32  inputs
        offset             offset                                   (8,)       float32  inputs
        tokens             input                                    (B, T)     int64    inputs
        mask               input                                    (B, T)     int64    inputs
        embedding_default  aten.embedding(table_weight, tokens)     (B, T, 8)  float32  data grad
        mul_tensor         aten.mul(embedding_default, scale)       (B, T, 8)  float32  data grad
        add_tensor         aten.add(mul_tensor, offset)             (B, T, 8)  float32  data grad
        unsqueeze_default  aten.unsqueeze(mask, 2)                  (B, T, 1)  int64    inputs
        mul_tensor_1       aten.mul(add_tensor, unsqueeze_default)  (B, T, 8)  float32  data grad
        pow_tensor_scalar  aten.pow(mul_tensor_1, 2)                (B, T, 8)  float32  data grad
        mean_default       aten.mean(pow_tensor_scalar)             ()         float32  data grad
        mul_tensor_2       aten.mul(mean_default, 2.0)              ()         float32  data grad
                           output mul_tensor_2
        """,
    )


def test_what_is_known_of_inputs() -> None:
    found = _tagger(strength=3.0)
    assert [(leaf.name, str(leaf.shape), leaf.dtype, leaf.batched) for leaf in found.inputs] == [
        ("tokens", "(B, T)", torch.int64, True),
        ("mask", "(B, T)", torch.int64, True),
        ("strength", "()", torch.int64, False),
    ]
    assert found.inputs[2].example == 3.0
    assert "aten.mul(mean_default, 3.0)" in function_text(found.function)
    assert found.input_tree == "dict" and found.model == "Tagger"


def test_a_tuple_takes_the_names_of_the_arguments() -> None:
    found = captured(Tagger(), TOKENS, MASK)
    assert ([leaf.name for leaf in found.inputs], found.input_tree) == (["tokens", "mask"], "tuple")


def test_buffers_that_are_read_or_saved_are_kept() -> None:
    found = _tagger().buffers.values()
    assert [(b.name, b.persistent) for b in found] == [("scale", False), ("offset", True), ("unread", True)]


def test_sizes_of_one_stay_fixed() -> None:
    found = capture(Tagger(), {"tokens": TOKENS[:1], "mask": MASK[:1]})
    assert (_sizes(found), found.fixed) == ({"T": 6}, ("B = 1: the example has size 1",))


def test_a_size_that_the_model_fixes_says_why() -> None:
    model = Model(lambda self, x: self.table(x).view(-1, 6 * 8).pow(2).mean(), table=nn.Embedding(10, 8))
    found = captured(model, TOKENS)
    assert _sizes(found) == {"B": 4}
    (reason,) = found.fixed
    assert reason.startswith("T = 6: Constraints violated (T)")


def test_the_same_tensor_given_twice_is_two_inputs() -> None:
    model = Model(lambda self, x, labels: (x * self.weight - labels).pow(2).mean(), weight=parameter(8))
    same(
        function_text(captured(model, X, X).function),
        """
        weight             weight                        (8,)    float32  parameters grad
        x                  input                         (B, 8)  float32  inputs
        labels             input                         (B, 8)  float32  inputs
        mul_tensor         aten.mul(x, weight)           (B, 8)  float32  data grad
        sub_tensor         aten.sub(mul_tensor, labels)  (B, 8)  float32  data grad
        pow_tensor_scalar  aten.pow(sub_tensor, 2)       (B, 8)  float32  data grad
        mean_default       aten.mean(pow_tensor_scalar)  ()      float32  data grad
                           output mean_default
        """,
    )


def test_tied_parameters_have_one_name_and_aliases() -> None:
    table, head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
    head.weight = table.weight
    found = captured(Model(lambda self, x: self.head(self.table(x)).sum(), table=table, head=head), TOKENS)
    assert {name: p.aliases for name, p in found.parameters.items()} == {"table.weight": ("head.weight",)}
    assert found.tensors["table.weight"].data_ptr() == table.weight.data_ptr()


def test_frozen_parameters_have_no_gradient() -> None:
    model = Model(lambda self, x: (x * self.fixed * self.weight).sum(), fixed=parameter(8), weight=parameter(8))
    model.fixed.requires_grad_(False)
    found = captured(model, X)
    assert {name: p.trainable for name, p in found.parameters.items()} == {"fixed": False, "weight": True}
    same(
        function_text(found.function),
        """
        fixed         fixed                         (8,)    float32  parameters
        weight        weight                        (8,)    float32  parameters grad
        x             input                         (B, 8)  float32  inputs
        mul_tensor    aten.mul(x, fixed)            (B, 8)  float32  data
        mul_tensor_1  aten.mul(mul_tensor, weight)  (B, 8)  float32  data grad
        sum_default   aten.sum(mul_tensor_1)        ()      float32  data grad
                      output sum_default
        """,
    )


def test_a_loss_of_the_users_own() -> None:
    def loss(model: nn.Module, batch: Any) -> Any:
        return (model(batch["x"]) - batch["wanted"]).abs().sum()

    found = capture(nn.Linear(8, 1, bias=False), {"x": X, "wanted": torch.randn(4, 1)}, loss_fn=loss)
    same(
        function_text(found.function),
        """
        weight          weight                            (1, 8)  float32  parameters grad
        x               input                             (B, 8)  float32  inputs
        wanted          input                             (B, 1)  float32  inputs
        linear_default  aten.linear(x, weight)            (B, 1)  float32  data grad
        sub_tensor      aten.sub(linear_default, wanted)  (B, 1)  float32  data grad
        abs_default     aten.abs(sub_tensor)              (B, 1)  float32  data grad
        sum_default     aten.sum(abs_default)             ()      float32  data grad
                        output sum_default
        """,
    )


def test_tensors_that_the_code_makes_are_buffers_of_the_program() -> None:
    model = Model(lambda self, x: (x * self.weight * torch.tensor([1.0, 2.0] * 4)).sum(), weight=parameter(8))
    found = captured(model, X)
    (constant,) = found.buffers.values()
    assert (constant.persistent, found.tensors[constant.name].tolist()) == (False, [1.0, 2.0] * 4)


def test_a_model_without_memory_is_captured_alike() -> None:
    with torch.device("meta"):
        model = Tagger()
    found = capture(model, {"tokens": TOKENS, "mask": MASK})
    assert function_text(found.function) == function_text(_tagger().function)
    assert found.tensors["table.weight"].is_meta


def test_double_precision_reads_every_floating_dtype_as_float64() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        return (x.float() * self.weight.to(torch.float32)).to(torch.float32).sum(dtype=torch.float32)

    model = Model(run, weight=parameter(8))
    found = capture(model, (X,), precision="fp64")
    same(
        function_text(found.function),
        """
        weight       weight                                     (8,)    float64  parameters grad
        x            input                                      (B, 8)  float64  inputs
        mul_tensor   aten.mul(x, weight)                        (B, 8)  float64  data grad
        sum_default  aten.sum(mul_tensor, dtype=torch.float64)  ()      float64  data grad
                     output sum_default
        """,
    )
    assert model.weight.dtype == torch.float32, "the user's model stays as it is"


def test_double_precision_reads_tensors_that_are_no_buffers_as_float64() -> None:
    """Tables of positions that a module holds as plain attributes."""
    module = Model(lambda self, x: (x * self.weight * self.table.detach().type_as(x)).sum(), weight=parameter(4))
    module.table = torch.linspace(0, 1, 4)
    found = capture(module, (torch.randn(4, 4),), precision="fp64")
    assert {value.dtype for value in found.function.values.values()} == {torch.float64}
    assert module.table.dtype == torch.float32, "the model stays as it is"


def test_capture_is_for_training_and_leaves_the_mode() -> None:
    model = Model(lambda self, x: (x * self.weight * (2 if self.training else 3)).sum(), weight=parameter(8))
    model.eval()
    assert "aten.mul(mul_tensor, 2)" in function_text(captured(model, X).function)
    assert not model.training


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("x", "example_inputs is a dict of forward's keyword arguments or a tuple, not str"),
        ({"x": [1, 2]}, "example_inputs['x'] is a list: leaves are tensors or plain scalars"),
        ({"a b": X}, "the name 'a b' in example_inputs is no identifier"),
        ({"x": 1.0}, "example_inputs has no tensor with a batch dimension (dim 0)"),
    ],
)
def test_batches_that_are_none(batch: Any, message: str) -> None:
    with pytest.raises(PlanError) as error:
        capture(Tagger(), batch)
    assert str(error.value) == message


def test_a_batch_that_the_model_does_not_take() -> None:
    with pytest.raises(PlanError) as error:
        capture(Tagger(), {"tokens": TOKENS})
    assert str(error.value) == (
        "the model does not run on example_inputs (tokens): TypeError: Tagger.forward() missing 1 required positional "
        "argument: 'mask'\n  try loss_fn(model, batch), or model(**batch), on one device first"
    )


def test_control_flow_on_data() -> None:
    model = Model(lambda self, x: x.sum() if self.weight.sum() > 0 else -x.sum(), weight=parameter(8))
    place = r"test_capture.py:\d+ in <lambda>"
    with pytest.raises(UnsupportedError, match=f"^the model's control flow depends on its data at {place}: "):
        captured(model, X)


def test_sizes_that_are_one_for_every_batch_are_not_fixed() -> None:
    batch = sympy.Symbol("B", positive=True, integer=True)
    assert always_equal(batch * Min(32, 384 * batch), 32 * batch)
    assert not always_equal(batch * Min(32, 4 * batch), 32 * batch)
    assert not always_equal(4 * batch, batch * sympy.Symbol("T", positive=True, integer=True))
