"""Compiled blocks: one compilation for all instances, and backwards in two parts that equal the whole."""

import copy
import operator
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from meshwright.runtime import compiled
from meshwright.runtime.compiled import CompiledBlocks
from meshwright.runtime.deferred import Deferred, Running
from meshwright.runtime.groups import Groups
from meshwright.runtime.ordered import put_in_order
from meshwright.runtime.splitting import Part, take_apart

WIDTH = 8


class Block(nn.Module):
    """A norm, a bias, a weight that is used twice, a frozen one, and one that meets values without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.rand(WIDTH, dtype=torch.float64))
        self.up = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(WIDTH, dtype=torch.float64))
        self.twice = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.float64), requires_grad=False)
        self.place = nn.Parameter(torch.randn(WIDTH, dtype=torch.float64))

    def forward(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        hidden = F.layer_norm(x, (WIDTH,), self.norm)
        hidden = F.gelu(F.linear(hidden, self.up, self.bias)) + places * self.place
        return x + F.linear(F.linear(torch.tanh(F.linear(hidden, self.twice)), self.twice), self.frozen)


class Stage(nn.Module):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(num_layers))

    def forward(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, places)
        return x


def gradients(stage: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}


def whole_backward(stage: nn.Module, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of ``x``; parameters have theirs."""
    x = x.clone().requires_grad_()
    stage.zero_grad()
    stage(x, places).square().sum().backward()
    assert x.grad is not None
    return x.grad


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in b:
        assert (a[name] - b[name]).norm() <= 1e-12 * b[name].norm(), name


def count(part: Part, *operators: Any) -> int:
    return sum(len(part.graph.find_nodes(op="call_function", target=operator)) for operator in operators)


class Watched:
    """The parts of every backward graph, and what code is given when it runs, weakly."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.parts: list[tuple[Part, Part]] = []
        self.given: list[list[weakref.ref[torch.Tensor]]] = []
        inductor = compiled.inductor

        def watched_inductor(module: fx.GraphModule, inputs: Sequence[Any], **kind: Any) -> compiled.Boxed:
            code = inductor(module, inputs, **kind)

            def run(arguments: list[Any]) -> Any:
                self.given.append([weakref.ref(t) for t in arguments if type(t) is torch.Tensor])
                return code(arguments)

            return run

        def watched_apart(graph: fx.Graph, held: Sequence[bool], weights: Collection[str]) -> tuple[Part, Part] | None:
            parts = take_apart(graph, held, weights)
            assert parts is not None
            self.parts.append(parts)
            return parts

        monkeypatch.setattr(compiled, "inductor", watched_inductor)
        monkeypatch.setattr(compiled, "take_apart", watched_apart)


def test_split_backward_of_compiled_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """I then W give what the whole backward gives, each computes its own part only, and frees what it used."""
    torch.manual_seed(0)
    watched = Watched(monkeypatch)
    groups, running = Groups(sizes={}, rank=0, device=torch.device("cpu"), microbatches=1), Running()
    stage = Stage(3)
    eager = copy.deepcopy(stage)
    CompiledBlocks(groups=groups, running=running, splits=True).compile(stage)
    counters.clear()
    for length in (5, 7):
        x = torch.randn(3, length, WIDTH, dtype=torch.float64)
        places = torch.randn(length, WIDTH, dtype=torch.float64)
        to_x = whole_backward(eager, x, places)
        wanted = gradients(eager)
        same({"x": whole_backward(stage, x, places), **gradients(stage)}, {"x": to_x, **wanted})

        stage.zero_grad()
        own, deferred = x.clone().requires_grad_(), Deferred(stage.parameters(), running)
        with deferred.recording():
            roots = deferred.roots([stage(own, places).square().sum()])
        watched.given.clear()
        (found,) = deferred.backward_inputs(roots, [torch.ones((), dtype=torch.float64)], [own])
        assert found is not None and gradients(stage) == {}
        alive = [sum(t() is not None for t in given) for given in watched.given]
        assert len(alive) == 3 and all(0 < n < len(given) for n, given in zip(alive, watched.given, strict=True))
        deferred.backward_weights()
        same({"x": found, **gradients(stage)}, {"x": to_x, **wanted})
        assert len(watched.given) == 6
        left = {id(t()) for given in watched.given for t in given if t() is not None}
        assert left <= {id(own), id(places)}, "not freed"
    assert counters["stats"]["unique_graphs"] == 1, "three instances and two lengths are one graph"

    ((first, second),) = watched.parts
    products = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
    assert count(first, *products) == 4, "through frozen, twice (2) and up"
    assert count(second, *products) == 3, "of twice (2) and up"


def test_an_operator_with_a_mask_is_called_twice() -> None:
    """The backward of a convolution: each call computes what its part needs."""

    def backward(gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> Any:
        geometry = ([1], [0], [1], False, [0], 1, [True, True, True])
        return list(torch.ops.aten.convolution_backward.default(gradient, x, weight, [4], *geometry))

    arguments = torch.randn(2, 4, 5), torch.randn(2, 3, 6), torch.randn(4, 3, 2)
    whole = make_fx(backward, tracing_mode="fake")(*arguments)
    held, weights = [False, True, True], {whole.graph.find_nodes(op="placeholder")[2].name}
    parts = take_apart(whole.graph, held, weights)
    assert parts is not None
    masks = [next(n for n in part.graph.nodes if n.op == "call_function").args[-1] for part in parts]
    assert masks == [[True, False, False], [False, True, True]]
    wanted, found = backward(*arguments), [*map(run, parts, [arguments] * 2)]
    torch.testing.assert_close([*found[0], *found[1]], wanted)


def run(part: Part, arguments: Sequence[torch.Tensor]) -> Any:
    return fx.GraphModule({}, part.graph)(*(arguments[at] for at in part.takes))


def test_weights_are_read_by_the_first_part() -> None:
    """Under ZeRO-3 they are not there for the second, though only gradients of parameters need the product."""

    def backward(gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> Any:
        return gradient + 1, (gradient * weight.t()).sum(0), gradient * x

    whole = make_fx(backward, tracing_mode="fake")(*(torch.randn(3, 3) for _ in range(3)))
    gradient, x, weight = whole.graph.find_nodes(op="placeholder")
    parts = take_apart(whole.graph, [False, True, True], {weight.name})
    assert parts is not None
    assert [(part.takes, part.gives) for part in parts] == [((0, 2), (0,)), ((0, 1), (1, 2))]
    assert count(parts[0], torch.ops.aten.mul.Tensor) == count(parts[1], torch.ops.aten.mul.Tensor) == 1
    assert count(parts[1], torch.ops.aten.sum.dim_IntList) == 1


def test_communications_keep_their_order() -> None:
    """Each takes the token of the one before, whatever else it depends on."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    with FakeTensorMode():
        x.meta["val"] = torch.empty(4)
        for kind in ("all_reduce", "all_gather", "all_reduce"):
            node = graph.call_function(torch.ops.meshwright.communicate.default, (x, kind, "tp", 2, None))
            node.meta["val"] = torch.ops.meshwright.communicate(x.meta["val"], *node.args[1:])
    graph.output((x,))
    put_in_order(graph)
    first, second, third = graph.find_nodes(op="call_function", target=torch.ops.meshwright.communicate.default)
    for before, after in ((first, second), (second, third)):
        token = after.args[4]
        assert (token.target, token.args) == (operator.getitem, (before, 1)) and token.meta["val"].shape == (0,)
    assert [node.meta["val"][0].shape for node in (first, second)] == [(4,), (2, 4)]
