"""What a schedule is asked for and what it answers: a pipeline in, the order of computations on every rank out."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from meshwright.runtime.actions import Kind

Edge = tuple[int, int] | tuple[int, int, bool]
"""(source stage, destination stage), or with False as a third where no gradient comes back."""

Placement = Sequence[int]
"""The pipeline rank of every stage."""


class Compute(NamedTuple):
    """One computation of a step; its text is ``1F3``: stage 1, forward, microbatch 3."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


Order = tuple[Compute, ...]
"""What one rank computes in a step, in this order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What one microbatch costs on each stage: times in one unit of choice, bytes, both by stage.

    inputs, weights: the two parts of a backward; a whole backward takes both. activations: what a forward leaves behind
    until the whole backward or the backward for the weights is done. message: time from the end of a computation to
    when another rank has its result; nothing within a rank.
    """

    forward: tuple[float, ...]
    inputs: tuple[float, ...]
    weights: tuple[float, ...]
    activations: tuple[float, ...]
    message: float = 0.0

    def __post_init__(self) -> None:
        lengths = {len(self.forward), len(self.inputs), len(self.weights), len(self.activations)}
        if len(lengths) > 1:
            raise ValueError(f"costs of {', '.join(map(str, sorted(lengths)))} stages: they are of the same stages")
        if min((*self.forward, *self.inputs, *self.weights, *self.activations, self.message), default=0) < 0:
            raise ValueError("a cost is negative")

    @staticmethod
    def even(
        num_ranks: int,
        num_chunks: int = 1,
        *,
        forward: float = 1.0,
        inputs: float = 1.0,
        weights: float = 1.0,
        activations: float = 1.0,
        message: float = 0.0,
    ) -> "Costs":
        """The same on every stage, given for a whole rank: a chunk takes its part of it."""
        return Costs(
            forward=(forward / num_chunks,) * (num_ranks * num_chunks),
            inputs=(inputs / num_chunks,) * (num_ranks * num_chunks),
            weights=(weights / num_chunks,) * (num_ranks * num_chunks),
            activations=(activations / num_chunks,) * (num_ranks * num_chunks),
            message=message,
        )

    def time(self, compute: Compute) -> float:
        """How long a computation takes."""
        kind, stage, _ = compute
        if kind == "B":
            return self.inputs[stage] + self.weights[stage]
        by_kind: Mapping[Kind, tuple[float, ...]] = {"F": self.forward, "I": self.inputs, "W": self.weights}
        return by_kind[kind][stage]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """What is to be scheduled: one step of ``num_microbatches`` over stages numbered in the order of the data.

    There are num_ranks * num_chunks stages.
    """

    num_ranks: int
    num_microbatches: int
    num_chunks: int
    edges: Collection[Edge]
    costs: Costs

    def __post_init__(self) -> None:
        if len(self.costs.forward) != self.num_stages:
            raise ValueError(f"costs of {len(self.costs.forward)} stages for a pipeline of {self.num_stages}")

    @staticmethod
    def of(
        num_ranks: int,
        num_microbatches: int,
        num_chunks: int = 1,
        *,
        edges: Collection[Edge] | None = None,
        costs: Costs | None = None,
    ) -> "Pipeline":
        """With the edges of a chain, all with gradients, and equal times of F, I and W where nothing else is said."""
        return Pipeline(
            num_ranks=num_ranks,
            num_microbatches=num_microbatches,
            num_chunks=num_chunks,
            edges=chain(num_ranks * num_chunks) if edges is None else edges,
            costs=Costs.even(num_ranks, num_chunks) if costs is None else costs,
        )

    @property
    def num_stages(self) -> int:
        return self.num_ranks * self.num_chunks


def chain(num_stages: int) -> tuple[Edge, ...]:
    """The edges of stages that each feed the next."""
    return tuple((stage, stage + 1) for stage in range(num_stages - 1))


def looped(num_ranks: int, num_chunks: int) -> Placement:
    """Round and round: stage s on rank s mod p."""
    return tuple(range(num_ranks)) * num_chunks


def vee(num_ranks: int, num_chunks: int = 2) -> Placement:
    """Down and up again: stages s and 2p - 1 - s on rank s, so that the first and the last stage share a rank."""
    assert num_chunks == 2
    return (*range(num_ranks), *reversed(range(num_ranks)))


def has_gradient(edge: Edge) -> bool:
    return len(edge) == 2 or edge[2]


def followed(edges: Collection[Edge]) -> Mapping[Kind, Mapping[int, tuple[int, ...]]]:
    """The stages that a computation takes values from, by its kind and stage; ascending."""
    forward: dict[int, set[int]] = {}
    backward: dict[int, set[int]] = {}
    for edge in edges:
        forward.setdefault(edge[1], set()).add(edge[0])
        if has_gradient(edge):
            backward.setdefault(edge[0], set()).add(edge[1])
    up = {stage: tuple(sorted(sources)) for stage, sources in backward.items()}
    down = {stage: tuple(sorted(sources)) for stage, sources in forward.items()}
    return {"F": down, "B": up, "I": up, "W": {}}
