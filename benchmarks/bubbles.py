"""The bubble of steps that ran, beside the one that the simulator has for the same schedule and times."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from statistics import fmean
from typing import NamedTuple

from meshwright.passes.schedules import Compute, Costs, Pipeline, schedule
from meshwright.passes.schedules.simulate import Simulation, simulate
from meshwright.runtime.actions import Action
from meshwright.runtime.executor import Timed


class Ran(NamedTuple):
    """A computation and when it ran, by a clock that all ranks share."""

    compute: Compute
    begin: float
    end: float


Step = Sequence[Sequence[Ran]]
"""What every rank ran in a step."""


def ran(timed: Sequence[Timed], stage: int) -> list[Ran]:
    """The executor's record of a step. stage: that of actions that do not name theirs."""
    return [Ran(_compute(action, stage), begin, end) for action, _, begin, end in timed]


def _compute(action: Action, stage: int) -> Compute:
    return Compute(action.kind, stage if action.stage is None else action.stage, action.microbatch)


def bubble(step: Step) -> float:
    """The part of all ranks' time between the step's first and last computation in which they compute nothing."""
    everything = list(chain.from_iterable(step))
    span = max(one.end for one in everything) - min(one.begin for one in everything)
    return 1 - sum(one.end - one.begin for one in everything) / (len(step) * span)


def simulated(name: str, pipeline: Pipeline, steps: Sequence[Step]) -> Simulation:
    """The schedule with the mean times of these steps; a message takes as long as the fastest of theirs."""
    costs = _costs(steps, pipeline.num_stages)
    made = schedule(name, replace(pipeline, costs=costs))
    messages = simulate(made.orders, made.placement, pipeline.edges, costs).messages
    gaps = [gap for step in steps for gap in _gaps(step, [(m.source, m.destination) for m in messages])]
    return simulate(made.orders, made.placement, pipeline.edges, replace(costs, message=max(0.0, min(gaps))))


def _costs(steps: Sequence[Step], num_stages: int) -> Costs:
    """Mean times by stage. A stage with whole backwards alone has half of one for each part of it."""
    times: dict[tuple[str, int], list[float]] = {}
    for one in chain.from_iterable(chain.from_iterable(steps)):
        times.setdefault((one.compute.kind, one.compute.stage), []).append(one.end - one.begin)
    mean = {key: fmean(found) for key, found in times.items()}

    def part(kind: str) -> tuple[float, ...]:
        return tuple(mean[kind, s] if (kind, s) in mean else mean["B", s] / 2 for s in range(num_stages))

    forward = tuple(mean["F", s] for s in range(num_stages))
    return Costs(forward=forward, inputs=part("I"), weights=part("W"), activations=(1.0,) * num_stages)


def _gaps(step: Step, messages: Sequence[tuple[Compute, Compute]]) -> Iterator[float]:
    """From the end of a computation to the beginning of one that needs its result on another rank."""
    at: Mapping[Compute, Ran] = {one.compute: one for one in chain.from_iterable(step)}
    return (at[destination].begin - at[source].end for source, destination in messages)
