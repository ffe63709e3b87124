"""A mask becomes is_causal=True exactly when it is causal, and an element is what torch computes."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind
from torch.fx.experimental.proxy_tensor import make_fx

from meshwright.compiler.capture import capture
from meshwright.compiler.masks.causal import element, is_causal
from meshwright.compiler.masks.elements import Choice, Element, UnknownElement
from meshwright.compiler.masks.rules import RULES
from tests import models

aten = torch.ops.aten
Mask = Callable[[int], torch.Tensor]
Constants = Mapping[fx.Node, torch.Tensor]
INF = float("inf")
LOWEST = torch.finfo(torch.float32).min


class Made(nn.Module):
    """A value that is made from the length of the tokens alone."""

    def __init__(self, make: Mask):
        super().__init__()
        self.make = make

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.make(tokens.shape[1])


class Attention(nn.Module):
    """Attention under such a mask."""

    def __init__(self, mask: Mask):
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.mask = mask

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        y = self.project(x).unsqueeze(1)
        out = nn.functional.scaled_dot_product_attention(y, y, y, attn_mask=self.mask(tokens.shape[1]))
        return out.pow(2).mean()


def _made(make: Mask) -> tuple[fx.Node, Constants]:
    """A value in torch.export's own graph, before any normalization, and the constants of the graph."""
    batch = {"tokens": torch.zeros(3, 6, dtype=torch.int64)}
    dims = {0: Dim("B"), 1: Dim("T", min=3)}
    exported = torch.export.export(Made(make), (), batch, dynamic_shapes=dict.fromkeys(batch, dims), strict=False)
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    specs = zip(placeholders, exported.graph_signature.input_specs, strict=True)
    constants = {n: exported.constants[s.target] for n, s in specs if s.kind == InputKind.CONSTANT_TENSOR and s.target}
    tensors = {n: tensor for n, tensor in constants.items() if isinstance(tensor, torch.Tensor)}
    return exported.graph.output_node().args[0][0], tensors


def _indices(ndim: int) -> tuple[sympy.Symbol, ...]:
    return tuple(sympy.Symbol(f"at{dim}", integer=True, nonnegative=True) for dim in range(ndim))


def _value(found: Element, at: dict[sympy.Symbol, int], length: int) -> float:
    if isinstance(found, Choice):
        return _value(found.yes if _value(found.condition, at, length) else found.no, at, length)
    value = found.subs(at)
    value = value.subs(dict.fromkeys(value.free_symbols, length))  # what is left are sizes
    return bool(value) if value in (sympy.true, sympy.false) else float(value)


def _is_tril(mask: torch.Tensor) -> bool:
    """Whether a real mask is causal, read as attention reads it."""
    lowest = torch.finfo(mask.dtype).min if mask.dtype.is_floating_point else 0
    sees = mask if mask.dtype == torch.bool else mask == 0
    hides = ~sees if mask.dtype == torch.bool else mask <= lowest
    causal = torch.ones(mask.shape[-2:], dtype=torch.bool).tril().expand(mask.shape)
    return torch.equal(sees, causal) and torch.equal(hides, ~causal)


def _grid(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(length)[:, None], torch.arange(length)[None, :]


def _causal(length: int) -> torch.Tensor:
    query, key = _grid(length)
    return key <= query


def _ones(length: int, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    return torch.ones(length, length, dtype=dtype)


def _packed(start: int) -> Mask:
    """The mask of one packed sequence: a position that does not follow its neighbour begins another sequence."""

    def mask(length: int) -> torch.Tensor:
        positions = torch.arange(length).unsqueeze(0)
        breaks = torch.diff(positions, prepend=positions[:, :1] - start, dim=-1) != 1
        sequence = breaks.cumsum(-1)
        return (sequence[:, :, None] == sequence[:, None, :]) & _causal(length)

    return mask


def _looked_up(length: int) -> torch.Tensor:
    """Transformers' way: indices of one dim each, picked from what they say."""
    query, key = torch.arange(length)[None, None, :, None], torch.arange(length)[None, None, None, :]
    row = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    seen = torch.ones(1, length, dtype=torch.bool)
    sequence = torch.zeros(1, length, dtype=torch.int64)
    return (key <= query) & seen[row, key] & (sequence[row, query] == sequence[row, key])


CAUSAL: dict[str, Mask] = {
    "key <= query": _causal,
    "query >= key": lambda n: _grid(n)[0] >= _grid(n)[1],
    "key < query + 1": lambda n: _grid(n)[1] < _grid(n)[0] + 1,
    "not after": lambda n: ~(_grid(n)[1] > _grid(n)[0]),
    "before or at": lambda n: (_grid(n)[1] < _grid(n)[0]) | (_grid(n)[1] == _grid(n)[0]),
    "two bounds": lambda n: _causal(n) & (_grid(n)[1] <= _grid(n)[0] + 3),
    "twice": lambda n: 2 * _grid(n)[1] <= 2 * _grid(n)[0] + 1,
    "and with ones": lambda n: _ones(n) & _causal(n),
    "one packed sequence": _packed(1),
    "looked up": _looked_up,
    "positions counted": lambda n: torch.ones(n, dtype=torch.int64).cumsum(-1)[None, :] - 1 <= _grid(n)[0],
    "joined": lambda n: _causal(n) & (torch.cat([torch.zeros(1), torch.zeros(n - 1)])[None] == 0),
    "where": lambda n: torch.where(_grid(n)[1] > _grid(n)[0], torch.zeros(n, n), torch.ones(n, n)) != 0,
    "number and back": lambda n: _causal(n).to(torch.int64) > 0,
    "tril": lambda n: torch.tril(_ones(n)),
    "tril of numbers": lambda n: ~(torch.tril(_ones(n, torch.float32)).view(1, 1, n, n) == 0),
    "in half precision": lambda n: torch.tril(_ones(n, torch.bfloat16)).to(torch.bool),
    "in every row and head": lambda n: _causal(n)[None, None].expand(3, 2, n, n),
    "bias of where": lambda n: torch.where(_causal(n), 0.0, -INF),
    "bias of the lowest": lambda n: torch.full((n, n), LOWEST).masked_fill(_causal(n), 0.0),
    "bias of triu": lambda n: torch.triu(torch.full((n, n), -INF), diagonal=1),
    "bias of a product": lambda n: (1.0 - torch.tril(_ones(n, torch.float32))) * LOWEST,
    "half bias": lambda n: torch.zeros(n, n, dtype=torch.bfloat16).masked_fill(~_causal(n), -INF),
}

OTHER: dict[str, Mask] = {
    "strictly before": lambda n: _grid(n)[1] < _grid(n)[0] + 0,
    "key >= query": lambda n: _grid(n)[1] >= _grid(n)[0],
    "window": lambda n: _causal(n) & (_grid(n)[1] > _grid(n)[0] - 3),
    "one ahead": lambda n: _grid(n)[1] <= _grid(n)[0] + 1,
    "one hole": lambda n: _causal(n) & ~(_grid(n)[1] + 4 == _grid(n)[0]),
    "prefix": lambda n: _causal(n) | (_grid(n)[1] < 2),
    "everything": _ones,
    "nothing": lambda n: ~_ones(n),
    "transposed": lambda n: torch.triu(_ones(n)),
    "every other": lambda n: torch.arange(2 * n)[::2][None, :] <= _grid(n)[0],
    "rounded": lambda n: _grid(n)[1].to(torch.bfloat16) <= _grid(n)[0].to(torch.bfloat16),
    "counted in halves": lambda n: torch.arange(n, dtype=torch.float16)[None, :] <= _grid(n)[0],
    "wrapped": lambda n: _grid(n)[1] <= _grid(n)[0] + (torch.zeros(n, 1, dtype=torch.uint8) - 1) + 1,
    "bits": lambda n: (_grid(n)[1] & 1) <= (_grid(n)[0] & 1),
    "truth and number": lambda n: _causal(n) & (_ones(n) != _ones(n, torch.int64)),
    "bias that weighs": lambda n: torch.where(_causal(n), 0.0, -10000.0),
    "bias upside down": lambda n: torch.where(_causal(n), -INF, 0.0),
    "bias of ones": lambda n: torch.where(_causal(n), 1.0, -INF),
    "not a number": lambda n: torch.tril(_ones(n, torch.float32)) * -INF,
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_mask_is_proven(name: str) -> None:
    assert all(_is_tril(CAUSAL[name](length)) for length in (2, 7, 300))
    node, constants = _made(CAUSAL[name])
    assert is_causal(node, constants)
    if node.meta["val"].ndim == 2:
        _assert_equal_to_torch(node, constants, CAUSAL[name], (3, 6))


@pytest.mark.parametrize("name", OTHER)
def test_other_masks_stay(name: str) -> None:
    assert not _is_tril(OTHER[name](3000 if name == "counted in halves" else 300))
    assert not is_causal(*_made(OTHER[name]))


def _inplace_fill(length: int) -> torch.Tensor:
    mask = _causal(length)
    mask[:, 2] = False
    return mask


def _inplace_through_a_view(length: int) -> torch.Tensor:
    mask = _causal(length)
    mask.movedim(0, 1)[0].fill_(False)
    return mask


def _inplace_on_the_positions(length: int) -> torch.Tensor:
    positions = torch.arange(length)
    mask_positions = positions.unsqueeze(0)
    positions.add_(1)
    return mask_positions <= torch.arange(length)[:, None]


def _inplace_without_gradient(length: int) -> torch.Tensor:
    mask = _causal(length)
    with torch.no_grad():
        mask.logical_not_()
    return mask


INPLACE = (_inplace_fill, _inplace_through_a_view, _inplace_on_the_positions, _inplace_without_gradient)


@pytest.mark.parametrize("mask", INPLACE, ids=lambda mask: mask.__name__)
def test_a_mask_changed_in_place_stays(mask: Mask) -> None:
    assert not _is_tril(mask(6))
    assert not is_causal(*_made(mask))


def test_no_grad_region_that_only_reads_is_no_change() -> None:
    def mask(length: int) -> torch.Tensor:
        positions = torch.arange(length)
        with torch.no_grad():
            positions.to(torch.float32)
        return positions[None, :] <= positions[:, None]

    assert is_causal(*_made(mask))


def test_queries_and_keys_are_equally_many() -> None:
    assert not is_causal(*_made(lambda n: torch.arange(n)[None, :] <= torch.arange(n - 1)[:, None]))
    assert not is_causal(*_made(lambda n: torch.arange(n)[None, :] <= torch.arange(1)[:, None]))
    assert not is_causal(*_made(lambda n: torch.ones(1, 1, dtype=torch.bool).tril()))
    assert not is_causal(*_made(lambda n: torch.arange(n) <= 5))


def test_constants_count_when_they_are_given() -> None:
    node, constants = _made(lambda n: _causal(n) & torch.tensor([True]))
    assert constants
    assert is_causal(node, constants)
    assert not is_causal(node)
    assert not is_causal(*_made(lambda n: _causal(n) & torch.tensor([False])))
    assert not is_causal(*_made(lambda n: _grid(n)[1] <= _grid(n)[0] + torch.tensor([1])))


def _of_one(operator: Any, *others: Any, **options: Any) -> Mask:
    return lambda n: operator(2 * _grid(n)[1] - _grid(n)[0] + 1, *others, **options)


def _of_two(operator: Any) -> Mask:
    return lambda n: operator(*_grid(n))


def _of_truths(operator: Any) -> Mask:
    return lambda n: operator(_causal(n), _grid(n)[1] < 2)


def _count(n: int) -> torch.Tensor:
    return torch.arange(n * 2).reshape(1, n * 2)


ROWS: dict[Any, tuple[Mask, ...]] = {
    aten.arange.default: (lambda n: aten.arange(n),),
    aten.arange.start: (lambda n: aten.arange(3, n + 3),),
    aten.arange.start_step: (lambda n: aten.arange(3, 3 * n + 3, 3),),
    aten.ones.default: (lambda n: aten.ones([n, 2]),),
    aten.ones_like.default: (lambda n: aten.ones_like(_causal(n)),),
    aten.new_ones.default: (lambda n: aten.new_ones(_causal(n), [n, 1]),),
    aten.zeros.default: (lambda n: aten.zeros([n, 2], dtype=torch.bool),),
    aten.zeros_like.default: (lambda n: aten.zeros_like(_causal(n)),),
    aten.new_zeros.default: (lambda n: aten.new_zeros(_causal(n), [n, 1]),),
    aten.full.default: (lambda n: aten.full([n], -INF), lambda n: aten.full([n], 7), lambda n: aten.full([n], True)),
    aten.full_like.default: (lambda n: aten.full_like(_causal(n), 0.5, dtype=torch.bfloat16),),
    aten.new_full.default: (lambda n: aten.new_full(_causal(n), [n], True),),
    aten.scalar_tensor.default: (lambda n: aten.scalar_tensor(4, dtype=torch.int64),),
    aten.unsqueeze.default: (lambda n: aten.unsqueeze(_causal(n), -1), lambda n: aten.unsqueeze(_causal(n), 1)),
    aten.squeeze.default: (lambda n: aten.squeeze(_grid(n)[0][None]),),
    aten.squeeze.dim: (lambda n: aten.squeeze.dim(_grid(n)[0][None], -1),),
    aten.squeeze.dims: (lambda n: aten.squeeze.dims(_grid(n)[0][None], [0, 2]),),
    aten.view.default: (lambda n: aten.view(_causal(n), [n, 1, n, 1]),),
    aten.reshape.default: (lambda n: aten.reshape(_causal(n)[None], [n, n]),),
    aten.expand.default: (lambda n: aten.expand(_grid(n)[0], [2, n, n]),),
    aten.expand_as.default: (lambda n: aten.expand_as(_grid(n)[1], _causal(n)),),
    aten.broadcast_to.default: (lambda n: aten.broadcast_to(_grid(n)[0], [n, n]),),
    aten.to.dtype: (_of_one(aten.to.dtype, torch.bool), lambda n: aten.to.dtype(_causal(n), torch.float16)),
    aten.to.device: (_of_one(aten.to.device, "cpu", torch.int64),),
    aten.to.dtype_layout: (_of_one(aten.to.dtype_layout, dtype=torch.bool),),
    aten.to.other: (lambda n: aten.to.other(_causal(n), torch.arange(n)),),
    aten._to_copy.default: (lambda n: aten._to_copy(_causal(n), dtype=torch.float64),),
    aten.clone.default: (_of_one(aten.clone),),
    aten.contiguous.default: (_of_one(aten.contiguous),),
    aten.alias.default: (_of_one(aten.alias),),
    aten.lift_fresh_copy.default: (_of_one(aten.lift_fresh_copy),),
    aten.detach.default: (_of_one(aten.detach),),
    aten.detach_.default: (lambda n: aten.detach_(_causal(n)),),
    aten.slice.Tensor: (lambda n: aten.slice(_grid(n)[0], 0, 1, n), lambda n: aten.slice(_count(n), -1, 1, None, 3)),
    aten.index.Tensor: (
        lambda n: aten.index(_causal(n), [torch.arange(n), torch.arange(n)]),
        lambda n: aten.index(_causal(n), [None, torch.arange(n)]),
        lambda n: aten.index(_causal(n), [torch.arange(n)[:, None], torch.arange(n)[None, :]]),
        lambda n: aten.index(_causal(n)[:, None], [torch.arange(n), None, torch.arange(n)]),
        lambda n: aten.index(_causal(n)[:, None], [None, torch.zeros(2, 1, dtype=torch.int64), torch.arange(n)]),
    ),
    aten.cat.default: (lambda n: aten.cat([torch.ones(2, 3), torch.ones(n, 3, dtype=torch.bool)]),),
    aten.cumsum.default: (
        lambda n: aten.cumsum(torch.ones(2, n, dtype=torch.bool), -1),
        lambda n: aten.cumsum(_causal(n)[:, :, None].expand(n, n, 3), 2),
    ),
    aten.diff.default: (
        lambda n: aten.diff(torch.arange(n), 1, -1, torch.tensor([4])),
        lambda n: aten.diff(torch.arange(n) * 2 + _grid(n)[0], 1, 0, torch.zeros(1, n, dtype=torch.int64)),
    ),
    aten.tril.default: (lambda n: aten.tril(_ones(n, torch.int64), -1), lambda n: aten.tril(_grid(n)[0].expand(n, n))),
    aten.triu.default: (lambda n: aten.triu(torch.full((n, n), -INF), 1), lambda n: aten.triu(_ones(n))),
    aten.where.self: (
        lambda n: aten.where(_causal(n), *_grid(n)),
        lambda n: aten.where(_causal(n), _ones(n), ~_ones(n)),
    ),
    aten.where.ScalarSelf: (lambda n: aten.where.ScalarSelf(_causal(n), 4, _grid(n)[0]),),
    aten.where.ScalarOther: (lambda n: aten.where.ScalarOther(_causal(n), _grid(n)[1], 4),),
    aten.where.Scalar: (lambda n: aten.where.Scalar(_causal(n), 1.0, -INF),),
    aten.masked_fill.Scalar: (lambda n: aten.masked_fill.Scalar(torch.zeros(n, n), _causal(n), LOWEST),),
    aten.masked_fill.Tensor: (
        lambda n: aten.masked_fill.Tensor(_causal(n), _grid(n)[1] == 1, torch.ones((), dtype=torch.bool)),
    ),
    **{op: (_of_two(op),) for op in (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor)},
    aten.mul.Tensor: (_of_one(aten.mul, torch.tensor([3])), lambda n: aten.mul(_causal(n), _grid(n)[0])),
    **{op: (_of_one(op, 3),) for op in (aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar, aten.mul.Scalar)},
    **{
        getattr(aten, name).Tensor: (
            _of_two(getattr(aten, name)),
            lambda n, name=name: getattr(aten, name)(_causal(n), _ones(n, torch.int64)),  # type: ignore[misc]
            lambda n, name=name: getattr(aten, name)(_causal(n), _grid(n)[0] < 2),  # type: ignore[misc]
        )
        for name in ("eq", "ne", "le", "lt", "ge", "gt")
    },
    **{getattr(aten, name).Scalar: (_of_one(getattr(aten, name), 1),) for name in ("eq", "ne", "le", "lt", "ge", "gt")},
    **{
        op: (_of_truths(op),)
        for name in ("and", "or", "xor")
        for op in (getattr(aten, f"bitwise_{name}").Tensor, getattr(aten, f"__{name}__").Tensor)
    },
    aten.logical_and.default: (_of_truths(aten.logical_and), _of_two(aten.logical_and)),
    aten.logical_or.default: (_of_truths(aten.logical_or), _of_two(aten.logical_or)),
    aten.logical_xor.default: (_of_truths(aten.logical_xor), _of_two(aten.logical_xor)),
    aten.bitwise_not.default: (lambda n: aten.bitwise_not(_causal(n)),),
    aten.logical_not.default: (lambda n: aten.logical_not(_causal(n)), _of_one(aten.logical_not)),
}


def _assert_equal_to_torch(node: fx.Node, constants: Constants, make: Mask, lengths: tuple[int, ...]) -> None:
    """Every element of the value, at every place and length, is what torch computes."""
    indices = _indices(node.meta["val"].ndim)
    found = element(node, indices, constants)
    for length in lengths:
        real = make(length)
        for place in itertools.product(*(range(size) for size in real.shape)):
            at = dict(zip(indices, place, strict=True))
            assert _value(found, at, length) == real[place].item(), (length, place, found)


def test_every_row_of_the_table_is_tried() -> None:
    assert set(ROWS) == set(RULES)


@pytest.mark.parametrize("target", ROWS, ids=str)
def test_elements_are_what_torch_computes(target: Any) -> None:
    for make in ROWS[target]:
        node, constants = _made(make)
        assert target in {n.target for n in node.graph.nodes}
        _assert_equal_to_torch(node, constants, make, (3, 5))


_DTYPES = (torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16)
_LEAVES = (
    lambda n: _grid(n)[0], lambda n: _grid(n)[1], lambda n: _ones(n), lambda n: torch.zeros(n, 1, dtype=torch.uint8),
    lambda n: torch.full((1, n), -1), lambda n: torch.full((n, 1), -INF), lambda n: torch.full((n, 1), 0.5),
)  # fmt: skip
_PAIRS = (
    torch.add, torch.mul, torch.sub, torch.rsub, torch.le, torch.lt, torch.ge, torch.gt, torch.eq, torch.ne,
    torch.bitwise_and, torch.logical_and, torch.logical_or, torch.logical_xor,
    lambda a, b: torch.where(a != 0, a, b), lambda a, b: torch.index_select(a, 0, b[:1, 0]),
    lambda a, b: torch.cumsum(a + 0 * b, 1), lambda a, b: torch.cat([a + 0 * b, b + 0 * a]),
    lambda a, b: a[torch.clamp(b, 0, 0), 0], lambda a, b: torch.diff(a + 0 * b, prepend=(b + 0 * a)[:, :1]),
)  # fmt: skip
_SINGLES = (
    *(lambda a, dtype=dtype: a.to(dtype) for dtype in _DTYPES), torch.logical_not, torch.tril, torch.triu,
    lambda a: a + 1, lambda a: a - 1, lambda a: a * 2, lambda a: 1 - a, lambda a: a[1:], lambda a: a[..., ::2],
    lambda a: torch.triu(a, 1), lambda a: a.masked_fill(a == 0, 1),
)  # fmt: skip


def _run(steps: list[tuple[int, int, int]], length: int) -> torch.Tensor:
    """The last value of a program: an operator and the values it takes, counted from the last, for each step."""
    values = [leaf(length) for leaf in _LEAVES]  # type: ignore[no-untyped-call]
    for which, left, right in steps:
        operators = (*_PAIRS, *_SINGLES)
        chosen = operators[which % len(operators)]
        operands = [values[-1 - left % len(values)], values[-1 - right % len(values)]][: 1 + (chosen in _PAIRS)]
        values.append(chosen(*operands))  # type: ignore[operator]
    return values[-1]


def _is_accepted(steps: list[tuple[int, int, int]]) -> bool:
    try:
        _run(steps, 5)
    except (RuntimeError, IndexError, TypeError, NotImplementedError):
        return False
    return True


@st.composite
def _programs(draw: st.DrawFn) -> Mask:
    """A program of a few operators on what a mask is made of, without those that torch refuses."""
    steps: list[tuple[int, int, int]] = []
    for _ in range(draw(st.integers(1, 7))):
        step = draw(st.tuples(*(st.integers(0, 99) for _ in range(3))))
        steps += [step] if _is_accepted([*steps, step]) else []
    return lambda length: _run(steps, length)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(_programs())
def test_elements_of_random_programs_are_what_torch_computes(program: Mask) -> None:
    length = 5
    node = make_fx(lambda: program(length), tracing_mode="fake")().graph.output_node().args[0]
    assert isinstance(node, fx.Node)
    try:
        _assert_equal_to_torch(node, {}, program, (length,))
    except UnknownElement:
        assert not is_causal(node)
        return
    real = program(length)
    if real.ndim == 2 and real.shape[0] == real.shape[1] > 1 and is_causal(node):
        assert _is_tril(real)


def _mistral(window: int | None) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return MistralForCausalLM(
        MistralConfig(vocab_size=models.VOCABULARY, num_hidden_layers=1, sliding_window=window, **sizes)
    )


def _llama_packed() -> Any:
    model: Any = models.llama(num_layers=1)
    model.config.use_cache = False  # then Transformers looks for packed sequences in the positions
    return model


TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], str, bool]] = {
    "llama": (lambda: models.llama(num_layers=1), "plain", True),
    "llama, packed sequences": (_llama_packed, "plain", True),
    "gpt2": (lambda: models.gpt2(num_layers=1), "plain", True),
    "falcon": (lambda: models.falcon(num_layers=1), "plain", True),
    "mistral": (lambda: _mistral(None), "plain", True),
    "llama, padded": (lambda: models.llama(num_layers=1), "padded", False),
    "llama, packed sequences, padded": (_llama_packed, "padded", False),
    "mistral, sliding window": (lambda: _mistral(3), "plain", False),
}


def _attention_of(module: nn.Module, batch: dict[str, torch.Tensor]) -> fx.Node:
    graph = capture(module, batch).function.graph
    return next(n for n in graph.nodes if n.target is aten.scaled_dot_product_attention.default)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_capture_sets_the_flag_in_transformers(name: str) -> None:
    build, kind, proven = TRANSFORMERS[name]
    node = _attention_of(build(), models.batch("llama", kind))
    assert bool(node.kwargs.get("is_causal")) is proven and len(node.args) == (3 if proven else 4)


@pytest.mark.parametrize("name", ["key <= query", "one packed sequence", "bias of triu"])
def test_capture_sets_the_flag(name: str) -> None:
    batch = {"x": torch.randn(4, 6, 8), "tokens": torch.zeros(4, 6, dtype=torch.int64)}
    node = _attention_of(Attention(CAUSAL[name]), batch)
    assert node.kwargs.get("is_causal") is True and len(node.args) == 3
    node = _attention_of(Attention(OTHER["window"]), batch)
    assert not node.kwargs.get("is_causal") and len(node.args) == 4
