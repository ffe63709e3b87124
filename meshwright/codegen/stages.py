"""A stage file: one class per distinct block, and the stage that runs them."""

import ast
import collections
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from torch import fx

from meshwright.codegen.margin import margin
from meshwright.codegen.views import ClassView, Line, StageView
from meshwright.codegen.writing import Body, Call, Writer
from meshwright.compiler.graph import Block, Function
from meshwright.compiler.mesh import MICROBATCH_AXIS
from meshwright.compiler.program import Lowered, Placed, Stage
from meshwright.compiler.types import Held

CODE = 82
"""Width of the code of a forward; the margin follows."""


def axes_of(lowered: Lowered) -> dict[str, int]:
    """The sizes of the axes that values have types on."""
    axes = {axis: size for axis, size in lowered.mesh.axes if axis != "pp"}
    return {**axes, MICROBATCH_AXIS: lowered.microbatches}


def edge_names(lowered: Lowered) -> dict[str, str]:
    """What the values between stages are called, by the names of their edges; unique within every stage."""
    taken = {leaf.name for leaf in lowered.capture.inputs} | {n for stage in lowered.stages for n in stage.prepares}
    names: dict[str, str] = {}
    by_stage: list[set[str]] = [set(taken) for _ in lowered.stages]
    for stage in lowered.stages:
        for edge in stage.sends:
            node = next(
                n for k in edge.destinations for n in lowered.stages[k].function.inputs() if n.target == edge.name
            )
            receiver = lowered.stages[edge.destinations[0]].function
            origin = receiver.origins.get(node)
            name = identifier(origin.name if origin else edge.name)
            ends = [by_stage[k] for k in (edge.source, *edge.destinations)]
            base, number = name, 1
            while any(name in end for end in ends):
                number += 1
                name = f"{base}_{number}"
            for end in ends:
                end.add(name)
            names[edge.name] = name
    return names


def identifier(text: str) -> str:
    """``text`` as an identifier."""
    name = re.sub(r"\W", "_", text) or "value"
    return f"_{name}" if name[0].isdigit() else name


def stage_view(lowered: Lowered, stage: Stage, edges: Mapping[str, str]) -> StageView:
    """Everything that a stage file says."""
    writer = _StageWriter(lowered, stage, edges)
    classes = [writer.block(block) for block in writer.blocks]
    classes.append(writer.stage_class())
    bodies = writer.bodies
    functional = any(body.uses_functional for body in bodies)
    text = "\n".join(line.code for body in bodies for line in body.lines)
    return StageView(
        docstring=writer.docstring(),
        legend=tuple(_legend(lowered, [line for body in bodies for line in body.lines])),
        uses_functional=functional,
        uses_torch="torch." in text,
        runtime=_imported(sorted({name for body in bodies for name in body.runtime})),
        classes=tuple(classes),
    )


def _imported(names: Sequence[str]) -> str:
    """Names behind ``from meshwright.runtime import``, one on a line where they are too many for one."""
    line = ", ".join(names)
    inside = "".join(f"    {name},\n" for name in names)
    return line if len(line) <= 120 - len("from meshwright.runtime import ") else f"(\n{inside})"


class _StageWriter:
    def __init__(self, lowered: Lowered, stage: Stage, edges: Mapping[str, str]):
        self.lowered, self.stage, self.edges = lowered, stage, edges
        self.axes = axes_of(lowered)
        self.bodies: list[Body] = []
        used = [str(n.target) for n in stage.function.graph.nodes if n.op == "call_module"]
        self.blocks = list({lowered.blocks[i].name: lowered.blocks[i] for i in used}.values())
        self.instances = {b.name: [i for i in used if lowered.blocks[i] is b] for b in self.blocks}
        own = [p for p in lowered.parameters.values() if stage.index in p.stages]
        self.shared = _shared(own)

    # Blocks

    def block(self, block: Block) -> ClassView:
        function = block.function
        names = self._formal_names(block)
        first = block.instances[0]
        attributes = attribute_names(function.attributes(), self._taken(names.values()))
        body = Writer(function=function, names=names, attributes=attributes, axes=self.axes).write()
        self.bodies.append(body)
        return ClassView(
            name=identifier(block.name),
            docstring=_wrapped(_paths(self.instances[block.name]), 104, "    "),
            init=tuple(self._declared(function, attributes, f"{first}.")),
            arguments=", ".join(("self", *body.arguments)),
            inputs=self._inputs_comment(function, names),
            forward=tuple(_rendered(body.lines)),
        )

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
            name = base = identifier(votes.most_common(1)[0][0])
            number = 1
            while name in names.values():
                number += 1
                name = f"{base}_{number}"
            names[node] = name
        return names

    def _taken(self, names: Iterable[str]) -> set[str]:
        return {"training", "forward", "prepare", *names}

    # The stage

    def stage_class(self) -> ClassView:
        stage, function = self.stage, self.stage.function
        names = {n: self.edges.get(str(n.target), str(n.target)) for n in function.inputs()}
        taken = self._taken(())
        calls, lists = self._calls(function)
        for attribute, _ in lists:
            taken.add(attribute)
        both = dict.fromkeys([*function.attributes(), *(stage.prepare.attributes() if stage.prepare else ())])
        attributes = attribute_names(both, taken)
        body = Writer(function=function, names=names, attributes=attributes, axes=self.axes, modules=calls).write()
        self.bodies.append(body)
        init = []
        if self.shared:
            types = ", ".join(f'{axis}="{held}"' for axis, held in self.shared.items())
            note = (
                f"  # at rest -> in use: {_pending(self.shared)}"
                if any(h.rest != h.use for h in self.shared.values())
                else ""
            )
            init.append(f"param = param.typed({types}){note}")
        init += self._declared(function, attributes, "")
        init += [line for _, line in lists]
        prepare: Body | None = None
        if stage.prepare is not None:
            inputs = {n: str(n.target) for n in stage.prepare.inputs()}
            prepare = Writer(function=stage.prepare, names=inputs, attributes=attributes, axes=self.axes).write()
            self.bodies.append(prepare)
        return ClassView(
            name="Stage",
            docstring=_wrapped(self._contents(), 104, "    "),
            init=tuple(init),
            arguments=", ".join(("self", *body.arguments)),
            inputs="",
            forward=tuple(_rendered(body.lines)),
            prepare_arguments=", ".join(("self", *prepare.arguments)) if prepare else "",
            prepare_docstring=f"Once per step, on this dp rank's whole batch: {', '.join(stage.prepares)}.",
            prepare=tuple(_rendered(prepare.lines)) if prepare else (),
        )

    def _calls(self, function: Function) -> tuple[dict[fx.Node, Call], list[tuple[str, str]]]:
        """How every instance is called, and the attributes that hold the instances with their lines in __init__."""
        calls: dict[fx.Node, Call] = {}
        lists: list[tuple[str, str]] = []
        nodes = [n for n in function.graph.nodes if n.op == "call_module"]
        while nodes:
            run = _run(nodes)
            block = identifier(self.lowered.blocks[str(run[0].target)].name)
            paths = [str(n.target) for n in run]
            name = identifier(re.sub(r"\.?\d+$", "", paths[0]).rsplit(".", 1)[-1] or "layers")
            if len(run) == 1:
                attribute = f"{name}_{paths[0].rsplit('.', 1)[-1]}"
                attribute = _unused(attribute, {a for a, _ in lists})
                lists.append((attribute, f"self.{attribute} = {block}(param.scope({_quoted(paths[0])}))"))
                calls[run[0]] = Call(last=run[0], attribute=attribute)
            else:
                attribute = _unused(name, {a for a, _ in lists})
                lists.append((attribute, f"self.{attribute} = nn.ModuleList({_instances(block, paths)})"))
                carried = run[1].args.index(run[0])
                variable = (
                    name[:-1] if name.endswith("s") and len(name) > 2 else "block" if name != "block" else "layer"
                )
                calls[run[0]] = Call(last=run[-1], loop=attribute, variable=variable, count=len(run), carried=carried)
                for node in run[1:]:
                    calls[node] = Call(last=run[-1], skip=True)
            nodes = nodes[len(run) :]
        return calls, lists

    def _declared(self, function: Function, attributes: Mapping[str, str], prefix: str) -> list[str]:
        """``self.q_proj_weight = param("q_proj.weight", (64, 64), tp="S(0)")`` with the piece in use in the margin."""
        lines = []
        by_name = {str(n.target): function.values[n] for n in function.graph.nodes if n.op == "get_attr"}
        if not prefix and self.stage.prepare is not None:
            by_name = {
                **{
                    str(n.target): self.stage.prepare.values[n]
                    for n in self.stage.prepare.graph.nodes
                    if n.op == "get_attr"
                },
                **by_name,
            }
        order = {node: i for i, node in enumerate(function.graph.nodes)}
        first = {str(n.target): min((order[u] for u in n.users), default=0) for n in order if n.op == "get_attr"}
        drawn: list[str] = []
        for name, value in sorted(by_name.items(), key=lambda item: first.get(item[0], 0)):
            full = prefix + name
            if full in self.lowered.random:
                splits = self.lowered.random[full].splits.items()
                arguments = ", ".join([_quoted(name), *(f'{axis}="{type_}"' for axis, type_ in splits)])
                drawn.append(f"self.{attributes[name]} = param.random({arguments})")
                continue
            placed = self.lowered.parameters.get(full)
            local = list(value.shape)
            for axis, type_ in value.types.items():
                if type_.is_split:
                    local[type_.dim] = int(local[type_.dim]) // self.axes[axis]
            piece = f"({local[0]},)" if len(local) == 1 else f"({', '.join(map(str, local))})"
            if placed is None:
                buffer = self.lowered.buffers[full][0]
                shape = _tuple(buffer.shape)
                lines.append(
                    Line(code=f"self.{attributes[name]} = param.buffer({_quoted(name)}, {shape})", margin=piece)
                )
                continue
            parts = [_quoted(re.sub(r"\[\d+:\d+\]$", "", name)), _tuple(placed.parameter.shape)]
            if placed.segment is not None:
                s = placed.segment
                parts.append(f"segment=({s.dim}, {s.start}, {s.length})")
            parts += [f'{axis}="{held}"' for axis, held in placed.held.items() if self.shared.get(axis) != held]
            lines.append(Line(code=f"self.{attributes[name]} = param({', '.join(parts)})", margin=piece))
        short = [line for line in lines if len(line.code) + len(line.margin) + 12 <= 120]
        width = max((len(line.code) for line in short), default=0)
        out: list[str] = []
        for line in lines:
            aligned = f"{line.code:<{width}}  # {line.margin}"
            out += [aligned] if line in short and len(aligned) + 8 <= 120 else _broken(line.code, line.margin)
        return out + [line for code in drawn for line in _broken(code)]

    def _inputs_comment(self, function: Function, names: Mapping[fx.Node, str]) -> str:
        groups: dict[str, list[str]] = {}
        for node, name in names.items():
            groups.setdefault(margin(function.values[node], self.axes).replace("  ", " "), []).append(name)
        return " · ".join(f"{', '.join(group)} {text}" for text, group in groups.items())

    def _contents(self) -> str:
        paths: dict[str, None] = {}
        for node in self.stage.function.graph.nodes:
            if node.op == "call_module":
                paths.setdefault(str(node.target))
            elif (
                node.op == "call_function" and (origin := self.stage.function.origins.get(node)) and origin.module_path
            ):
                paths.setdefault(origin.module_path)
        shown = [p for p in paths if not any(q.startswith(f"{p}.") for q in paths)]
        last = self.stage.index == len(self.lowered.stages) - 1
        return _paths(shown, ["the loss"] if last else []) or "the model"

    def docstring(self) -> str:
        count = len(self.lowered.stages)
        ranks = _ranges(self.stage.ranks)
        return _wrapped(
            f"Stage {self.stage.index} of {count} of {self.lowered.capture.model}: {self._contents()}, "
            f"on {'rank' if len(self.stage.ranks) == 1 else 'ranks'} {ranks} of {self.lowered.mesh}."
        )


def _wrapped(text: str, width: int = 116, indent: str = "") -> str:
    """Text in lines, as it may stand in a docstring."""
    return (
        f"\n{indent}".join(textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False))
        .replace("\\", "/")
        .replace('"', "'")
    )


def _shared(parameters: Sequence[Placed]) -> dict[str, Held]:
    """The types that all parameters of a stage have on an axis."""
    shared: dict[str, Held] = {}
    for axis in ("dp",):
        votes = collections.Counter(p.held[axis] for p in parameters if axis in p.held)
        if votes:
            shared[axis] = votes.most_common(1)[0][0]
    return shared


def _pending(shared: Mapping[str, Held]) -> str:
    notes = []
    for axis, held in shared.items():
        if held.rest.is_split and held.rest != held.use:
            notes.append(f"gathered over {axis} per module, the gradient scattered")
        elif held.rest != held.use:
            notes.append(f"the gradient is summed over {axis} once per step")
    return ", ".join(notes)


def _run(nodes: list[fx.Node]) -> list[fx.Node]:
    """The longest start of ``nodes`` that is a loop: the same block, each fed by the one before, all else the same."""
    run = [nodes[0]]
    for node in nodes[1:]:
        last = run[-1]
        fed = [i for i, argument in enumerate(node.args) if argument is last]
        same = len(fed) == 1 and all(
            a is b for i, (a, b) in enumerate(zip(node.args, last.args, strict=False)) if i != fed[0]
        )
        alone = all(user is node for user in last.users)
        if not (
            same
            and alone
            and len(node.args) == len(last.args)
            and (len(run) == 1 or run[1].args.index(run[0]) == fed[0])
        ):
            break
        if last.args and _block_key(node) != _block_key(last):
            break
        run.append(node)
    return run


def _block_key(node: fx.Node) -> str:
    return re.sub(r"\d+$", "", str(node.target))


def _instances(block: str, paths: list[str]) -> str:
    """The generator over instances: a range where the paths count, else a tuple of paths."""
    stems = {re.sub(r"\d+$", "", path) for path in paths}
    numbers = [int(match[0]) if (match := re.search(r"\d+$", path)) else -1 for path in paths]
    if len(stems) == 1 and numbers == list(range(numbers[0], numbers[0] + len(paths))) and "{" not in paths[0]:
        pattern = _quoted(stems.pop() + "{i}")
        return f"{block}(param.scope(f{pattern})) for i in range({numbers[0]}, {numbers[-1] + 1})"
    names = ", ".join(_quoted(p) for p in paths)
    return f"{block}(param.scope(path)) for path in ({names})"


def attribute_names(paths: Iterable[str], taken: set[str]) -> dict[str, str]:
    """Attribute names of parameters: the last parts of their paths, lengthened until unique."""
    paths = list(paths)
    names: dict[str, str] = {}
    depth = dict.fromkeys(paths, 2)
    while True:
        names = {p: _attribute(p, depth[p]) for p in paths}
        counts = collections.Counter(names.values())
        clashes = [p for p in paths if (counts[names[p]] > 1 or names[p] in taken) and depth[p] <= p.count(".") + 1]
        if not clashes:
            break
        for p in clashes:
            depth[p] += 1
    used = set(taken)
    for p in paths:
        name, number = names[p], 1
        while name in used:
            number += 1
            name = f"{names[p]}_{number}"
        names[p] = name
        used.add(name)
    return names


def _attribute(path: str, depth: int) -> str:
    plain, _, segment = path.partition("[")
    name = identifier("_".join(plain.split(".")[-depth:]))
    return f"{name}_{segment.split(':')[0]}" if segment else name


def _unused(name: str, taken: set[str]) -> str:
    number, base = 1, name
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    return name


def _paths(paths: Sequence[str], more: Sequence[str] = ()) -> str:
    """Module paths with numbered ones as ranges: ``model.embed_tokens and model.layers.0-1``."""
    found: list[tuple[str, list[int]]] = []
    for path in paths:
        match = re.match(r"^(.*\.|)(\d+)$", path)
        stem, number = (match[1], int(match[2])) if match else (path, -1)
        if match and found and found[-1][0] == stem and found[-1][1] and found[-1][1][-1] == number - 1:
            found[-1][1].append(number)
        else:
            found.append((stem, [number] if match else []))
    names = [f"{stem}{n[0]}" + (f"-{n[-1]}" if len(n) > 1 else "") if n else stem for stem, n in found]
    names = [*dict.fromkeys(" ".join(n.split()) for n in names if n), *more]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def _ranges(ranks: Sequence[int]) -> str:
    if len(ranks) <= 8:
        return ", ".join(map(str, ranks))
    return f"{ranks[0]}, {ranks[1]}, ..., {ranks[-1]} ({len(ranks)} ranks)"


def _tuple(shape: Sequence[int]) -> str:
    return f"({shape[0]},)" if len(shape) == 1 else f"({', '.join(map(str, shape))})"


def _quoted(text: str) -> str:
    return '"' + repr(text)[1:-1].replace('"', '\\"') + '"'


def _rendered(lines: Iterable[Line]) -> list[str]:
    """Lines with their margins in one column, empty lines between sections."""
    out: list[str] = []
    for line in lines:
        if line.blank and out and out[-1] != "":
            out.append("")
        if line.is_comment:
            out.append(f"{line.code:<{CODE}}  {line.margin}".rstrip())
        elif line.margin and max(CODE, len(line.code)) + len(line.margin) + 12 <= 120:
            out.append(f"{line.code:<{CODE}}  # {line.margin}")
        else:
            out += _broken(line.code, line.margin)
    return out


def _broken(code: str, margin: str = "") -> list[str]:
    """A line that is too long, broken behind the parenthesis of its outermost call as a formatter would."""
    beside = f"  # {margin}" if margin else ""
    if len(code) + 8 <= 120:
        return [f"{code}{beside}" if len(code) + len(beside) + 8 <= 120 else code]
    start = code.find("(", code.find(" = ") + 1)
    if not code.endswith(")") or start < 0:
        return [code]
    inside = code[start + 1 : -1]
    parts = [inside] if len(inside) + 12 <= 120 else [f"{argument}," for argument in _arguments(inside)]
    return [code[: start + 1], *(f"    {part}" for part in parts), f"){beside}"]


def _arguments(inside: str) -> list[str]:
    """The arguments of a call, from the text between its parentheses; all as one where that is no call's."""
    (statement,) = ast.parse(f"_({inside})").body
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        return [inside]
    parts: list[ast.expr | ast.keyword] = [*call.args, *call.keywords]
    text = inside.encode()  # what ast counts is bytes
    return [text[part.col_offset - 2 : (part.end_col_offset or 0) - 2].decode() for part in parts]


def _legend(lowered: Lowered, lines: Sequence[Line]) -> Iterable[tuple[str, str]]:
    """The terms of the margins that occur in this file."""
    text = " \n".join(line.margin for line in lines if not line.is_comment) + " "
    symbols = {str(s): s for s in lowered.capture.symbols}
    if "B" in symbols and re.search(r"\bT\b", text):
        yield "B, T", "sequences and tokens of one microbatch of one dp rank"
    elif "B" in symbols:
        yield "B", "samples of one microbatch of one dp rank"
    for axis, size in axes_of(lowered).items():
        if axis in ("dp", MICROBATCH_AXIS) or size == 1:
            continue
        if match := re.search(rf"(\d+)/{axis}", text):
            yield match[0], f"split: each {axis} rank has its piece of the {match[1]}"
        if re.search(rf"\b{axis} I", text):
            yield f"{axis} I", f"the same on every {axis} rank, and so is its gradient"
        if re.search(rf"\b{axis} R|{axis} \S+ -> R", text):
            yield f"{axis} R", f"the same, but of its gradient each {axis} rank has a part, still to be summed"
        if re.search(rf"\b{axis} P", text):
            yield f"{axis} P", f"each {axis} rank has a part, still to be summed"
