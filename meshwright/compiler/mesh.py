"""The device mesh: named axes over which a program is laid out."""

import math
from dataclasses import dataclass
from typing import Any

from meshwright.compiler.errors import PlanError

AXES = ("dp", "pp", "tp")
"""The axes that a mesh may have: data (and ZeRO), pipeline, tensor (and sequence) parallelism."""

MICROBATCH_AXIS = "mb"
"""The axis in time: its "ranks" are the microbatches of a step."""


@dataclass(frozen=True, slots=True, init=False)
class Mesh:
    """``Mesh(dp=2, pp=2, tp=2)``: sizes of named axes, outermost first; ranks are numbered row-major.

    Raises PlanError for an unknown axis or a size below 1.
    """

    axes: tuple[tuple[str, int], ...]

    def __init__(self, **axes: int) -> None:
        for name, size in axes.items():
            if name not in AXES:
                raise PlanError(f"unknown mesh axis {name!r}: the axes are {', '.join(AXES)}")
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise PlanError(f"mesh axis {name!r} has size {size!r}: sizes are whole numbers from 1")
        object.__setattr__(self, "axes", tuple(axes.items()))

    @staticmethod
    def of(mesh: Any) -> "Mesh":
        """``mesh`` itself, or the Mesh with the names and sizes of a torch ``DeviceMesh``."""
        if isinstance(mesh, Mesh):
            return mesh
        names = getattr(mesh, "mesh_dim_names", None)
        if names is None:
            raise PlanError(
                f"a mesh is a Mesh(dp=..., pp=..., tp=...) or a torch DeviceMesh with named dims, not {mesh!r}"
            )
        ranks = mesh.mesh.flatten().tolist()
        if ranks != list(range(len(ranks))):
            raise PlanError("a DeviceMesh has to number its ranks 0, 1, 2, ... in row-major order")
        return Mesh(**dict(zip(names, mesh.shape, strict=True)))

    def __str__(self) -> str:
        return " · ".join(f"{name}={size}" for name, size in self.axes) or "one rank"

    @property
    def num_ranks(self) -> int:
        return math.prod(size for _, size in self.axes)

    def size(self, axis: str) -> int:
        """Ranks along ``axis``; 1 for an axis that the mesh does not have."""
        return dict(self.axes).get(axis, 1)

    def coordinates(self, rank: int) -> dict[str, int]:
        """The position of ``rank`` on every axis."""
        result: dict[str, int] = {}
        for name, size in reversed(self.axes):
            rank, result[name] = divmod(rank, size)
        return {name: result[name] for name, _ in self.axes}

    def rank(self, coordinates: dict[str, int]) -> int:
        """The rank at ``coordinates``; an axis that is absent counts as 0."""
        rank = 0
        for name, size in self.axes:
            rank = rank * size + coordinates.get(name, 0)
        return rank

    def group(self, rank: int, axis: str) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` on ``axis`` alone, in order."""
        here = self.coordinates(rank)
        return tuple(self.rank({**here, axis: index}) for index in range(self.size(axis)))

    def pipeline_ranks(self, index: int) -> tuple[int, ...]:
        """All ranks whose place in the pipeline is ``index``, in order."""
        return tuple(rank for rank in range(self.num_ranks) if self.coordinates(rank).get("pp", 0) == index)
