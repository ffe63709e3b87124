"""What is to be proven, and the words for it."""

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from meshwright.passes.schedules.pipeline import Edge
from meshwright.runtime.actions import Action, Kind, render, stage_of, stages_on

Place = tuple[int, int]
"""A pipeline rank and an index: of an action, or of an exchange."""

Done = tuple[int, bool, int]
"""What an action of a stage makes for others: stage, whether forward, microbatch."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is to be proven. ``rows``: the actions per pipeline rank, peers as stages. See ``prove`` for the rest."""

    rows: tuple[tuple[Action, ...], ...]
    placement: tuple[int, ...]
    num_microbatches: int
    edges: Collection[Edge]
    peaks: Sequence[int] | None
    ascending: bool
    forward_only: bool

    @functools.cached_property
    def stages_of(self) -> tuple[tuple[int, ...], ...]:
        """The stages on each pipeline rank."""
        return tuple(stages_on(self.placement, rank) for rank in range(len(self.rows)))

    def stage(self, rank: int, action: Action) -> int:
        return stage_of(action, self.stages_of[rank])

    def actions(self) -> Iterator[tuple[int, Action, int]]:
        """(pipeline rank, action, index in its row)"""
        for rank, row in enumerate(self.rows):
            for index, action in enumerate(row):
                yield rank, action, index

    @functools.cached_property
    def makers(self) -> Mapping[Done, Place]:
        """Where forwards, and backwards as far as the inputs, are computed."""
        return {
            (self.stage(rank, action), action.kind == "F", action.microbatch): (rank, index)
            for rank, action, index in self.actions()
            if action.runs and action.kind != "W"
        }

    def name(self, kind: Kind, stage: int, microbatch: int) -> str:
        """The text of a computation; its stage where the rank has several."""
        several = len(self.stages_of[self.placement[stage]]) > 1
        return f"{stage if several else ''}{kind}{microbatch}"

    def at(self, rank: int, action: Action) -> str:
        return f"{render([action], 'stage')} on pipeline rank {rank}"

    def at_place(self, place: Place) -> str:
        return self.at(place[0], self.rows[place[0]][place[1]])
