"""Numbers made of sizes: what a rank's code computes is what the whole model computes, as Python reads it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from meshwright import UnsupportedError
from meshwright.codegen.writing import write
from tests.null.passes import Model, captured, parameter, typed

X = torch.randn(8, 4)
SIZES: dict[str, Callable[[Any], Any]] = {
    "sum": lambda size: size + 1,
    "product": lambda size: 3 * size,
    "quotient": lambda size: (size + 1) / 3,
    "inverse": lambda size: 1 / size,
    "float": lambda size: 0.0 + size + size,
    "floor": lambda size: size // 3,
    "remainder": lambda size: size % 3 + 1,
    "largest": lambda size: max(size - 3, 1),
    "smallest": lambda size: min(size, 5),
}


def _model(number: Callable[[Any], Any]) -> Model:
    def run(self: Any, x: torch.Tensor) -> Any:
        return (x * self.weight / number(x.shape[0])).sum()

    return Model(run, weight=parameter(4))


@pytest.mark.parametrize("kind", SIZES)
def test_a_number_of_sizes_is_that_of_the_whole_batch(kind: str) -> None:
    main = typed(_model(SIZES[kind]), (X,), dp=2).main
    (x,) = main.inputs()
    *_, line = write(main, {x: "x"}, {"weight": "weight"}, {"dp": 2}).lines
    weighted = torch.tensor(3.0, dtype=torch.float64)
    expression = line.code.removeprefix("return ").replace("x * self.weight", "mul")
    assert eval(expression, {"mul": weighted, "B": 4}).item() == pytest.approx(3 / SIZES[kind](8)), expression


def test_a_root_of_a_size_is_refused() -> None:
    with pytest.raises(UnsupportedError) as error:
        captured(_model(lambda size: torch.sym_sqrt(size)), X)
    assert str(error.value) == (
        "the model computes a number from its sizes with OpaqueUnaryFn_sqrt, which is not supported\n"
        "  compute it from a tensor, or fix the size: give an example with one sample or a sequence of length 1"
    )
