"""DTensor's own rules as an oracle for ours: where both know an operator they must say the same of it.

Where they do not, ``test_rules`` says who is right: it proves ours by brute force, on the same calls.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from meshwright.compiler.types import I, P, R, S, Type
from meshwright.passes.factors import Rule
from meshwright.passes.rows import Row
from meshwright.passes.rules import DEFAULT_RULES, is_pointwise
from tests.null.oracle import RANKS, Example, answer, derive, distributed, example, rows
from tests.null.rule_cases import CASES, FIXED, WHOLE
from tests.null.test_rules import POINTWISE

pytestmark = pytest.mark.filterwarnings("ignore:Found a non-scalar tensor")
aten = torch.ops.aten

_CONVOLUTIONS = {operator for operator in CASES if "conv" in str(operator)}

EXPLAINED: dict[Any, str] = {
    **dict.fromkeys(_CONVOLUTIONS, "DTensor's rule reads the placement of the input alone, and not the weight's"),
    aten.zeros_like.default: "zeros are partial and replicated alike",
    **dict.fromkeys(
        (
            aten.angle.default, aten.ceil.default, aten.floor.default, aten.round.default, aten.sign.default,
            aten.trunc.default,
        ),
        "so are gradients that are zero",
    ),
}  # fmt: skip
"""Operators of which DTensor says something else, and why that does not count."""

SILENT = {
    *WHOLE, aten.mean.default, aten.tril.default, aten.triu.default, aten.bilinear.default, aten._grouped_mm.default,
    aten.cdist.default, aten._linalg_eigh.default, aten._linalg_svd.default, aten.linalg_qr.default,
    aten.im2col.default, aten.col2im.default, aten.renorm.default, aten.scatter.reduce, aten.scatter.value_reduce,
    aten.scatter_reduce.two, aten.searchsorted.Tensor, F.embedding_bag, aten.multi_margin_loss.default,
    aten.multilabel_margin_loss.default, aten.ctc_loss.Tensor, aten.repeat_interleave.self_Tensor, aten.unfold.default,
    aten.diagonal.default, aten.diag_embed.default,
}  # fmt: skip
"""Operators that DTensor has no rule for, or computes otherwise with every split of ours."""

WIDER: dict[Any, str] = {
    **dict.fromkeys(
        (
            aten.max.default, aten.min.default, aten.amax.default, aten.amin.default, aten.all.default, aten.all.dim,
            aten.any.default, aten.any.dim, aten.prod.default, aten.prod.dim_int, aten.linalg_vector_norm.default,
            aten.norm.ScalarOpt_dim, aten.aminmax.default,
        ),
        "what is pending over the ranks is no sum of numbers: a maximum, a product, a norm; no type of ours says that",
    ),
    **dict.fromkeys(
        (aten.mean.default, aten.mean.dim, aten.adaptive_avg_pool1d.default),
        "a mean over a fixed size is a normalization's, which is cheaper whole",
    ),
    aten.rot90.default: "places of an image, which no axis splits",
    aten.bucketize.Tensor: "boundaries are few",
}  # fmt: skip
"""Operators that DTensor splits where we keep them whole, and why."""

KNOWN = tuple(dict.fromkeys([*CASES, *(operator for operator, _ in POINTWISE)]))


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield init_device_mesh("cpu", (RANKS,))
    dist.destroy_process_group()


def _examples(operator: Any) -> list[Example]:
    cases = [case() for case in CASES.get(operator, ())]
    cases += [(args, {}) for pointwise, args in POINTWISE if pointwise is operator]
    return [example(operator, args, kwargs, fixed=FIXED.get(operator, ())) for args, kwargs in cases]


def _is_whole(types: tuple[Type, ...]) -> bool:
    return not any(type_.is_split or type_ == P for type_ in types)


def _compare(cases: list[Example], mesh: DeviceMesh) -> tuple[int, list[str]]:
    """How many rows DTensor says something about, apart from those that have everything whole; and what it denies."""
    pairs = [(row, answer(case, row, mesh)) for case in cases for row in rows(case, DEFAULT_RULES)]
    compared = sum(said.results is not None and not _is_whole(row.operands) for row, said in pairs)
    return compared, [line for _, said in pairs for line in said.contradictions]


@pytest.mark.parametrize("operator", KNOWN, ids=lambda op: op.__name__)
def test_rule_is_not_contradicted(operator: Any, mesh: DeviceMesh) -> None:
    compared, contradictions = _compare(_examples(operator), mesh)
    assert (compared > 0) is (operator not in SILENT), f"DTensor says something of {compared} rows: see SILENT"
    if operator not in EXPLAINED:
        assert contradictions == []
    else:
        assert contradictions, "this needs no explanation any more"


NEEDS_MORE = {
    aten.clamp.default, aten.clamp.Tensor, aten.clip.default, aten.clip.Tensor, aten.div.Scalar_mode,
    aten.div.Tensor_mode, aten.round.decimals, aten.equal.default,
}  # fmt: skip
"""Pointwise operators that do not run on the arguments which their schema demands, or give no tensor."""


def _pointwise_of_dtensor() -> list[Any]:
    propagator = DTensor._op_dispatcher.sharding_propagator
    tables = {*propagator.op_strategy_funcs, *propagator.op_single_dim_strategy_funcs, *propagator.op_to_rules}
    return sorted(
        (
            operator
            for operator in tables - set(KNOWN) - NEEDS_MORE
            if operator.namespace == "aten" and is_pointwise(operator) and not operator._schema.is_mutable
        ),
        key=str,
    )


NUMBERS = {"number": 2, "float": 0.5, "int": 1, "bool": False}


def _any_example(operator: Any) -> Example:
    """A call with broadcast operands: of floats, or of integers where it takes no floats."""
    required = [str(a.type) for a in operator._schema.arguments if not a.has_default_value() and not a.kwarg_only]
    for dtype in (torch.float64, torch.int64):
        shapes = iter([(4, 6), (6,), (4, 1)])
        args = [NUMBERS[kind] if kind in NUMBERS else torch.ones(next(shapes), dtype=dtype) for kind in required]
        with contextlib.suppress(RuntimeError):
            return example(operator, args, {})
    raise AssertionError(f"{operator} does not run on {required}: see NEEDS_MORE")


def test_pointwise_operators_are_not_contradicted(mesh: DeviceMesh) -> None:
    """Ours are those that torch tags so: all of them that DTensor has in its tables."""
    operators = _pointwise_of_dtensor()
    assert EXPLAINED.keys() <= {*KNOWN, *operators}
    for operator in operators:
        compared, contradictions = _compare([_any_example(operator)], mesh)
        assert compared, f"DTensor says nothing of {operator}"
        assert bool(contradictions) is (operator in EXPLAINED), f"{operator}: {contradictions}"


UNSEARCHED = {*_CONVOLUTIONS, aten.scaled_dot_product_attention.default}
"""DTensor takes convolutions however they lie, and goes through the parts of attention for minutes."""


@pytest.mark.parametrize("operator", [op for op in KNOWN if op not in UNSEARCHED], ids=lambda op: op.__name__)
def test_what_dtensor_splits_is_split(operator: Any, mesh: DeviceMesh) -> None:
    """Operands evenly split or whole, in every combination."""
    wider = []
    for case in _examples(operator):
        ours = {tuple(I if type_ == R else type_ for type_ in row.operands) for row in rows(case, DEFAULT_RULES)}
        choices = [[I, *(S(dim) for dim, n in enumerate(t.shape) if n % RANKS == 0)] for t in case.tensors]
        for types in itertools.product(*choices):
            if types not in ours and (results := derive(case, distributed(case, types, mesh))) is not None:
                wider.append(f"{', '.join(map(str, types))} -> {', '.join(str(r.placements[0]) for r in results)}")
    assert bool(wider) is (operator in WIDER), wider


@pytest.mark.parametrize(
    ("operator", "rule", "args", "line"),
    [
        (aten.mm.default, Rule("m k, k n -> n m"), ((6, 6), (6, 6)), "S(0), R -> S(1): result 0 is S(0)"),
        (aten.amax.default, Rule("m k -> m"), ((4, 6), [1]), "S(1) -> P: result 0 is P(max)"),
    ],
)
def test_a_wrong_rule_is_contradicted(operator: Any, rule: Rule, args: Any, line: str, mesh: DeviceMesh) -> None:
    tensors = [torch.ones(a) if isinstance(a, tuple) else a for a in args]
    case = example(operator, tensors, {})
    said = [answer(case, row, mesh) for row in rows(case, {operator: rule})]
    assert line in [text for one in said for text in one.contradictions]


def test_a_forgotten_conversion_is_contradicted(mesh: DeviceMesh) -> None:
    """An invariant weight beside split activations: its gradient is a sum over the ranks that nobody makes."""
    case = example(aten.mm.default, [torch.ones(4, 6), torch.ones(6, 8)], {})
    said = answer(case, Row(operands=(S(0), I), results=(S(0),)), mesh)
    assert said.contradictions == ["S(0), I -> S(0): the gradient of operand 1 is P(sum)"]
    assert answer(case, Row(operands=(S(0), R), results=(S(0),)), mesh).gradients == []
