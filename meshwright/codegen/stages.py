"""A stage file: one class per distinct block, and the stage that runs them."""

import collections
from collections.abc import Mapping

from torch import fx

from meshwright.codegen.calls import instances_of
from meshwright.codegen.declaring import attribute_names, declarations
from meshwright.codegen.edges import axes_of
from meshwright.codegen.lines import forward_lines, imported
from meshwright.codegen.margin import legend, margin
from meshwright.codegen.views import ClassView, StageView
from meshwright.codegen.wording import identifier, paths_text, ranks_text, unused, wrapped
from meshwright.codegen.writing import Body, write
from meshwright.compiler.foreign import is_foreign, module_of
from meshwright.compiler.graph import Block, Function
from meshwright.compiler.mesh import MICROBATCH_AXIS
from meshwright.compiler.program import Lowered, Stage

OWN_NAMES = ("training", "forward", "prepare")
"""Attributes that a class of a stage file has anyway."""
DOCSTRING = 104
"""Width of a class's docstring."""


def stage_view(lowered: Lowered, stage: Stage, edges: Mapping[str, str]) -> StageView:
    """Everything that a stage file says. ``edges``: what the values between stages are called."""
    writer = _StageWriter(lowered, stage, edges)
    classes = [*(writer.block(block) for block in writer.blocks), writer.stage_class()]
    bodies = writer.bodies
    lines = [line for body in bodies for line in body.lines]
    return StageView(
        docstring=writer.docstring(),
        legend=tuple(legend(lowered.capture.symbols, writer.axes, lines)),
        uses_functional=any(body.uses_functional for body in bodies),
        uses_torch=any("torch." in line.code for line in lines),
        runtime=imported({name for body in bodies for name in body.runtime}),
        registering=writer.registering(),
        classes=tuple(classes),
    )


class _StageWriter:
    def __init__(self, lowered: Lowered, stage: Stage, edges: Mapping[str, str]):
        self.lowered, self.stage, self.edges = lowered, stage, edges
        self.axes = axes_of(lowered)
        self.bodies: list[Body] = []
        used = [str(n.target) for n in stage.function.graph.nodes if n.op == "call_module"]
        self.blocks = list({lowered.blocks[i].name: lowered.blocks[i] for i in used}.values())
        self.instances = {b.name: [i for i in used if lowered.blocks[i] is b] for b in self.blocks}
        self.declarations = declarations(lowered, stage)

    def block(self, block: Block) -> ClassView:
        """The class of a block."""
        function, names = block.function, self._formal_names(block)
        attributes = attribute_names(function.attributes(), {*OWN_NAMES, *names.values()})
        body = self._body(function, names, attributes)
        return ClassView(
            name=identifier(block.name),
            docstring=wrapped(paths_text(self.instances[block.name]), DOCSTRING, "    "),
            init=tuple(self.declarations.of([function], attributes, f"{block.instances[0]}.")),
            arguments=", ".join(("self", *body.arguments)),
            inputs=self._inputs_comment(function, names),
            forward=tuple(forward_lines(body.lines)),
        )

    def stage_class(self) -> ClassView:
        """The class ``Stage``."""
        stage, function = self.stage, self.stage.function
        functions = [function, *([stage.prepare] if stage.prepare else [])]
        instances = instances_of(function, self.lowered.blocks)
        paths = dict.fromkeys(path for f in functions for path in f.attributes())
        attributes = attribute_names(paths, {*OWN_NAMES, *(attribute for attribute, _ in instances.attributes)})
        names = {n: self.edges.get(str(n.target), str(n.target)) for n in function.inputs()}
        body = write(function, names, attributes, self.axes, instances.calls)
        self.bodies.append(body)
        prepare: Body | None = None
        if stage.prepare is not None:
            given = {n: str(n.target) for n in stage.prepare.inputs()}
            at_once = {axis: size for axis, size in self.axes.items() if axis != MICROBATCH_AXIS}
            prepare = write(stage.prepare, given, attributes, at_once)
            self.bodies.append(prepare)
        return ClassView(
            name="Stage",
            docstring=wrapped(self._contents(), DOCSTRING, "    "),
            init=(
                *self.declarations.typed(),
                *self.declarations.of(functions, attributes),
                *(line for _, line in instances.attributes),
            ),
            arguments=", ".join(("self", *body.arguments)),
            inputs="",
            forward=tuple(forward_lines(body.lines)),
            prepare_arguments=", ".join(("self", *prepare.arguments)) if prepare else "",
            prepare_docstring=f"Once per step, on this dp rank's whole batch: {', '.join(stage.prepares)}.",
            prepare=tuple(forward_lines(prepare.lines)) if prepare else (),
        )

    def registering(self) -> tuple[tuple[str, str], ...]:
        """The modules of operators that are not torch's own, with the operators."""
        functions = [block.function for block in self.blocks] + [self.stage.function]
        functions += [self.stage.prepare] if self.stage.prepare else []
        found: dict[str, set[str]] = {}
        for node in (node for function in functions for node in function.graph.nodes if is_foreign(node.target)):
            found.setdefault(module_of(node.target) or "", set()).add(f"torch.ops.{node.target}")
        return tuple((module, ", ".join(sorted(operators))) for module, operators in sorted(found.items()))

    def docstring(self) -> str:
        """What the file is of, and who runs it."""
        return wrapped(
            f"Stage {self.stage.index} of {len(self.lowered.stages)} of {self.lowered.capture.model}: "
            f"{self._contents()}, on {ranks_text(self.stage.ranks)} of {self.lowered.mesh}."
        )

    def _body(self, function: Function, names: Mapping[fx.Node, str], attributes: Mapping[str, str]) -> Body:
        body = write(function, names, attributes, self.axes)
        self.bodies.append(body)
        return body

    def _formal_names(self, block: Block) -> dict[fx.Node, str]:
        """What the block calls its inputs: what most of its callers call what they pass."""
        names: dict[fx.Node, str] = {}
        for position, node in enumerate(block.function.inputs()):
            votes: collections.Counter[str] = collections.Counter()
            for stage in self.lowered.stages:
                for call in stage.function.graph.nodes:
                    if call.op == "call_module" and call.target in block.instances:
                        origin = stage.function.origins.get(call.args[position])
                        votes[origin.name if origin else str(call.args[position])] += 1
            names[node] = unused(identifier(votes.most_common(1)[0][0]), names.values())
        return names

    def _inputs_comment(self, function: Function, names: Mapping[fx.Node, str]) -> str:
        groups: dict[str, list[str]] = {}
        for node, name in names.items():
            groups.setdefault(margin(function.values[node], self.axes).replace("  ", " "), []).append(name)
        return " · ".join(f"{', '.join(group)} {text}" for text, group in groups.items())

    def _contents(self) -> str:
        """The modules that the stage runs."""
        paths: dict[str, None] = {}
        for node in self.stage.function.graph.nodes:
            origin = self.stage.function.origins.get(node)
            if node.op == "call_module":
                paths.setdefault(str(node.target))
            elif node.op == "call_function" and origin and origin.module_path:
                paths.setdefault(origin.module_path)
        shown = [p for p in paths if not any(q.startswith(f"{p}.") for q in paths)]
        is_last = self.stage.index == len(self.lowered.stages) - 1
        return paths_text(shown, ["the loss"] if is_last else []) or "the model"
