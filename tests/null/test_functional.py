"""In-place operators: the pure program computes what the model computes, gradients too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from meshwright import Mesh, UnsupportedError, compile_parallel
from meshwright.compiler.functional import functionalize

Program = Callable[[torch.Tensor], torch.Tensor]


class Model(nn.Module):
    """A program on the output of a layer."""

    def __init__(self, program: Program):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4).double()
        self.program = program

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.program(self.layer(x))


def _check(program: Program) -> None:
    """The functionalized export equals the model, and changes nothing in place."""
    model, x = Model(program), torch.linspace(-2, 3, 24, dtype=torch.float64).view(6, 4)
    exported = torch.export.export(model, (x,), strict=False)
    module = exported.graph_module
    functionalize(module.graph, {})
    module.graph.lint()
    module.recompile()
    for node in module.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable, node.format_node()
    given = {**dict(model.named_parameters()), **exported.constants}
    values = [given.get(spec.target or "", x) for spec in exported.graph_signature.input_specs]
    (got,), wanted = module(*values), model(x)
    parameters = list(model.parameters())
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    if wanted.requires_grad:
        found = torch.autograd.grad(got.sum(), parameters, allow_unused=True)
        for a, b in zip(found, torch.autograd.grad(wanted.sum(), parameters, allow_unused=True), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def _base_after_a_view(y: torch.Tensor) -> torch.Tensor:
    flat = y.reshape(-1)
    flat.add_(1.0)
    return (y * y).sum()


def _view_after_the_base(y: torch.Tensor) -> torch.Tensor:
    before, column = y.view(-1), y[:, 1]
    y.mul_(2.0)
    return before.sum() + (column * column).sum()


def _two_views(y: torch.Tensor) -> torch.Tensor:
    rows, columns = y[1:3], y.t()[:2]
    rows.add_(columns.t()[1:3].sum())
    columns.mul_(3.0)
    return (rows * rows).sum() + columns.pow(2).sum() + y.sum()


def _shift(y: torch.Tensor) -> torch.Tensor:
    """How T5 and BART make the decoder's input."""
    shifted = y.new_zeros(y.shape)
    shifted[:, 1:] = y[:, :-1].clone()
    shifted[:, 0] = 2.0
    shifted.masked_fill_(shifted == 2.0, 5.0)
    return (shifted * shifted).sum()


def _clone_is_apart(y: torch.Tensor) -> torch.Tensor:
    other = y.clone()
    other.zero_()
    other[y > 0] = 1.0
    return (other * y).sum()


def _what_it_returns(y: torch.Tensor) -> torch.Tensor:
    return (y.add_(1.0).mul_(2.0).unsqueeze(0).squeeze(0) * y).sum()


def _strided(y: torch.Tensor) -> torch.Tensor:
    y[::2, -1].copy_(y[1::2, 0].exp())
    return y.permute(1, 0).flatten().cumsum(0).sum()


PROGRAMS = (
    _base_after_a_view,
    _view_after_the_base,
    _two_views,
    _shift,
    _clone_is_apart,
    _what_it_returns,
    _strided,
)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_pure_programs_compute_the_same(program: Program) -> None:
    _check(program)


VIEWS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda v: v[1:], lambda v: v[0], lambda v: v.unsqueeze(0), lambda v: v.t() if v.ndim == 2 else v,
    lambda v: v.detach(), lambda v: v.reshape(-1), lambda v: v.clone(), lambda v: v.transpose(0, -1),
    lambda v: v[..., ::2], lambda v: v * 1.5,
)  # fmt: skip
WRITES: tuple[Callable[[torch.Tensor, torch.Tensor], Any], ...] = (
    lambda a, b: a.add_(b.sum()), lambda a, b: a.mul_(0.5), lambda a, b: a.copy_(b.mean()), lambda a, b: a.fill_(2.0),
    lambda a, b: a.sub_(a), lambda a, b: a.add_(b) if a.shape == b.shape else a.add_(1), lambda a, b: a.zero_(),
)  # fmt: skip


def _random(steps: list[tuple[bool, int, int, int]], y: torch.Tensor) -> torch.Tensor:
    values = [y, 3.0 * y]
    for writes, which, left, right in steps:
        a, b = values[left % len(values)], values[right % len(values)]
        if writes:
            WRITES[which % len(WRITES)](a, b)
        elif a.ndim and min(a.shape) > 1 or which % len(VIEWS) in (4, 6, 9):
            values.append(VIEWS[which % len(VIEWS)](a))
    return torch.stack([(i + 1) * value.sum() for i, value in enumerate(values)]).sum()


_STEP = st.tuples(st.booleans(), *(st.integers(0, 99) for _ in range(3)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(_STEP, min_size=2, max_size=8))
def test_random_programs_compute_the_same(steps: list[tuple[bool, int, int, int]]) -> None:
    def program(y: torch.Tensor) -> torch.Tensor:
        return _random(steps, y)

    x = torch.ones(6, 4, dtype=torch.float64)
    try:
        Model(program)(x).backward()
        _check(program)
    except UnsupportedError as error:
        assert "detach" in str(error), "a write through detach is not seen by autograd: refused"
    except RuntimeError as error:
        assert "does not require grad" in str(error) or "inplace" in str(error) or "in-place" in str(error)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.calls = torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.layer(x).sum()  # type: ignore[no-any-return]


class Out(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        torch.add(x, 1.0, out=y)
        return self.layer(y).sum()  # type: ignore[no-any-return]


class Broadcast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        z = y.squeeze(-1).unsqueeze(0).movedim(0, 1)
        z.add_(1.0)
        return y.sum()  # type: ignore[no-any-return]


def test_refusals() -> None:
    with pytest.raises(
        UnsupportedError, match=r"^add_ at test_functional.py:\d+ writes to 'calls', which is no buffer"
    ):
        compile_parallel(Counting(), Mesh(dp=2), example_inputs=(torch.randn(4, 4),))
    with pytest.raises(UnsupportedError, match="writes through aten.movedim.int, which cannot be taken back"):
        compile_parallel(Broadcast(), Mesh(dp=2), example_inputs=(torch.randn(4, 4),))
    with pytest.raises(UnsupportedError, match=r"^aten.add.out at test_functional.py:\d+ writes to an argument behind"):
        compile_parallel(Out(), Mesh(dp=2), example_inputs=(torch.randn(4, 4),))
