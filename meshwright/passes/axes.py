"""Which kinds of dims each axis may split, and what the user pinned on it."""

from collections.abc import Mapping
from dataclasses import dataclass

from meshwright.compiler.graph import Capture
from meshwright.compiler.leaves import SEQUENCE
from meshwright.compiler.mesh import MICROBATCH_AXIS, Mesh
from meshwright.compiler.plan import Plan
from meshwright.compiler.types import Type


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One axis to infer types for.

    seeds: input -> the dim of it that starts split: the batch, or the sequence where that is permitted.
    features: whether dims of parameters may be split. in_time: no communication in the forward. by_microbatch: batch
    statistics, and what is stored in buffers, are those of each microbatch by itself.
    """

    name: str
    size: int
    seeds: Mapping[str, int]
    features: bool
    in_time: bool = False
    by_microbatch: bool = False


def axes_of(capture: Capture, mesh: Mesh, plan: Plan) -> tuple[Axis, ...]:
    """The axes to infer types for: dp and mb split the batch; tp features, and the sequence where that is permitted."""
    batched = {leaf.name: 0 for leaf in capture.inputs if leaf.batched}
    sequences = {leaf.name: leaf.shape.index(SEQUENCE) for leaf in capture.inputs if SEQUENCE in leaf.shape}
    microbatches = plan.num_microbatches(mesh.size("pp"))
    axes = (
        Axis(name="dp", size=mesh.size("dp"), seeds=batched, features=False),
        Axis(
            name=MICROBATCH_AXIS,
            size=microbatches,
            seeds=batched,
            features=False,
            in_time=True,
            by_microbatch=plan.batch_statistics == "microbatch",
        ),
        Axis(name="tp", size=mesh.size("tp"), seeds=sequences if plan.sequence_parallel else {}, features=True),
    )
    return tuple(axis for axis in axes if axis.size > 1)


def pins_of(capture: Capture, plan: Plan, axis: str) -> dict[str, tuple[str, Type]]:
    """The pins on one axis by the names that graphs use; a pin on a parameter holds for each of its segments."""
    pins: dict[str, tuple[str, Type]] = {}
    for name, parameter in capture.parameters.items():
        if pin := plan.pinned((name, *parameter.aliases), axis):
            pins[name] = pin
            pins |= {segment: pin for segment, (owner, _) in capture.segments.items() if owner == name}
    return pins
