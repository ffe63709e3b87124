"""The whole parallel program, as codegen writes it: what each distinct stage computes, what each rank holds and
sends.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from meshwright.compiler.graph import Block, Buffer, Capture, Function, Parameter, Segment, Site, Value
from meshwright.compiler.mesh import Mesh
from meshwright.compiler.plan import Plan
from meshwright.compiler.types import Held, Type
from meshwright.runtime.actions import Action


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A parameter (or one segment of it) as the ranks hold it: a type at rest and in use per axis, the stages that
    use it.
    """

    parameter: Parameter
    held: Mapping[str, Held]
    stages: tuple[int, ...]
    segment: Segment | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A buffer as the ranks hold it: how it is split, by axis, and the stages that use it."""

    buffer: Buffer
    splits: Mapping[str, Type]
    stages: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A site of a random operator: how the tensor that it draws is split, by axis, and the stages that draw it."""

    site: Site
    splits: Mapping[str, Type]
    stages: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """A value that one stage sends to later ones. ``name`` is a placeholder of the receiving stages' functions."""

    name: str
    value: Value
    source: int
    destinations: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """What one microbatch of a stage costs a rank: seconds of the forward and of both parts of the backward, and the
    bytes that the forward keeps for it.
    """

    forward: float
    inputs: float
    weights: float
    activations: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What the ranks that run a pipeline stage do for it.

    function: placeholders are batch inputs, received edges and prepared values by name; its results are what it
    sends, in the order of ``sends``, or the loss on the last stage.
    prepare: None, or the function run once per step on the replica's whole batch, with results named ``prepares``.
    cost: what a microbatch costs.
    """

    index: int
    ranks: tuple[int, ...]
    function: Function
    inputs: tuple[str, ...]
    receives: tuple[Edge, ...]
    sends: tuple[Edge, ...]
    prepare: Function | None
    prepares: tuple[str, ...]
    cost: StageCost


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The schedule of a step.

    name: the plan's, or what was chosen where that leaves it open. placement: the pipeline rank of every stage. rows:
    the actions of every pipeline rank, peers as stages. peaks: the most microbatches' chunks that it declares to keep
    alive on every pipeline rank; None where it declares nothing.
    """

    name: str
    placement: tuple[int, ...]
    rows: tuple[tuple[Action, ...], ...]
    peaks: tuple[int, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """Everything that codegen needs.

    blocks: by the module path of every instance. parameters: by the names that graphs use (segments apart). random: the
    sites of random operators, in the order of the model's calls. message: seconds from one stage to another.
    """

    capture: Capture
    mesh: Mesh
    plan: Plan
    microbatches: int
    blocks: Mapping[str, Block]
    stages: tuple[Stage, ...]
    step: Step
    parameters: Mapping[str, Placed]
    buffers: Mapping[str, Kept]
    random: Mapping[str, Drawn]
    loss: Value
    message: float
    warnings: tuple[str, ...] = ()
