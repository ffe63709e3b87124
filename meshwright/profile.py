"""Profile: how long the modules of a model take on this machine, forward and backward for one microbatch.

What is run is the captured graph, which is what is emitted, module by module: every distinct block once, and what
stands outside of blocks by the module that it is of. The parameters of a block are on the device only while it runs;
those of a model on the meta device are random. Tensors are whole over tp: the partition cuts the times as it models
them, and adds the communication, which one device cannot measure.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from meshwright.compiler.blocks import Blocks, find_blocks
from meshwright.compiler.capture import capture
from meshwright.compiler.check import check_request
from meshwright.compiler.examples import example_of
from meshwright.compiler.frames import module_stack
from meshwright.compiler.graph import Capture, Function, Value
from meshwright.compiler.leaves import BATCH, leaves_of
from meshwright.compiler.mesh import Mesh
from meshwright.compiler.plan import Plan
from meshwright.passes.cost import Times
from meshwright.passes.partition import is_data
from meshwright.passes.rows import operands
from meshwright.passes.rules import DEFAULT_RULES, is_pointwise
from meshwright.runtime.groups import Groups, using
from meshwright.runtime.random import Draws, Random

WARM_UP, REPEATS = 2, 7

AS_EMITTED: Mapping[Any, Any] = {torch.ops.aten.view.default: torch.ops.aten.reshape.default}
"""Emitted code copies where a view cannot be had."""

Values = Mapping[fx.Node, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Median seconds by module path, "" for what the model's own forward does, with what they are of."""

    model: str
    device: str
    sizes: Mapping[str, int]
    seconds: Mapping[str, Times]

    def text(self) -> str:
        """The JSON of ``Plan(times=...)``, a line for each module."""
        versions = {"meshwright": metadata.version("meshwright"), "torch": torch.__version__.split("+")[0]}
        head = {"model": self.model, "device": self.device, "versions": versions, "sizes": dict(self.sizes)}
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        rows = [
            f"    {json.dumps(path)}: {json.dumps({k: round(v, 9) for k, v in times._asdict().items()})}"
            for path, times in self.seconds.items()
        ]
        return "{\n" + ",\n".join([*lines, '  "seconds": {\n' + ",\n".join(rows) + "\n  }"]) + "\n}\n"


def profile(
    model: nn.Module, mesh: Mesh, *, example_inputs: Any = None, plan: Plan | None = None, device: str = "cpu"
) -> Profile:
    """Measure ``model`` in training on one microbatch of one replica of the example batch.

    Raises what ``compile_parallel`` raises for a request that is wrong or a model that cannot be captured.
    """
    plan = plan or Plan()
    batch = example_of(model, example_inputs, mesh, plan)
    captured = capture(model, batch, precision=plan.precision, is_known=lambda t: t in DEFAULT_RULES or is_pointwise(t))
    check_request(captured, mesh, plan)
    parts = mesh.size("dp") * plan.num_microbatches(mesh.size("pp"))
    sizes = {s: size // (parts if s == BATCH else 1) for s, size in captured.symbols.items()}
    names, values, _, _ = leaves_of(model, batch)
    batched = {leaf.name for leaf in captured.inputs if leaf.batched}
    given = {
        name: value[: sizes[BATCH]] if name in batched and BATCH in sizes else value
        for name, value in zip(names, values, strict=True)
    }
    on = torch.device(device)
    groups = Groups(sizes={}, rank=0, device=on, microbatches=1)
    with using(groups):
        seconds = _Machine(captured, sizes, on, Draws(groups=groups, exact=False)).measure(
            find_blocks(captured, plan), given
        )
    return Profile(model=captured.model, device=_name(on), sizes={str(s): n for s, n in sizes.items()}, seconds=seconds)


@dataclass(frozen=True, slots=True)
class _Machine:
    """One device that runs pieces of captured functions."""

    captured: Capture
    sizes: Mapping[sympy.Symbol, int]
    device: torch.device
    draws: Draws
    measured: dict[str, tuple[Times, tuple[torch.Tensor, ...]]] = field(default_factory=dict)

    def measure(self, blocks: Blocks, given: Mapping[str, Any]) -> dict[str, Times]:
        """The times of all modules, in the order in which they run."""
        main = blocks.main
        env: dict[fx.Node, Any] = {}
        found: dict[str, Times] = {}
        for piece in _pieces(main):
            if piece[0].op == "call_module":
                (node,) = piece
                block = blocks.of(str(node.target))
                if block.name not in self.measured:
                    inputs = dict(zip(block.function.inputs(), (env[n] for n in operands(node)), strict=True))
                    inside = [n for n in block.function.graph.nodes if n.op not in ("placeholder", "output")]
                    self.measured[block.name] = self.timed(
                        block.function, inside, block.function.results(), inputs, f"{node.target}."
                    )
                times, outcome = self.measured[block.name]
                env[node] = outcome[0] if node in main.values else outcome
                found[str(node.target)] = times
            elif not is_data(main, piece[0]):
                with torch.no_grad():
                    self.run(main, piece, env, "", given)
            else:
                used = dict.fromkeys(n for node in piece for n in node.all_input_nodes if n not in piece)
                made = [n for n in piece if any(user not in piece for user in n.users)]
                times, outcome = self.timed(main, piece, made, {n: env[n] for n in used}, "")
                env.update(zip(made, outcome, strict=True))
                path = _path(piece[0])
                found[path] = found.get(path, Times()) + times
        return found

    def timed(
        self, function: Function, piece: Sequence[fx.Node], made: Sequence[fx.Node], inputs: Values, prefix: str
    ) -> tuple[Times, tuple[torch.Tensor, ...]]:
        """The median times of a piece of a function, and what it makes."""
        env: dict[fx.Node, Any] = {node: self._leaf(function.values.get(node), t) for node, t in inputs.items()}
        self.run(function, [node for node in piece if node.op == "get_attr"], env, prefix)
        leaves = {node: t for node, t in env.items() if isinstance(t, torch.Tensor) and t.requires_grad}
        data = [t for node, t in leaves.items() if function.values[node].made_of == "data"]
        forward, given = self._as_python(piece, env, made), list(env.values())
        spans: list[Times] = []
        for _ in range(WARM_UP + REPEATS):
            seconds, here = self._clocked(forward, *given)
            ends = [t for t in here if isinstance(t, torch.Tensor) and t.requires_grad]
            starts = [torch.ones_like(end) for end in ends]
            whole, _ = self._clocked(_backward, ends, list(leaves.values()), starts)
            inputs_alone, _ = self._clocked(_backward, ends, data, starts)
            spans.append(Times(seconds, min(inputs_alone, whole), max(0.0, whole - inputs_alone)))
        medians = Times(*(statistics.median(column) for column in zip(*spans[WARM_UP:], strict=True)))
        return medians, _detached(here)

    def _as_python(
        self, piece: Sequence[fx.Node], given: Iterable[fx.Node], made: Sequence[fx.Node]
    ) -> Callable[..., tuple[Any, ...]]:
        """The lines of a piece as a function of what it is given, so that nothing but them is timed."""
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in given}
        for node in piece:
            if node.op == "call_function":
                args, kwargs = map_aggregate((node.args, dict(node.kwargs)), lambda a: self._argument(a, copies))
                copies[node] = graph.call_function(AS_EMITTED.get(node.target, node.target), args, kwargs)
        graph.output(tuple(copies[node] for node in made))
        return fx.GraphModule(nn.Module(), graph)

    def run(
        self,
        function: Function,
        nodes: Sequence[fx.Node],
        env: dict[fx.Node, Any],
        prefix: str,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        """Compute nodes into ``env``, from ``given`` inputs by name."""
        for node in nodes:
            if node.op == "placeholder":
                value = (given or {})[str(node.target)]
                env[node] = value.to(self.device) if isinstance(value, torch.Tensor) else value
            elif node.op == "get_attr":
                env[node] = self._attribute(prefix + str(node.target), function.values[node])
            else:
                args, kwargs = map_aggregate((node.args, dict(node.kwargs)), lambda a: self._argument(a, env))
                env[node] = AS_EMITTED.get(node.target, node.target)(*args, **kwargs)

    def _argument(self, argument: Any, env: Values) -> Any:
        if isinstance(argument, fx.Node):
            return env[argument]
        if isinstance(argument, torch.device):
            return self.device
        return int(argument.subs(self.sizes)) if isinstance(argument, sympy.Expr) else argument

    def _attribute(self, name: str, value: Value) -> Any:
        if name in self.captured.sites:
            return Random(draws=self.draws, site=self.captured.sites[name].number)
        known = self.captured.tensors.get(name)
        if known is not None and known.device.type != "meta":
            tensor = known.detach().to(self.device, value.dtype, copy=True)
        else:
            shape = [int(size) for size in value.shape]
            tensor = torch.zeros(shape, dtype=value.dtype, device=self.device)
            if value.dtype.is_floating_point:
                tensor.normal_(std=0.02)
        return self._leaf(value, tensor)

    def _leaf(self, value: Value | None, tensor: Any) -> Any:
        grad = value is not None and value.grad and isinstance(tensor, torch.Tensor)
        return tensor.detach().requires_grad_() if grad else tensor

    def _clocked(self, run: Callable[..., Any], *given: Any) -> tuple[float, Any]:
        self._wait()
        start = time.perf_counter()
        result = run(*given)
        self._wait()
        return time.perf_counter() - start, result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _pieces(main: Function) -> Iterator[list[fx.Node]]:
    """What is run as one: a block; the data of one module that stands together; anything else node by node."""
    piece: list[fx.Node] = []
    for node in main.graph.nodes:
        if node.op == "output":
            break
        grows = node.op == "call_function" and is_data(main, node)
        if piece and not (grows and _path(node) == _path(piece[0])):
            if grows or node.op == "call_module":
                yield piece
                piece = []
            else:
                yield [node]
                continue
        if grows:
            piece.append(node)
        else:
            yield [node]
    if piece:
        yield piece


def _path(node: fx.Node) -> str:
    stack = module_stack(node)
    return stack[-1][0] if stack else ""


def _backward(ends: list[torch.Tensor], leaves: list[torch.Tensor], starts: list[torch.Tensor]) -> None:
    if ends and leaves:
        torch.autograd.grad(ends, leaves, starts, retain_graph=True, allow_unused=True)


def _detached(value: Any) -> Any:
    return map_aggregate(value, lambda one: one.detach() if isinstance(one, torch.Tensor) else one)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"
