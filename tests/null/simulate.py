"""A typed program run with all ranks as threads of one process: numbers without runtime, emission or processes.

Microbatches are simulated as one more axis of ranks, which is what the types say they are.
"""

import itertools
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_aggregate

from meshwright.compiler.blocks import Blocks
from meshwright.compiler.graph import Capture, Function, Value
from meshwright.compiler.types import Type
from meshwright.runtime import collectives as real
from meshwright.runtime.layout import shard_bounds

aten = torch.ops.aten
Coordinates = Mapping[str, int]


def cut(tensor: torch.Tensor, types: Mapping[str, Type], at: Coordinates, sizes: Mapping[str, int]) -> torch.Tensor:
    """The piece of a whole tensor that the rank at ``at`` holds."""
    for axis, type_ in types.items():
        if axis in sizes and type_.is_split:
            tensor = _piece(tensor, type_.dim, int(type_.groups), at[axis], sizes[axis])
    return tensor


def _piece(tensor: torch.Tensor, dim: int, groups: int, index: int, pieces: int) -> torch.Tensor:
    blocks = tensor.chunk(groups, dim)
    return torch.cat([block.chunk(pieces, dim)[index] for block in blocks], dim)


def _whole(parts: list[torch.Tensor], dim: int, groups: int) -> torch.Tensor:
    blocks = zip(*(part.chunk(groups, dim) for part in parts), strict=True)
    return torch.cat([piece for block in blocks for piece in block], dim)


@dataclass
class World:
    """The meeting place of the ranks: everyone puts a tensor down and reads what its group put down."""

    sizes: Mapping[str, int]
    barrier: threading.Barrier = field(init=False)
    table: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(math.prod(self.sizes.values()), timeout=60)

    def exchange(self, at: Coordinates, axis: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        here = tuple(at[a] for a in self.sizes)
        position = list(self.sizes).index(axis)
        self.table[here] = tensor.detach()
        self.barrier.wait()
        group = [self.table[(*here[:position], i, *here[position + 1 :])] for i in range(self.sizes[axis])]
        self.barrier.wait()
        return group


class _Convert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: Any, backward: Any) -> torch.Tensor:
        ctx.backward_of = backward
        result: torch.Tensor = forward(x)
        return result.view_as(result) if result is x else result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.backward_of(grads[0].contiguous()), None, None


class Rank:
    """One thread's interpreter."""

    def __init__(
        self,
        world: World,
        blocks: Blocks,
        at: Coordinates,
        symbols: Mapping[sympy.Symbol, int],
        tensors: Mapping[str, torch.Tensor],
        capture: Capture,
    ):
        self.world, self.blocks, self.at, self.symbols = world, blocks, at, dict(symbols)
        self.tensors, self.capture = tensors, capture
        self.leaves: dict[str, torch.Tensor] = {}

    def size(self, size: Any) -> int:
        return int(size.subs(self.symbols)) if isinstance(size, sympy.Expr) else int(size)

    def local(self, value: Value) -> tuple[int, ...]:
        shape = [self.size(s) for s in value.shape]
        for axis, type_ in value.types.items():
            if type_.is_split:
                start, stop = shard_bounds(shape[type_.dim], self.at[axis], self.world.sizes[axis])
                shape[type_.dim] = stop - start
        return tuple(shape)

    def run(self, function: Function, inputs: Mapping[str, torch.Tensor], prefix: str = "") -> tuple[torch.Tensor, ...]:
        env: dict[fx.Node, Any] = {}
        for node in function.graph.nodes:
            value = function.values.get(node)
            if node.op == "placeholder":
                env[node] = inputs[str(node.target)]
            elif node.op == "get_attr":
                env[node] = self.attribute(prefix + str(node.target), value)
            elif node.op == "call_module":
                block = self.blocks.of(str(node.target))
                names = [str(n.target) for n in block.function.inputs()]
                given = dict(zip(names, (env[n] for n in node.args), strict=True))
                results = self.run(block.function, given, f"{node.target}.")
                env[node] = results[0] if node in function.values else results
            elif node.op == "output":
                return tuple(env[n] for n in node.args[0])
            else:
                env[node] = self.call(function, node, env, value)
            if value is not None and isinstance(env[node], torch.Tensor):
                assert tuple(env[node].shape) == self.local(value), (node.format_node(), env[node].shape, value)
        raise AssertionError("no output")

    def attribute(self, name: str, value: Value | None) -> torch.Tensor:
        assert value is not None
        if name not in self.leaves:
            owner, segment = self.capture.segments.get(name, (name, None))
            whole = self.tensors[owner]
            if segment is not None:
                whole = whole.narrow(segment.dim, segment.start, segment.length)
            piece = cut(whole, value.types, self.at, self.world.sizes).detach().clone()
            self.leaves[name] = piece.requires_grad_(value.grad)
        return self.leaves[name]

    def call(self, function: Function, node: fx.Node, env: Mapping[fx.Node, Any], value: Value | None) -> Any:
        def argument(a: Any) -> Any:
            return env[a] if isinstance(a, fx.Node) else self.size(a) if isinstance(a, sympy.Expr) else a

        args, kwargs = map_aggregate((node.args, dict(node.kwargs)), argument)
        if value is not None and "groups" in kwargs:
            dim, groups = kwargs["dim"], kwargs["groups"]
            kwargs = {**kwargs, "groups": self.groups(value, str(args[1]), dim, groups)}  # type: ignore[arg-type]
        if node.target in _SHAPED:
            assert value is not None
            return (
                args[0].expand(self.local(value))  # type: ignore[union-attr]
                if node.target is aten.expand.default
                else args[0].reshape(self.local(value))  # type: ignore[union-attr]
            )
        if node.target in _FILLED:
            assert value is not None
            args = (list(self.local(value)), *args[1:])
        if node.target is aten.split.Tensor:
            length, dim = node.args[1], node.args[2] if len(node.args) > 2 else 0
            whole = function.values[node.args[0]].shape[dim]  # type: ignore[index]
            count, rest = divmod(self.size(whole), self.size(length))
            tensor: Any = args[0]
            return tensor.split(length, dim) if rest else tensor.chunk(count, dim)
        if getattr(node.target, "__module__", "") == real.__name__:
            return getattr(self, node.target.__name__)(*args, **kwargs)  # type: ignore[union-attr]
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def groups(self, value: Value, axis: str, dim: int, groups: int) -> int:
        """How many of the groups of a dim this rank has: other axes may have cut what is around them."""
        for other, type_ in value.types.items():
            if other != axis and type_.is_split and type_.dim == dim and self.size(type_.groups) < groups:
                groups //= self.world.sizes[other]
        return groups

    # The runtime's vocabulary

    def _sum(self, axis: str) -> Any:
        return lambda x: torch.stack(self.world.exchange(self.at, axis, x)).sum(0)

    def _gather(self, axis: str, dim: int, groups: int) -> Any:
        return lambda x: _whole(self.world.exchange(self.at, axis, x), dim, groups)

    def _cut(self, axis: str, dim: int, groups: int) -> Any:
        return lambda x: _piece(x, dim, groups, self.at[axis], self.world.sizes[axis])

    def _scatter(self, axis: str, dim: int, groups: int) -> Any:
        return lambda x: self._cut(axis, dim, groups)(self._sum(axis)(x))

    def _same(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def invariant_to_replicated(self, x: torch.Tensor, axis: str) -> Any:
        return _Convert.apply(x, self._same, self._sum(axis))  # type: ignore[no-untyped-call]

    def replicated_to_partial(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        return x / self.world.sizes[axis]

    def all_reduce(self, x: torch.Tensor, axis: str) -> Any:
        return _Convert.apply(x, self._sum(axis), self._same) if x.requires_grad else self._sum(axis)(x)  # type: ignore[no-untyped-call]

    def all_gather(
        self, x: torch.Tensor, axis: str, *, dim: int, to: str, groups: int = 1, size: int | None = None
    ) -> Any:
        assert size is None or x.shape[dim] == len(range(*self.shard_range(size, axis)))
        back = self._scatter(axis, dim, groups) if to == "R" else self._cut(axis, dim, groups)
        return _Convert.apply(x, self._gather(axis, dim, groups), back)  # type: ignore[no-untyped-call]

    def reduce_scatter(self, x: torch.Tensor, axis: str, *, dim: int, groups: int = 1, size: int | None = None) -> Any:
        self._check(x, axis, dim, groups, size)
        return _Convert.apply(x, self._scatter(axis, dim, groups), self._gather(axis, dim, groups))  # type: ignore[no-untyped-call]

    def shard(self, x: torch.Tensor, axis: str, *, dim: int, of: str, groups: int = 1, size: int | None = None) -> Any:
        self._check(x, axis, dim, groups, size)
        if not x.requires_grad or of == "R":
            return self._cut(axis, dim, groups)(x)
        return _Convert.apply(x, self._cut(axis, dim, groups), self._gather(axis, dim, groups))  # type: ignore[no-untyped-call]

    def all_to_all(self, x: torch.Tensor, axis: str, *, split_dim: int, concat_dim: int) -> Any:
        def move(a: int, b: int) -> Any:
            return lambda y: self._cut(axis, a, 1)(self._gather(axis, b, 1)(y))

        return _Convert.apply(x, move(split_dim, concat_dim), move(concat_dim, split_dim))  # type: ignore[no-untyped-call]

    def _check(self, x: torch.Tensor, axis: str, dim: int, groups: int, size: int | None) -> None:
        """Only pieces that differ are told the size of the whole."""
        assert size == (x.shape[dim] if x.shape[dim] % (groups * self.world.sizes[axis]) else None)

    def shard_range(self, length: int, axis: str) -> tuple[int, int]:
        return shard_bounds(length, self.at[axis], self.world.sizes[axis])

    def part_of_mean(self, x: torch.Tensor, *axes: str) -> torch.Tensor:
        return x / math.prod(self.world.sizes[a] for a in axes)


def simulate(
    capture: Capture,
    blocks: Blocks,
    sizes: Mapping[str, int],
    batch: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and the whole gradients by name, from all ranks of a mesh of ``sizes`` (dp, mb, tp)."""
    world = World(sizes)
    main = blocks.main
    places = [dict(zip(sizes, point, strict=True)) for point in itertools.product(*(range(n) for n in sizes.values()))]
    given = [(leaf.shape, batch[leaf.name].shape) for leaf in capture.inputs if leaf.name in batch]
    symbols = {s: n for dims, shape in given for s, n in zip(dims, shape, strict=True) if s in capture.symbols}
    ranks = [Rank(world, blocks, at, symbols, tensors, capture) for at in places]
    losses: dict[int, torch.Tensor] = {}
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            rank = ranks[i]
            inputs = {
                str(n.target): cut(batch[str(n.target)], main.values[n].types, rank.at, sizes) for n in main.inputs()
            }
            (losses[i],) = rank.run(main, inputs)
            losses[i].backward()
        except BaseException as error:
            errors.append(error)
            world.barrier.abort()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real_errors = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
    if errors:
        raise (real_errors or errors)[0]
    (loss_node,) = main.results()
    loss = _assemble({i: losses[i].detach() for i in losses}, main.values[loss_node].types, places, sizes, "value")
    return loss, _gradients(capture, ranks, places, sizes, blocks)


def _gradients(
    capture: Capture, ranks: list[Rank], places: list[dict[str, int]], sizes: Mapping[str, int], blocks: Blocks
) -> dict[str, torch.Tensor]:
    types: dict[str, Mapping[str, Type]] = {}
    for node, value in blocks.main.values.items():
        if node.op == "get_attr":
            types[str(node.target)] = value.types
    for block in blocks.blocks:
        for node, value in block.function.values.items():
            if node.op == "get_attr":
                types |= {f"{i}.{node.target}": value.types for i in block.instances}
    whole: dict[str, torch.Tensor] = {}
    for name in ranks[0].leaves:
        if not ranks[0].leaves[name].requires_grad:
            continue
        grads = {
            i: torch.zeros_like(r.leaves[name]) if (g := r.leaves[name].grad) is None else g
            for i, r in enumerate(ranks)
        }
        gradient = _assemble(grads, types[name], places, sizes, "gradient")
        owner, segment = capture.segments.get(name, (name, None))
        if segment is None:
            whole[owner] = gradient
        else:
            target = whole.setdefault(owner, torch.zeros(capture.parameters[owner].shape, dtype=gradient.dtype))
            target.narrow(segment.dim, segment.start, segment.length).add_(gradient)
    return whole


def _assemble(
    parts: Mapping[int, torch.Tensor],
    types: Mapping[str, Type],
    places: list[dict[str, int]],
    sizes: Mapping[str, int],
    what: str,
) -> torch.Tensor:
    """A whole tensor from the ranks' parts: summed where it is partial, joined where split, compared where equal."""
    current = {tuple(places[i].values()): part for i, part in parts.items()}
    for position, axis in reversed(list(enumerate(sizes))):
        type_ = types.get(axis, Type("I"))
        merged: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for point in sorted(current):
            merged.setdefault((*point[:position], *point[position + 1 :]), []).append(current[point])
        partial = type_.kind == ("P" if what == "value" else "R")
        current = {}
        for point, group in merged.items():
            if type_.is_split:
                current[point] = _whole(group, type_.dim, int(type_.groups))
            elif partial:
                current[point] = torch.stack(group).sum(0)
            else:
                assert all(torch.allclose(group[0], g, rtol=1e-9, atol=1e-12) for g in group), (
                    f"replicas differ on {axis}"
                )
                current[point] = group[0]
    return current[()]


_FILLED = {aten.zeros.default, aten.ones.default, aten.full.default}

_SHAPED = {
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.dim,
    aten.squeeze.default,
}
