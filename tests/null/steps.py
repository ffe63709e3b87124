"""Steps of any pipeline, for tests of properties that all schedules have."""

from collections.abc import Sequence

from hypothesis import strategies as st

from meshwright.passes.schedules import ALGORITHMS, Costs, Edge, Pipeline, Schedule, chain, schedule


@st.composite
def steps(draw: st.DrawFn, most: int = 4, names: Sequence[str] = tuple(ALGORITHMS)) -> Schedule:
    """A schedule of any pipeline that it is defined for, with any costs and any edges, with and without gradient."""
    name = draw(st.sampled_from(names))
    num_chunks = ALGORITHMS[name].chunks or draw(st.integers(2, 3))
    num_ranks = draw(st.integers(1, most))
    stages = range(num_ranks * num_chunks)
    pairs = [(a, b) for b in stages for a in range(b)]
    skips = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=6)) if pairs else []
    edges: list[Edge] = [(a, b, draw(st.booleans())) for a, b in skips]
    if draw(st.booleans()):
        edges += chain(len(stages))

    def some() -> tuple[float, ...]:
        return tuple(float(draw(st.integers(0, 4))) for _ in stages)

    costs = Costs(forward=some(), inputs=some(), weights=some(), activations=some(), message=draw(st.integers(0, 2)))

    def pipeline(num_microbatches: int) -> Pipeline:
        return Pipeline.of(num_ranks, num_microbatches, num_chunks, edges=edges, costs=costs)

    defined = [m for m in range(1, 3 * most + 1) if ALGORITHMS[name].undefined(pipeline(m)) is None]
    return schedule(name, pipeline(draw(st.sampled_from(defined))))
