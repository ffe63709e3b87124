"""The manifest: what the files of a bundle promise each other, as plain data in a fixed order."""

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import torch

from meshwright.codegen.edges import axes_of
from meshwright.compiler.graph import Buffer, Function, Value
from meshwright.compiler.plan import AUTO
from meshwright.compiler.program import Edge, Kept, Lowered, Placed, Stage
from meshwright.compiler.types import Held, I, Size
from meshwright.passes.reshard import conversion_of
from meshwright.runtime.actions import render

FORMAT = 2


def manifest_of(lowered: Lowered, edges: Mapping[str, str]) -> dict[str, Any]:
    """The manifest of a program, without the digests of its files."""
    plan = lowered.plan
    last = len(lowered.stages) - 1
    return {
        "format": FORMAT,
        "versions": {"meshwright": importlib.metadata.version("meshwright"), "torch": torch.__version__.split("+")[0]},
        "model": lowered.capture.model,
        "mesh": dict(lowered.mesh.axes),
        "plan": {
            "microbatches": lowered.microbatches,
            "schedule": lowered.step.name,
            "auto": plan.schedule == AUTO,
            "zero": plan.zero,
            "reshard": plan.resharded(lowered.mesh.size("pp")),
            "sequence_parallel": plan.sequence_parallel,
            "recompute": plan.recompute,
            "precision": plan.precision,
            "compile": plan.compile,
            "random": plan.random,
            "batch_statistics": plan.batch_statistics,
        },
        "symbols": {str(symbol): size for symbol, size in lowered.capture.symbols.items()},
        "fixed": list(lowered.capture.fixed),
        "warnings": list(lowered.warnings),
        "input_tree": lowered.capture.input_tree,
        "inputs": {
            leaf.name: {
                "shape": _shape(leaf.shape),
                "dtype": _dtype(leaf.dtype),
                "types": {
                    axis: "S(0)" for axis, size in axes_of(lowered).items() if leaf.batched and axis in ("dp", "mb")
                },
            }
            for leaf in lowered.capture.inputs
        },
        "loss": {"stage": last, "types": _types(lowered.loss, axes_of(lowered))},
        "times": "modelled" if plan.times is None else "measured",
        "message": _rounded(lowered.message),
        "stages": [_stage(lowered, stage, edges) for stage in lowered.stages],
        "schedule": [render(row, "stage") for row in lowered.step.rows],
        "buffers": {
            **{name: _buffer(kept.buffer, kept) for name, kept in lowered.buffers.items()},
            **{name: _buffer(b) for name, b in lowered.capture.buffers.items() if name not in lowered.buffers},
        },
        "parameters": _parameters(lowered),
        "random": {
            name: {
                "site": drawn.site.number,
                "operator": drawn.site.operator,
                "at": drawn.site.at,
                "types": {axis: str(type_) for axis, type_ in drawn.splits.items()},
                "stages": list(drawn.stages),
            }
            for name, drawn in lowered.random.items()
        },
        "explain": [row for stage in lowered.stages for row in _explained(lowered, stage)],
    }


def _stage(lowered: Lowered, stage: Stage, edges: Mapping[str, str]) -> dict[str, Any]:
    def edge(e: Edge, **ends: Any) -> dict[str, Any]:
        return {
            "shape": _shape(e.value.shape),
            "dtype": _dtype(e.value.dtype),
            "types": _types(e.value, axes_of(lowered)),
            "requires_grad": e.value.grad,
            **ends,
        }

    return {
        "file": f"stages/stage_{stage.index}.py",
        "ranks": list(stage.ranks),
        "inputs": list(stage.inputs),
        "prepares": list(stage.prepares),
        "receives": {edges[e.name]: edge(e, **{"from": e.source}) for e in stage.receives},
        "sends": {edges[e.name]: edge(e, to=list(e.destinations)) for e in stage.sends},
        "costs": {
            "forward": _rounded(stage.cost.forward),
            "inputs": _rounded(stage.cost.inputs),
            "weights": _rounded(stage.cost.weights),
            "activations": _rounded(stage.cost.activations),
        },
    }


def _rounded(cost: float) -> float:
    """To six digits, for people who read it."""
    return float(f"{cost:.6g}")


def _buffer(buffer: Buffer, kept: Kept | None = None) -> dict[str, Any]:
    entry: dict[str, Any] = {"shape": list(buffer.shape), "dtype": _dtype(buffer.dtype)}
    if kept is not None and kept.splits:
        entry["types"] = {axis: str(type_) for axis, type_ in kept.splits.items()}
    entry["stages"] = list(kept.stages) if kept is not None else []
    entry["persistent"] = buffer.persistent
    if buffer.aliases:
        entry["aliases"] = list(buffer.aliases)
    if buffer.initial is not None:
        entry["init"] = {"op": buffer.initial[0], "args": list(buffer.initial[1])}
    if buffer.unknown_evaluation is not None:
        entry["unknown_evaluation"] = buffer.unknown_evaluation
    return entry


def _parameters(lowered: Lowered) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    for name, parameter in lowered.capture.parameters.items():
        placed = [p for p in lowered.parameters.values() if p.parameter.name == name]
        entry: dict[str, Any] = {"shape": list(parameter.shape), "dtype": _dtype(parameter.dtype)}
        if placed and placed[0].segment is not None:
            common = _common(placed)
            entry["types"] = {axis: str(held) for axis, held in common.items()}
            entry["segments"] = [
                {
                    "dim": p.segment.dim,
                    "start": p.segment.start,
                    "length": p.segment.length,
                    "types": {axis: str(held) for axis, held in p.held.items() if axis not in common},
                }
                for p in placed
                if p.segment is not None
            ]
        else:
            entry["types"] = {axis: str(held) for p in placed for axis, held in p.held.items()}
        entry["stages"] = sorted({k for p in placed for k in p.stages})
        if not parameter.trainable:
            entry["trainable"] = False
        if parameter.aliases:
            entry["aliases"] = list(parameter.aliases)
        if parameter.initial is not None:
            entry["init"] = {"op": parameter.initial[0], "args": list(parameter.initial[1])}
        found[name] = entry
    return found


def _common(placed: list[Placed]) -> dict[str, Held]:
    first = placed[0].held
    return {axis: held for axis, held in first.items() if all(p.held.get(axis) == held for p in placed)}


def _explained(lowered: Lowered, stage: Stage) -> list[dict[str, Any]]:
    """The conversions of a stage, one row each: where, what, bytes on the wire forward and backward at the example's
    size.
    """
    axes = axes_of(lowered)
    rows = []
    functions: list[tuple[str, int, Function]] = [("", 1, stage.function)]
    if stage.prepare is not None:
        functions.append(("prepare", 1, stage.prepare))
    counts: dict[str, int] = {}
    for node in stage.function.graph.nodes:
        if node.op == "call_module":
            name = lowered.blocks[str(node.target)].name
            counts[name] = counts.get(name, 0) + 1
    blocks = {block.name: block for block in lowered.blocks.values()}
    functions += [(name, count, blocks[name].function) for name, count in counts.items()]
    for where, times, function in functions:
        for node in function.graph.nodes:
            converted = conversion_of(node)
            if converted is None:
                continue
            axis = converted[0]
            source: Value = function.values[node.args[0]]
            target = function.values[node]
            origin = function.origins.get(node)
            rows.append(
                {
                    "stage": stage.index,
                    "in": where or "stage",
                    "times": times,
                    "name": origin.name if origin else node.name,
                    "shape": _shape(target.shape),
                    "axis": axis,
                    "from": str(source.types.get(axis, I)),
                    "to": str(target.types.get(axis, I)),
                    "bytes": _bytes(lowered, source, axes),
                    "at": f"{origin.statement[0].rsplit('/', 1)[-1]}:{origin.statement[1]}"
                    if origin and origin.statement[0]
                    else "",
                }
            )
    return rows


def _bytes(lowered: Lowered, value: Value, axes: Mapping[str, int]) -> int:
    """Bytes of the whole value on one replica and microbatch at the example's size."""
    count = 1
    for size in value.shape:
        count *= size if isinstance(size, int) else int(size.subs(lowered.capture.symbols))
    for axis in ("dp", "mb"):
        if (type_ := value.types.get(axis)) is not None and type_.is_split:
            count //= axes[axis]
    return count * value.dtype.itemsize


def _types(value: Value, axes: Mapping[str, int]) -> dict[str, str]:
    return {axis: str(value.types.get(axis, I)) for axis, size in axes.items() if size > 1}


def _shape(shape: tuple[Size, ...]) -> list[Any]:
    return [size if isinstance(size, int) else str(size) for size in shape]


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
