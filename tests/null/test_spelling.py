"""Every operator that a rule knows, written by the emitter and run: the code computes what the operator does."""

import operator as python
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from meshwright import runtime
from meshwright.codegen.writing import write
from meshwright.compiler.graph import Function, Value, is_multiple
from tests.null.rule_cases import CASES
from tests.null.rule_cases import x as _x
from tests.null.test_rules import POINTWISE

aten = torch.ops.aten
FURTHER: list[tuple[Any, list[Any], dict[str, Any]]] = [
    (aten.l1_loss.default, [_x(4, 6), _x(4, 6) + 1, 0], {}),
    (aten.smooth_l1_loss.default, [_x(4, 6), _x(4, 6) + 1, 2, 0.5], {}),
    (aten.huber_loss.default, [_x(4, 6), _x(4, 6) + 1, 0, 0.5], {}),
    (aten.kl_div.default, [_x(4, 6), _x(4, 6), 0], {"log_target": True}),
    (aten.binary_cross_entropy.default, [_x(4, 6).sigmoid(), _x(4, 6).sigmoid(), None, 2], {}),
    (aten.soft_margin_loss.default, [_x(4, 6), _x(4, 6).sign(), 2], {}),
    (aten.binary_cross_entropy_with_logits.default, [_x(4, 6), _x(4, 6).sigmoid(), None, None, 0], {}),
    (aten.gelu.default, [_x(4, 6)], {"approximate": "tanh"}),
    (aten.leaky_relu.default, [_x(4, 6), 0.2], {}),
    (aten.elu.default, [_x(4, 6), 0.5, 1.0, 2.0], {}),
    (aten.celu.default, [_x(4, 6), 0.5], {}),
    (aten.hardtanh.default, [_x(4, 6), -0.5, 0.5], {}),
    (aten.hardswish.default, [_x(4, 6)], {}),
    (aten.softplus.default, [_x(4, 6), 2, 1], {}),
    (aten.softshrink.default, [_x(4, 6), 0.1], {}),
    (aten.threshold.default, [_x(4, 6), 0.1, 3.0], {}),
    (aten.clamp.default, [_x(4, 6), None, 0.5], {}),
    (aten.clamp_min.default, [_x(4, 6), 0.5], {}),
    (aten.rsub.Scalar, [_x(4, 6), 1.0], {}),
    (aten.addcmul.default, [_x(4, 6), _x(4, 6), _x(4, 6)], {"value": 0.5}),
    (aten.lerp.Scalar, [_x(4, 6), _x(4, 6) + 1, 0.3], {}),
    (aten.pow.Scalar, [2.0, _x(4, 6)], {}),
    (aten.div.Tensor_mode, [_x(4, 6), _x(4, 6) + 2], {"rounding_mode": "floor"}),
    (aten.sub.Tensor, [_x(4, 6), _x(4, 6) + 1], {"alpha": 2}),
    (aten.remainder.Scalar, [_x(4, 6), 0.3], {}),
    (aten.upsample_bilinear2d.vec, [_x(2, 3, 4, 4), [8, 6], False, None], {}),
    (aten.unbind.int, [_x(4, 2, 6), 1], {}),
    (aten.nan_to_num.default, [_x(4, 6), 0.5], {}),
]
"""Arguments beside the usual ones, where torch.nn.functional and aten could differ."""

ALL = [
    *((op, *case()) for op, cases in CASES.items() for case in cases),
    *((op, args, {}) for op, args in POINTWISE),
    *FURTHER,
]


def _of(tensor: torch.Tensor) -> Value:
    return Value(shape=tuple(tensor.shape), dtype=tensor.dtype, grad=tensor.is_floating_point(), made_of="data")


@pytest.mark.parametrize("number", range(len(ALL)), ids=lambda i: f"{ALL[i][0].__name__}-{i}")
def test_the_code_computes_what_the_operator_does(number: int) -> None:
    target, args, kwargs = ALL[number]
    graph = fx.Graph()
    values: dict[fx.Node, Value] = {}
    given: dict[fx.Node, torch.Tensor] = {}

    def placeholder(tensor: torch.Tensor) -> fx.Node:
        node = graph.placeholder(f"x_{len(given)}")
        given[node], values[node] = tensor, _of(tensor)
        return node

    args, kwargs = tree_map_only(torch.Tensor, placeholder, (list(args), kwargs))
    node = graph.call_function(target, tuple(args), kwargs)
    wanted = target(*ALL[number][1], **ALL[number][2])
    wanted = list(wanted) if isinstance(wanted, (tuple, list)) else [wanted]
    results = [graph.call_function(python.getitem, (node, i)) for i in range(len(wanted))]
    results = results if target is not F.cross_entropy and is_multiple(node) else [node]
    values |= {result: _of(tensor) for result, tensor in zip(results, wanted, strict=True)}
    graph.output(tuple(results))
    for unused in [n for n in graph.nodes if n.op == "call_function" and not n.users]:
        graph.erase_node(unused)
    body = write(Function(graph=graph, values=values, origins={}), {n: str(n.target) for n in given}, {}, {})
    lines = "\n    ".join(line.code for line in body.lines)
    space = {"torch": torch, "F": F, **{name: getattr(runtime, name) for name in body.runtime}}
    exec(f"def forward(self, {', '.join(body.arguments)}):\n    {lines}", space)
    got = space["forward"](SimpleNamespace(training=True), *given.values())
    for a, b in zip(got if isinstance(got, tuple) else (got,), wanted, strict=True):
        assert a.shape == b.shape and torch.equal(a, b), lines
