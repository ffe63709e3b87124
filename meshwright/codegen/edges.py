"""What the axes and the values between stages are called in all files of a bundle."""

from meshwright.codegen.wording import identifier, unused
from meshwright.compiler.mesh import MICROBATCH_AXIS
from meshwright.compiler.program import Lowered


def axes_of(lowered: Lowered) -> dict[str, int]:
    """The sizes of the axes that values have types on."""
    axes = {axis: size for axis, size in lowered.mesh.axes if axis != "pp"}
    return {**axes, MICROBATCH_AXIS: lowered.microbatches}


def edge_names(lowered: Lowered) -> dict[str, str]:
    """What the values between stages are called, by the names of their edges; unique within every stage."""
    taken = {leaf.name for leaf in lowered.capture.inputs} | {n for stage in lowered.stages for n in stage.prepares}
    by_stage: list[set[str]] = [set(taken) for _ in lowered.stages]
    names: dict[str, str] = {}
    for edge in [edge for stage in lowered.stages for edge in stage.sends]:
        receivers = [lowered.stages[k].function for k in edge.destinations]
        node = next(n for function in receivers for n in function.inputs() if n.target == edge.name)
        origin = receivers[0].origins.get(node)
        ends = [by_stage[k] for k in (edge.source, *edge.destinations)]
        name = unused(identifier(origin.name if origin else edge.name), set().union(*ends))
        for end in ends:
            end.add(name)
        names[edge.name] = name
    return names
