"""The backward in two parts equals the whole one: gradients, hooks, memory and work."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode

from meshwright.runtime import PlanError
from meshwright.runtime.deferred import Deferred
from tests import hard
from tests.custom import halve

Run = Callable[..., Any]
Found = tuple[list[torch.Tensor | None], dict[str, torch.Tensor | None], list[str]]


class Scaled(torch.autograd.Function):
    """A function of a user's own, which nothing but autograd sees."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        return gradient * weight, (gradient * x).sum((0, 1))


class Stage(nn.Module):
    """What the cases below are made of; x is (3, 5, 4)."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.square, self.other = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
        self.vector, self.bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.scale = nn.Parameter(torch.randn(()))
        self.table = nn.Parameter(torch.randn(7, 4))
        self.frozen = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.square_mask = nn.Buffer(torch.randn(4, 4))
        self.lstm = nn.LSTM(4, 4, num_layers=2, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.embed = nn.Embedding(7, 4, padding_idx=2)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.run(self, *inputs)


def _twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(torch.tanh(F.linear(torch.tanh(F.linear(x, m.square)), m.square)), m.square)


def _weight_norm(m: Any, x: torch.Tensor) -> torch.Tensor:
    weight = m.vector.unsqueeze(-1) * m.square / m.square.norm(dim=1, keepdim=True)
    return F.linear(torch.tanh(F.linear(x, weight)), weight) + weight.sum() * x.mean()  # type: ignore[no-any-return]


def _in_place(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y[:, 0] = m.vector
    y[:, 1:] += F.linear(x, m.square)[:, 1:]
    y.add_(m.bias)
    return torch.tanh(y) * m.scale  # type: ignore[no-any-return]


def _weight_that_becomes_data(m: Any, x: torch.Tensor) -> torch.Tensor:
    weight = m.square * 2.0
    first = F.linear(x, weight)
    changed = m.other * 3.0
    changed.t().add_(x.mean((0, 1)))
    return F.linear(first, changed)


def _without_grad(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        target = F.linear(x, m.square).softmax(-1)
    return F.linear(x, m.square) * target + (x @ m.other).detach() * m.scale  # type: ignore[no-any-return]


def _complex(m: Any, x: torch.Tensor) -> torch.Tensor:
    z = torch.complex(x, F.linear(x, m.square)) * torch.complex(m.vector, m.bias)
    z = torch.fft.ifft(torch.fft.fft(z, dim=-1) @ torch.complex(m.square, m.other), dim=-1)
    return z.abs() + z.real * z.imag  # type: ignore[no-any-return]


def _weight_results(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weight = m.square * m.scale
    return F.linear(x, weight), weight.exp(), m.vector, weight.t()


def _user_function(m: Any, x: torch.Tensor) -> Any:
    return Scaled.apply(F.linear(Scaled.apply(F.linear(x, m.square), m.vector), m.square), m.vector)  # type: ignore[no-untyped-call]


def _views(m: Any, x: torch.Tensor) -> torch.Tensor:
    alike = x * 1.0
    alike[0, :4].view_as(m.square).mul_(2.0)
    alike.to(m.square).unsqueeze(0).type_as(m.vector).add_(1.0)
    derived = m.vector * m.scale
    return F.linear(alike, m.square) * derived.expand_as(x) + x.type_as(m.vector) * derived  # type: ignore[no-any-return]


def _penalty(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, m.square).pow(2).mean() + 0.1 * m.square.pow(2).sum() + m.other.abs().mean()  # type: ignore[no-any-return]


def _several(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    values, indices = (x * m.vector).topk(2, dim=-1)
    y, mean, deviation = torch.native_layer_norm(x, (4,), m.vector, m.bias, 1e-5)
    left, right = torch.split(F.linear(x, m.square), 2, -1)
    return values, indices, y, left, (y > m.bias).sum(), torch.where(x > m.bias, x, m.scale)


def _lists(m: Any, x: torch.Tensor) -> torch.Tensor:
    token = m.vector.expand(3, 1, 4)
    y = torch.cat([token, x, m.table[:2].expand(3, -1, -1)], dim=1)
    return torch.einsum("bti,ij,jk->btk", y, m.square, m.other) + torch.stack([y.mean(1), m.table[:3]]).sum()


CASES: Mapping[str, Run] = {
    "a linear layer": lambda m, x: F.linear(x, m.square, m.bias),
    "a weight at sites that feed each other": _twice,
    "a weight as matrix and transposed": lambda m, x: torch.tanh(x @ m.square) @ m.square.t(),
    "a scaled weight": lambda m, x: F.linear(F.linear(x, m.square * m.scale), m.square * m.scale),
    "a derived weight that is shared": _weight_norm,
    "joined weights": lambda m, x: F.linear(x, torch.cat([m.square, m.other * m.scale])),
    "a weight in a weight's place": lambda m, x: F.linear(x, F.linear(m.square, m.other)),
    "a masked weight": lambda m, x: F.linear(x, m.square * m.square_mask),
    "a frozen weight with an adapter": lambda m, x: F.linear(x, m.frozen + m.square @ m.other),
    "frozen parameters alone": lambda m, x: F.linear(x, m.frozen),
    "a norm": lambda m, x: F.layer_norm(x, (4,), m.vector, m.bias),
    "a norm without its bias": lambda m, x: F.rms_norm(x, (4,), m.vector),
    "a batch norm": lambda m, x: m.norm(x.mT).mT,
    "a group norm": lambda m, x: F.group_norm(x.mT, 2, m.vector, m.bias),
    "a convolution": lambda m, x: m.conv(x.mT),
    "bilinear": lambda m, x: F.bilinear(x, x, m.table.unsqueeze(0).expand(4, 7, 4)[:, :4]),
    "prelu": lambda m, x: F.prelu(x.mT, m.vector),
    "one data operand at two places": lambda m, x: torch.addcmul(x, x, m.vector),
    "in lists": _lists,
    "several results": _several,
    "a recurrent layer": lambda m, x: m.lstm(x * m.vector),
    "attention with a bias": lambda m, x: F.scaled_dot_product_attention(x, x, x * m.vector, m.table[:5, None, 0]),
    "attention as a module": lambda m, x: m.attention(x, x, x)[0],
    "dropout": lambda m, x: F.linear(F.dropout(F.linear(x, m.square), 0.5), F.dropout(m.other, 0.25)),
    "complex numbers": _complex,
    "writes in place": _in_place,
    "a weight that becomes data": _weight_that_becomes_data,
    "a region without gradients": _without_grad,
    "views of operands": _views,
    "results that are weights": _weight_results,
    "a penalty on a weight": _penalty,
    "weights alone": lambda m, x: m.square.pow(2).sum(),
    "a result that nobody uses": lambda m, x: torch._foreach_mul([x, x], [m.vector, m.bias])[0],
    "iterated": lambda m, x: sum(F.linear(x, row.unsqueeze(0)) for row in m.square),
    "a custom operator": lambda m, x: halve(F.linear(halve(x, m.vector), m.square), m.vector),
    "a user's autograd function": _user_function,
    "an operator of torch.ops": lambda m, x: torch.ops.aten.mul.Tensor(torch.ops.aten.linear(x, m.square), m.scale),
    "results written in place": lambda m, x: F.linear(x, m.square).add_(1.0).mul_(x).relu_(),
    "no input": lambda m: F.embedding(torch.tensor([[1, 3], [3, 2]]), m.table, padding_idx=2) * m.scale,
    "tied embeddings": lambda m: F.linear(torch.tanh(m.embed(torch.tensor([1, 3, 2]))), m.embed.weight),
    "a bag of embeddings": lambda m: F.embedding_bag(torch.tensor([[1, 3], [3, 2]]), m.table),
}
"""Name -> what is hard: a function of a stage and its input."""

UNSEEN = {"writes in place", "a weight that becomes data", "a user's autograd function"}
"""Where weights are found in the large graph."""

AT_ONCE = {
    "in lists",
    "a recurrent layer",
    "attention with a bias",
    "attention as a module",
    "a custom operator",
}
"""Where an operator's gradients do not come apart."""


def build(name: str) -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    takes = CASES[name].__code__.co_argcount - 1
    return Stage(CASES[name]).double(), [torch.randn(3, 5, 4, dtype=torch.float64) for _ in range(takes)]


def flat(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for one in result for tensor in flat(one)]


@contextmanager
def watched(stage: nn.Module, accumulated: bool = True) -> Iterator[list[str]]:
    """The names of parameters whose gradients are accumulated, or computed at all."""
    called: list[str] = []
    hooks = []
    for name, p in stage.named_parameters():
        if p.requires_grad:
            register = p.register_post_accumulate_grad_hook if accumulated else p.register_hook
            hooks.append(register(partial(_note, called, name)))  # type: ignore[no-untyped-call]
    yield called
    for hook in hooks:
        hook.remove()


def _note(called: list[str], name: str, _: torch.Tensor) -> None:
    called.append(name)


def roots_of(result: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The results that need gradients, and random ones."""
    torch.manual_seed(5)
    roots = [tensor for tensor in flat(result) if tensor.requires_grad]
    return roots, [torch.randn_like(root) for root in roots]


def whole(stage: nn.Module, inputs: Sequence[torch.Tensor]) -> Found:
    with watched(stage) as called:
        torch.manual_seed(3)
        roots, gradients = roots_of(stage(*inputs))
        if roots:
            torch.autograd.backward(roots, gradients)
    return [x.grad for x in inputs if x.requires_grad], _taken(stage), called


def split(stage: nn.Module, inputs: Sequence[torch.Tensor], microbatches: int = 1, at_once: bool = False) -> Found:
    """All forwards, then all I, then all W. at_once: whether I may compute gradients of parameters."""
    with watched(stage) as called:
        waiting = []
        for _ in range(microbatches):
            deferred = Deferred([*stage.parameters(), *stage.buffers()])
            torch.manual_seed(3)
            with deferred.recording():
                result = stage(*inputs)
            waiting.append((deferred, roots_of(result)))
        wanted = [x for x in inputs if x.requires_grad]
        with watched(stage, accumulated=False) as early:
            for deferred, (roots, gradients) in waiting:
                found = deferred.backward_inputs(deferred.roots(roots), gradients, wanted)
        assert at_once or not early
        assert called == [] and all(p.grad is None for p in stage.parameters())
        for deferred, _ in waiting:
            deferred.backward_weights()
    assert all(x.grad is None for x in inputs)
    return list(found), _taken(stage), called


def _taken(stage: nn.Module) -> dict[str, torch.Tensor | None]:
    gradients = {name: p.grad for name, p in stage.named_parameters()}
    stage.zero_grad()
    return gradients


def assert_same(got: Found, wanted: Found) -> None:
    assert sorted(got[2]) == sorted(wanted[2])
    here, there = [*got[0], *got[1].values()], [*wanted[0], *wanted[1].values()]
    for a, b in zip(here, there, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("needed", [True, False], ids=["inner", "first"])
def test_equals_the_whole_backward(name: str, needed: bool) -> None:
    stage, inputs = build(name)
    for x in inputs:
        x.requires_grad_(needed)
    wanted = whole(stage, inputs)
    for x in inputs:
        x.grad = None
    assert_same(split(stage, inputs, at_once=name in AT_ONCE | UNSEEN), wanted)


def test_several_microbatches_in_flight() -> None:
    stage, inputs = build("a derived weight that is shared")
    _, wanted, _ = whole(stage, inputs)
    _, got, called = split(stage, inputs, microbatches=3)
    assert Counter(called) == {name: 3 for name, gradient in wanted.items() if gradient is not None}
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient if gradient is None else 3 * gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", hard.HARD)
def test_hard_models(name: str) -> None:
    model, batch = hard.build(name).double(), hard.batch(name)
    inputs = [x.double() if x.is_floating_point() else x for x in batch.values()]
    assert_same(split(model, inputs), whole(model, inputs))


def test_an_operator_that_writes_to_its_data_unseen_is_refused() -> None:
    def write(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if has_torch_function((x, weight)):
            return handle_torch_function(write, (x, weight), x, weight)
        return x.mul_(weight)

    stage, (x,) = build("a linear layer")
    with Deferred(stage.parameters()).recording(), pytest.raises(PlanError) as refused:
        write(F.linear(x, stage.get_parameter("square")), stage.get_parameter("vector"))
    assert str(refused.value) == (
        "write takes a parameter and writes to another operand, which the split backward of this schedule does not "
        "follow\n"
        "  let it return a new tensor, or take a schedule without W"
    )


# Memory


class Box:
    """Holds what autograd saves."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x))) + self.up.bias  # type: ignore[no-any-return]


def test_memory_is_freed_when_it_is_not_needed_any_more() -> None:
    stage, saved = nn.Sequential(Mlp(), Mlp()), weakref.WeakSet[Box]()
    storages: list[tuple[str, StorageWeakRef]] = []

    def pack(tensor: torch.Tensor) -> Box:
        saved.add(box := Box(tensor))
        return box

    def kept() -> list[str]:
        return [name for name, storage in storages if not storage.expired()]

    def watch(module: nn.Module, args: Any, result: torch.Tensor) -> None:
        storages.append((type(module).__name__, StorageWeakRef(result.untyped_storage())))

    for module in stage.modules():
        module.register_forward_hook(watch)
    x, deferred = torch.randn(2, 4, requires_grad=True), Deferred(stage.parameters())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor), deferred.recording():
        result = stage(x)
    activations = {box.tensor.untyped_storage().data_ptr() for box in saved} - {
        p.untyped_storage().data_ptr() for p in stage.parameters()
    }
    assert len(activations) == 4  # the input, two results of tanh, the input of the second layer
    assert kept() == ["Mlp", "Mlp", "Sequential"]  # not what goes into tanh, nor what the bias is added to
    gradient = torch.randn_like(result)
    before = {id(box) for box in saved}
    (found,) = deferred.backward_inputs(deferred.roots([result]), [gradient], [x])
    del result, gradient, found
    assert len(before) - len(saved) == 2  # of tanh, which share their storage with what linear layers keep
    assert kept() == ["Mlp"]
    deferred.backward_weights()
    assert not saved and not kept() and not deferred.pending and not deferred.weights


def test_what_a_bias_is_added_to_is_not_kept() -> None:
    stage, (x,) = build("a linear layer")
    deferred = Deferred(stage.parameters())
    with deferred.recording():
        y = torch.exp(x.requires_grad_())
        result = y + stage.get_parameter("bias")
        storage = StorageWeakRef(y.untyped_storage())
    del y
    assert not storage.expired()  # exp keeps its result for I
    deferred.backward_inputs(deferred.roots([result]), [result.detach()], [x])
    assert storage.expired()


# Work


class Counted(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


HEAVY = ("mm", "addmm", "bmm", "mul", "native_layer_norm_backward", "convolution_backward", "_scaled_dot_product")


def _heavy(counts: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if any(name.startswith(f"aten.{one}") for one in HEAVY)}


def test_nothing_is_computed_twice() -> None:
    stage = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)), nn.Linear(4, 4, bias=False))
    x = torch.randn(2, 3, 4, requires_grad=True)
    with Counted() as at_once:
        stage(x).sum().backward()
    with Counted() as forward, (deferred := Deferred(stage.parameters())).recording():
        loss = stage(x).sum()
    with Counted() as inputs:
        deferred.backward_inputs(deferred.roots([loss]), [torch.ones(())], [x])
    with Counted() as weights:
        deferred.backward_weights()
    assert _heavy(forward.counts) == {"aten.mm.default": 1, "aten.addmm.default": 5}
    assert _heavy(inputs.counts) == {"aten.mm.default": 6}
    assert _heavy(weights.counts) == {"aten.mm.default": 6}
    assert _heavy(at_once.counts) == _heavy(forward.counts + inputs.counts + weights.counts)


def test_gradients_of_derived_weights_wait_too() -> None:
    for name, products in {"a masked weight": 1, "a frozen weight with an adapter": 1, "joined weights": 1}.items():
        stage, (x,) = build(name)
        deferred = Deferred([*stage.parameters(), *stage.buffers()])
        with deferred.recording():
            result = stage(x.requires_grad_())
        with Counted() as inputs:
            deferred.backward_inputs(deferred.roots([result]), [result.detach()], [x])
        assert _heavy(inputs.counts) == {"aten.mm.default": products}


@pytest.mark.parametrize("name", sorted(AT_ONCE))
def test_what_does_not_come_apart_is_computed_once(name: str) -> None:
    stage, (x,) = build(name)
    x.requires_grad_()
    with Counted() as at_once:
        whole(stage, [x])
    x.grad = None
    with Counted() as in_parts:
        split(stage, [x], at_once=True)
    assert _heavy(at_once.counts) == _heavy(in_parts.counts)
