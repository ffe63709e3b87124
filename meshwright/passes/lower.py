"""Lower: the stages as functions of their own, with what they send, receive, prepare and hold."""

import itertools
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from meshwright.compiler.blocks import Blocks
from meshwright.compiler.errors import InternalError, PlanError, UnsupportedError
from meshwright.compiler.graph import Capture, Function, Value
from meshwright.compiler.mesh import MICROBATCH_AXIS, Mesh
from meshwright.compiler.plan import Plan
from meshwright.compiler.program import Edge, Kept, Lowered, Placed, Stage, StageCost, Step
from meshwright.compiler.types import Held, I, R, S, Type
from meshwright.compiler.written import is_writer, writes
from meshwright.passes.drawn import drawn
from meshwright.passes.partition import Partition
from meshwright.passes.schedules import Costs, Pipeline
from meshwright.passes.schedules.planned import Planned
from meshwright.runtime.collectives import all_reduce, part_of_mean

aten = torch.ops.aten


def lower(
    capture: Capture,
    blocks: Blocks,
    parts: Partition,
    costs: Costs,
    mesh: Mesh,
    plan: Plan,
    pipeline: Planned,
    warnings: tuple[str, ...] = (),
) -> Lowered:
    """Everything that the emitted files say. ``warnings`` are shown by explain()."""
    num_stages = pipeline.num_stages
    loss = blocks.main.results()[0]
    cutters = [_Cutter(blocks, parts, k, loss) for k in range(num_stages)]
    _place_stores(blocks.main, parts, cutters)
    received = [cutter.received for cutter in cutters]
    edges = _edges(blocks.main, parts, received)
    functions = [
        cutter.function([e.name for e in edges if e.source == k], k == num_stages - 1)
        for k, cutter in enumerate(cutters)
    ]
    pairs = [(e.source, d, e.value.grad) for e in edges for d in e.destinations]
    made = pipeline.make(
        Pipeline.of(pipeline.num_ranks, pipeline.num_microbatches, pipeline.num_chunks, edges=pairs, costs=costs),
    )
    stages = tuple(
        Stage(
            index=k,
            ranks=mesh.pipeline_ranks(made.placement[k]),
            function=functions[k][0],
            inputs=tuple(i.name for i in capture.inputs if i.name in functions[k][2]),
            receives=tuple(e for e in edges if k in e.destinations),
            sends=tuple(e for e in edges if e.source == k),
            prepare=functions[k][1],
            prepares=tuple(cutter.prepared.values()),
            cost=StageCost(
                forward=costs.forward[k],
                inputs=costs.inputs[k],
                weights=costs.weights[k],
                activations=costs.activations[k],
            ),
        )
        for k, cutter in enumerate(cutters)
    )
    parameters, buffers = _placed(capture, blocks, stages, plan, mesh)
    _check_written(blocks.main, parts, buffers)
    random = drawn(capture, blocks, stages)
    return Lowered(
        capture=capture,
        mesh=mesh,
        plan=plan,
        microbatches=pipeline.num_microbatches,
        blocks={instance: block for block in blocks.blocks for instance in block.instances},
        stages=stages,
        step=Step(name=made.name, placement=tuple(made.placement), rows=made.rows, peaks=made.peaks),
        parameters=parameters,
        buffers=buffers,
        random=random,
        loss=blocks.main.values[loss],
        message=costs.message,
        warnings=warnings,
    )


class _Cutter:
    """One stage cut out of the main function."""

    def __init__(self, blocks: Blocks, parts: Partition, index: int, loss: fx.Node):
        self.main, self.stage, self.index = blocks.main, parts.stage, index
        self.loss = loss
        own = [node for node in self.main.graph.nodes if self.stage.get(node) == index]
        self.needed: set[fx.Node] = set()
        self.received: dict[fx.Node, None] = {}
        self.prepared: dict[fx.Node, str] = {}
        self.order = list(self.main.graph.nodes)
        for node in own:
            self.need(node)

    def need(self, node: fx.Node) -> None:
        if node in self.needed or node in self.prepared:
            return
        if node in self.stage and self.stage[node] != self.index:
            self.received.setdefault(node)
            return
        if _is_prepared(self.main, node):
            self.prepared[node] = self._name_of_prepared(node)
            return
        self.needed.add(node)
        for used in node.all_input_nodes:
            self.need(used)

    def _name_of_prepared(self, node: fx.Node) -> str:
        """What the user calls it, apart from what forward takes: ``mask = mask.sum()`` names a sum like an input."""
        origin = self.main.origins.get(node)
        name = origin.name if origin else node.name
        taken = {other.name for other in self.order if other is not node} | set(self.prepared.values())
        numbered = (f"{name}_{i}" for i in itertools.count(1))
        return next(free for free in itertools.chain((name,), numbered) if free not in taken)

    def function(self, sends: list[str], last: bool) -> tuple[Function, Function | None, set[str]]:
        """The stage's forward, its prepare, and the batch inputs that they read."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.order:
            if node in self.received:
                copies[node] = graph.create_node("placeholder", node.name, name=node.name)
        for node in self.order:
            if node in self.prepared:
                copies[node] = graph.create_node("placeholder", self.prepared[node], name=self.prepared[node])
            elif node in self.needed:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
        names = {node.name: node for node in copies if self.stage.get(node) == self.index}
        results = [self.loss] if last else [names[name] for name in sends]
        graph.output(tuple(copies[node] for node in results))
        forward = _tables(self.main, graph, copies)
        prepare = self._prepare() if self.prepared else None
        inputs = {str(n.target) for f in (forward, prepare) if f for n in f.inputs()}
        return forward, prepare, inputs

    def _prepare(self) -> Function:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}

        def visit(node: fx.Node) -> None:
            if node in copies:
                return
            for used in node.all_input_nodes:
                visit(used)
            if is_writer(node):
                raise UnsupportedError(
                    f"{_path(self.main, node)} writes to {str(writes(node)[0].target)!r} for what the loss of the "
                    "whole batch is divided by, which is not supported"
                )
            if node.target in (all_reduce, part_of_mean):  # all microbatches at once: nothing to add up, no part
                kept = tuple(axis for axis in node.args[1:] if axis != MICROBATCH_AXIS)
                if not kept:
                    copies[node] = copies[node.all_input_nodes[0]]
                    return
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            if node.target in (all_reduce, part_of_mean):
                copies[node].args = (copies[node].args[0], *kept)

        for node in self.prepared:
            visit(node)
        graph.output(tuple(copies[node] for node in self.prepared))
        tables = _tables(self.main, graph, copies)
        # Parameters and buffers are no microbatch's, and have one type wherever they are used.
        values = {node: v if node.op == "get_attr" else _at_once(v) for node, v in tables.values.items()}
        return Function(graph=graph, values=values, origins=tables.origins)


def _at_once(value: Value) -> Value:
    """A value of all microbatches together."""
    return replace(value, types={axis: t for axis, t in value.types.items() if axis != MICROBATCH_AXIS})


def _place_stores(main: Function, parts: Partition, cutters: list[_Cutter]) -> None:
    """What is stored without data is computed wherever the buffer is used, or with what runs next if it is nowhere."""
    order = list(main.graph.nodes)
    for position, node in enumerate(order):
        if is_writer(node) and not node.users and node not in parts.stage:
            using = [cutter for cutter in cutters if writes(node)[0] in cutter.needed]
            following = (parts.stage[other] for other in order[position:] if other in parts.stage)
            for cutter in using or [cutters[next(following, -1)]]:
                cutter.need(node)


def _path(main: Function, node: fx.Node) -> str:
    origin = main.origins.get(node)
    return (origin.module_path if origin else "") or "the model"


def _is_prepared(main: Function, node: fx.Node) -> bool:
    """Whether a node is the last of the conversions that sum a value of the inputs alone over replicas or
    microbatches.
    """
    if node.target is not all_reduce or node.args[1] not in ("dp", MICROBATCH_AXIS):
        return False
    value = main.values[node]
    if value.types.get(MICROBATCH_AXIS, I) == R:
        return False  # each microbatch by itself
    return value.made_of == "inputs" and not any(user.target is all_reduce for user in node.users)


def _edges(main: Function, parts: Partition, received: list[dict[fx.Node, None]]) -> tuple[Edge, ...]:
    found = dict.fromkeys(node for nodes in received for node in nodes)
    order = {node: i for i, node in enumerate(main.graph.nodes)}
    return tuple(
        Edge(
            name=node.name,
            value=main.values[node],
            source=parts.stage[node],
            destinations=tuple(k for k, nodes in enumerate(received) if node in nodes),
        )
        for node in sorted(found, key=lambda n: order[n])
    )


def _tables(main: Function, graph: fx.Graph, copies: Mapping[fx.Node, fx.Node]) -> Function:
    values = {copy: main.values[node] for node, copy in copies.items() if node in main.values}
    origins = {copy: main.origins[node] for node, copy in copies.items() if node in main.origins}
    result = Function(graph=graph, values=values, origins=origins)
    result.verify()
    return result


def _placed(
    capture: Capture, blocks: Blocks, stages: tuple[Stage, ...], plan: Plan, mesh: Mesh
) -> tuple[dict[str, Placed], dict[str, Kept]]:
    """Parameters and buffers with the stages that use them, in the model's order."""
    users: dict[str, tuple[Value, dict[int, None]]] = {}
    for stage in stages:
        for function in (stage.function, *([stage.prepare] if stage.prepare else [])):
            for node in function.graph.nodes:
                if node.op == "get_attr":
                    _use(users, str(node.target), function.values[node], stage.index)
                elif node.op == "call_module":
                    inner = blocks.of(str(node.target)).function
                    for attribute in inner.graph.nodes:
                        if attribute.op == "get_attr":
                            _use(users, f"{node.target}.{attribute.target}", inner.values[attribute], stage.index)
    parameters: dict[str, Placed] = {}
    buffers: dict[str, Kept] = {}
    for name, (value, where) in users.items():
        if name in capture.sites:
            continue
        owner, segment = capture.segments.get(name, (name, None))
        if owner in capture.parameters:
            parameter = capture.parameters[owner]
            held = {
                axis: _held(axis, value, parameter.name, plan) for axis, size in mesh.axes if axis != "pp" and size > 1
            }
            parameters[name] = Placed(parameter=parameter, held=held, stages=tuple(where), segment=segment)
        else:
            splits = {axis: type_ for axis, type_ in value.types.items() if type_.is_split}
            buffers[name] = Kept(buffer=capture.buffers[owner], splits=splits, stages=tuple(where))
    order = {name: i for i, name in enumerate(capture.parameters)}

    def position(name: str) -> tuple[int, int]:
        placed = parameters[name]
        return order[placed.parameter.name], placed.segment.start if placed.segment else 0

    return {name: parameters[name] for name in sorted(parameters, key=position)}, buffers


def _check_written(main: Function, parts: Partition, buffers: Mapping[str, Kept]) -> None:
    """Raises PlanError for a buffer that one stage writes to, with data that others do not have, and another uses."""
    for node in main.graph.nodes:
        for name in (str(buffer.target) for buffer in writes(node) if node in parts.stage):
            stages = buffers[name].stages
            if len(stages) > 1:
                others = ", ".join(str(stage) for stage in stages if stage != parts.stage[node])
                raise PlanError(
                    f"stage {parts.stage[node]} writes to the buffer {name!r} ({_path(main, node)}), and stage "
                    f"{others} uses it too\n  choose a split that keeps them together, or a smaller pp"
                )


def _use(users: dict[str, tuple[Value, dict[int, None]]], name: str, value: Value, stage: int) -> None:
    known, where = users.setdefault(name, (value, {}))
    if known.types != value.types:
        raise InternalError(f"{name} has the types {dict(known.types)} in one stage and {dict(value.types)} in another")
    where.setdefault(stage)


def _held(axis: str, value: Value, name: str, plan: Plan) -> Held:
    """From the type in use to the type at rest: what is used as R has its gradient pending, or is gathered under
    ZeRO-3.
    """
    use: Type = value.types.get(axis, I)
    if axis == "dp" and value.grad:
        pin = plan.pinned((name,), "dp")
        rest = pin[1] if pin else S(0) if plan.zero == 3 and value.shape else I
        if rest not in (I, S(0)):
            raise PlanError(
                f"the pin {pin[0] if pin else ''!r} wants dp={rest} for {name!r}: over dp parameters are "
                f"whole (I) or split as S(0)"
            )
        return Held(rest, R)
    return Held(I if use == R else use, use)
