"""The lines of ``__init__``: parameters, buffers and sites of random operators, by the model's own names."""

import collections
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from meshwright.codegen.edges import axes_of
from meshwright.codegen.lines import broken, declared_lines
from meshwright.codegen.views import Line
from meshwright.codegen.wording import identifier, quoted, tuple_text, unused
from meshwright.compiler.graph import Function, Value
from meshwright.compiler.program import Lowered, Placed, Stage
from meshwright.compiler.types import Held
from meshwright.runtime.layout import largest_piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Declarations:
    """Writes the declarations of one stage file. shared: the types that all parameters of the stage have."""

    lowered: Lowered
    shared: Mapping[str, Held]

    def typed(self) -> list[str]:
        """``param = param.typed(dp="I -> R")``: the shared types, said once."""
        if not self.shared:
            return []
        notes = [note for axis, held in self.shared.items() if (note := _pending(axis, held))]
        beside = f"  # at rest -> in use: {', '.join(notes)}" if notes else ""
        return [f"param = param.typed({', '.join(_keywords(self.shared))}){beside}"]

    def of(self, functions: Sequence[Function], attributes: Mapping[str, str], prefix: str = "") -> list[str]:
        """``self.q_proj_weight = param("q_proj.weight", (64, 64), tp="S(0)")`` with the piece in use in the margin.

        functions: those that read them; the first gives the order. prefix: the path of the instance with its dot.
        """
        names = _in_order(functions[0])
        values: dict[str, Value] = {}
        for function in reversed(functions):
            values |= {str(n.target): function.values[n] for n in function.graph.nodes if n.op == "get_attr"}
        others = [name for name in values if name not in names]
        lines: list[Line] = []
        drawn: list[str] = []
        for name in (*others, *names):
            if prefix + name in self.lowered.random:
                drawn += broken(f"self.{attributes[name]} = {self._site(name, prefix)}")
            else:
                code = f"self.{attributes[name]} = {self._declared(name, prefix)}"
                lines.append(Line(code=code, margin=self._piece(values[name])))
        return [*declared_lines(lines), *drawn]

    def _site(self, name: str, prefix: str) -> str:
        arguments = [quoted(name), *_keywords(self.lowered.random[prefix + name].splits)]
        return f"param.random({', '.join(arguments)})"

    def _declared(self, name: str, prefix: str) -> str:
        placed = self.lowered.parameters.get(prefix + name)
        if placed is None:
            kept = self.lowered.buffers[prefix + name]
            arguments = [quoted(name), tuple_text(kept.buffer.shape), *_keywords(kept.splits)]
            return f"param.buffer({', '.join(arguments)})"
        parts = [quoted(re.sub(r"\[\d+:\d+\]$", "", name)), tuple_text(placed.parameter.shape)]
        if placed.segment is not None:
            parts.append(f"segment=({placed.segment.dim}, {placed.segment.start}, {placed.segment.length})")
        parts += _keywords({axis: held for axis, held in placed.held.items() if self.shared.get(axis) != held})
        return f"param({', '.join(parts)})"

    def _piece(self, value: Value) -> str:
        """The shape of a rank's piece in use, and that of the last rank where it is shorter."""
        local, last = list(value.shape), list(value.shape)
        for axis, type_ in value.types.items():
            if type_.is_split:
                size, pieces = int(local[type_.dim]), axes_of(self.lowered)[axis]
                local[type_.dim] = largest_piece(size, pieces)
                last[type_.dim] = size - (pieces - 1) * largest_piece(size, pieces)
        return tuple_text(local) if last == local else f"{tuple_text(local)}, the last {tuple_text(last)}"


def declarations(lowered: Lowered, stage: Stage) -> Declarations:
    """The declarations of a stage file."""
    own = [placed for placed in lowered.parameters.values() if stage.index in placed.stages]
    return Declarations(lowered=lowered, shared=_shared(own))


def _keywords(types: Mapping[str, object]) -> list[str]:
    return [f'{axis}="{type_}"' for axis, type_ in types.items()]


def _in_order(function: Function) -> list[str]:
    """The parameters and buffers of a function in the order of their first use."""
    order = {node: i for i, node in enumerate(function.graph.nodes)}
    first = {str(n.target): min((order[u] for u in n.users), default=0) for n in order if n.op == "get_attr"}
    return sorted(first, key=lambda name: first[name])


def _shared(parameters: Sequence[Placed]) -> dict[str, Held]:
    votes = collections.Counter(p.held["dp"] for p in parameters if "dp" in p.held)
    return {"dp": votes.most_common(1)[0][0]} if votes else {}


def _pending(axis: str, held: Held) -> str:
    if held.rest == held.use:
        return ""
    if held.rest.is_split:
        return f"gathered over {axis} per module, the gradient scattered"
    return f"the gradient is summed over {axis} once per step"


def attribute_names(paths: Iterable[str], taken: Iterable[str]) -> dict[str, str]:
    """Attribute names of parameters: the last parts of their paths, lengthened until unique."""
    paths, used = list(paths), set(taken)
    depth = dict.fromkeys(paths, 2)
    while True:
        names = {p: _attribute(p, depth[p]) for p in paths}
        counts = collections.Counter(names.values())
        clashes = [p for p in paths if (counts[names[p]] > 1 or names[p] in used) and depth[p] <= p.count(".") + 1]
        if not clashes:
            break
        for p in clashes:
            depth[p] += 1
    for p in paths:
        names[p] = unused(names[p], used)
        used.add(names[p])
    return names


def _attribute(path: str, depth: int) -> str:
    plain, _, segment = path.partition("[")
    name = identifier("_".join(plain.split(".")[-depth:]))
    return f"{name}_{segment.split(':')[0]}" if segment else name
